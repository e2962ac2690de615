"""The teacher of on-policy distillation: logprobs of exact token ids from any server with ``/v1/completions``.

Design: the ids are sent as the prompt, echoed with their logprobs, and nothing is to be generated (vLLM, SGLang and
our own engine do so; where ``max_tokens: 0`` is refused one token is drawn and thrown away). What comes back is used
only if it is provably one value per id: as many values as ids, and the count of prompt tokens, or the ids themselves,
where the server says them. Everything else drops the turn; nothing is padded.

Ids of another tokenizer would mean other words, so `check` asks for the words of ids from all over the vocabulary and
compares them with the student's own. A server that shows no words can't be checked and is refused.

Limits: the check samples ids that stand for printable ASCII; two vocabularies that differ only elsewhere pass. The
tokens are not booked on the budget for LLMs: a teacher is meant to be a server of one's own.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

import httpx
import stamina

from metaclaw_core import __version__
from metaclaw_core.addresses import ForbiddenAddress, refuse_forbidden
from metaclaw_core.errors import ConfigError, MetaClawError, WireError
from metaclaw_core.learn.endpoint import Endpoint
from metaclaw_core.learn.llm import LLMRefused, LLMUnavailable, Retry
from metaclaw_core.redact import redact_text
from metaclaw_core.wire.jsonio import dumps, loads_object

_MAX_ANSWER = 128 << 20  # a hundred bytes per token, for the longest of contexts
_AGAIN = frozenset({408, 409, 425, 429})  # and everything from 500
_THIS_PROMPT = frozenset({400, 413, 422})  # what a server says of one prompt, usually that it is too long
_PROBES = 128
_QUICK = Retry()


class TeacherUnfit(MetaClawError):
    """This teacher can't teach this student at all."""


class Tokenizer(Protocol):
    """What is needed of the student's; a tokenizer of transformers has it."""

    def __len__(self) -> int: ...

    def decode(self, token_ids: list[int]) -> str: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Taught:
    """One value per id, the first None; or why there are none."""

    logprobs: tuple[float | None, ...] | None
    problem: str | None = None


class Teacher:
    """One endpoint. Close it with `aclose`, in the event loop that used it."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        concurrency: int = 4,
        timeout_s: float = 300.0,
        retry: Retry = _QUICK,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """`timeout_s` bounds one request. `ssl_context` None: the public authorities."""
        if endpoint.dialect != "openai" or endpoint.api_base.rstrip("/").endswith("/chat/completions"):
            raise ConfigError(
                f"opd.teacher_url {endpoint.api_base} must be a base with /completions, such as http://HOST:8000/v1."
            )
        self.endpoint = endpoint
        base = endpoint.api_base.rstrip("/")
        self._url = base if base.endswith("/completions") else f"{base}/completions"
        self._host = urlsplit(base).netloc
        self._timeout_s = timeout_s
        self._retry = retry
        self._slots = asyncio.Semaphore(concurrency)
        self._max_tokens = 0
        self._http = httpx.AsyncClient(
            trust_env=False,
            follow_redirects=False,
            verify=ssl_context if ssl_context is not None else True,
            timeout=httpx.Timeout(timeout_s, connect=min(10.0, timeout_s), pool=None),
            headers={"user-agent": f"metaclaw/{__version__}", "x-metaclaw": "off", "accept": "application/json"}
            | ({"authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}),
        )

    async def score(self, ids: Sequence[int]) -> Taught:
        """The teacher's logprobs of `ids`; without them where they can't be had for these ids.

        Raises LLMUnavailable (again later) and LLMRefused (the key, the model or the address is at fault).
        """
        try:
            echo = await self._echo(ids)
        except LLMRefused as e:
            if e.status not in _THIS_PROMPT:
                raise
            return Taught(None, str(e))
        except WireError as e:
            return Taught(None, f"{self._host} answered, but {e}")
        return Taught(echo.logprobs)

    async def check(self, tokenizer: Tokenizer) -> None:
        """Raises TeacherUnfit where the teacher's tokens are not the student's, LLMUnavailable, LLMRefused."""
        probes = probe_ids(tokenizer)
        if len(probes) < 2:
            raise TeacherUnfit("The tokenizer of rl.model has no printable tokens to compare with the teacher's.")
        try:
            echo = await self._echo(probes)
        except WireError as e:
            raise TeacherUnfit(
                f"The teacher at {self._host} can't be used: it answered, but {e}. It must serve /completions with "
                "token ids as the prompt, echo and logprobs, as vLLM and SGLang do."
            ) from e
        except LLMRefused as e:
            if e.status not in _THIS_PROMPT:
                raise
            raise TeacherUnfit(f"The teacher at {self._host} does not take the student's token ids: {e}") from e
        if echo.tokens is None:
            raise TeacherUnfit(f"The teacher at {self._host} does not say its tokens' text, so they can't be compared.")
        for id_, theirs in zip(probes, echo.tokens, strict=True):
            ours = tokenizer.decode([id_])
            if ours.strip() != theirs.strip():
                raise TeacherUnfit(
                    f"The teacher at {self._host} has another tokenizer: token {id_} is {theirs!r} there and {ours!r} in "
                    "rl.model. On-policy distillation needs a teacher of the same model family."
                )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def _echo(self, ids: Sequence[int]) -> _Echo:
        """Raises LLMUnavailable, LLMRefused, WireError."""
        async for attempt in stamina.retry_context(
            on=LLMUnavailable,
            attempts=self._retry.attempts,
            timeout=None,
            wait_initial=self._retry.wait_initial,
            wait_max=self._retry.wait_max,
            wait_jitter=self._retry.wait_jitter,
        ):
            with attempt:
                async with self._slots:
                    drawn = self._max_tokens
                    status, body = await self._send(ids, drawn)
                    if status == 400 and drawn == 0 and b"max_tokens" in body:
                        drawn = self._max_tokens = 1
                        status, body = await self._send(ids, drawn)
                if not 200 <= status < 300:
                    raise self._error(status, body)
                return read_echo(loads_object(body, "its answer"), ids, drawn)
        raise AssertionError("retry_context ends with a result or an exception")

    async def _send(self, ids: Sequence[int], max_tokens: int) -> tuple[int, bytes]:
        body = dumps(
            {
                "model": self.endpoint.model,
                "prompt": [int(i) for i in ids],
                "max_tokens": max_tokens,
                "temperature": 1.0,
                "echo": True,
                "logprobs": 1,
                "add_special_tokens": False,
                "return_token_ids": True,
            }
        )
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._http.stream(
                    "POST",
                    self._url,
                    content=body.encode("ascii"),
                    headers={"content-type": "application/json"},
                    extensions={"trace": refuse_forbidden},
                ) as response,
            ):
                parts: list[bytes] = []
                size = 0
                async for part in response.aiter_bytes():
                    size += len(part)
                    if size > _MAX_ANSWER:
                        raise WireError(f"its answer is longer than {_MAX_ANSWER} bytes")
                    parts.append(part)
                return response.status_code, b"".join(parts)
        except ForbiddenAddress as e:
            raise LLMRefused(f"The teacher is not asked: {e}") from e
        except (TimeoutError, httpx.TimeoutException) as e:
            raise LLMUnavailable(f"The teacher at {self._host} did not answer within {self._timeout_s:g} s.") from e
        except httpx.TransportError as e:
            raise LLMUnavailable(f"The teacher at {self._host} can't be reached: {e}.") from e

    def _error(self, status: int, body: bytes) -> LLMUnavailable | LLMRefused:
        said = body[:2_000].decode("utf-8", "replace")
        key = self.endpoint.api_key
        said = " ".join(redact_text(said.replace(key, "[redacted]") if key else said).split())[:300]
        text = f"The teacher at {self._host} answered {status}: {said or '(nothing)'}"
        return LLMUnavailable(text) if status in _AGAIN or status >= 500 else LLMRefused(text, status)


@dataclass(frozen=True, slots=True)
class _Echo:
    logprobs: tuple[float | None, ...]  # one per id
    tokens: tuple[str, ...] | None  # their texts; None: the server does not say


def read_echo(value: Mapping[str, Any], ids: Sequence[int], drawn: int) -> _Echo:
    """What an echoing server says of `ids`, where `drawn` tokens were generated besides. Raises WireError for anything
    that is not provably one number for each id but the first."""
    try:
        choice = value["choices"][0]
        logprobs = choice["logprobs"]["token_logprobs"]
        tokens = choice["logprobs"].get("tokens")
    except (KeyError, IndexError, TypeError) as e:
        raise WireError("it holds no logprobs of the prompt") from e
    n = len(ids)
    if not isinstance(logprobs, list) or len(logprobs) not in (n, n + drawn):
        raise WireError(f"it holds {len(logprobs) if isinstance(logprobs, list) else 'no'} logprobs for {n} ids")
    theirs = choice.get("prompt_token_ids")
    usage = value.get("usage")
    counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if theirs is not None and theirs != [int(i) for i in ids]:
        raise WireError("its prompt holds other ids than were sent")
    if counted is not None and counted != n:
        raise WireError(f"it counts {counted} prompt tokens where {n} ids were sent")
    if drawn and theirs is None and counted is None:
        raise WireError("it does not say how many of its logprobs are of the prompt")
    own = logprobs[:n]
    if not all(_is_logprob(v) for v in own[1:]):
        raise WireError("a logprob of the prompt is missing or no number")
    shown = isinstance(tokens, list) and len(tokens) >= n and all(isinstance(t, str) for t in tokens)
    return _Echo((None, *map(float, own[1:])), tuple(tokens[:n]) if shown else None)


def probe_ids(tokenizer: Tokenizer, most: int = _PROBES) -> list[int]:
    """Ids from all over the vocabulary whose text is printable ASCII and gives the same id again."""
    size = len(tokenizer)
    found = [
        id_
        for id_ in range(0, size, max(1, size // (8 * most)))
        if (text := tokenizer.decode([id_])).strip()
        and text.isascii()
        and text.isprintable()
        and tokenizer.encode(text, add_special_tokens=False) == [id_]
    ]
    return found[:: max(1, -(-len(found) // most))]


def _is_logprob(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e9 < value < 1e-3
