"""Asking an LLM: the one client of the worker, for the judge and the evolver.

Design: a call either returns a `Completion` or says what to do: `LLMUnavailable` (try again later:
no connection, a time-out, 429, 5xx), `LLMRefused` (a 4xx: the configuration or this very prompt is at
fault, trying again changes nothing), `BudgetExhausted`. Retries, with back-off that honours
``Retry-After``, happen inside; while one request is told to wait, no other of this client is sent.
The number at a time is bounded, and a request that waits for its retry holds no place.

The key goes to the endpoint's own origin and nowhere else: redirects are not followed, proxies of the
environment are not used, and neither the key nor what an error text quotes of it is logged. An address
is checked when it is connected to, before anything is sent, so a name that resolves to a metadata
service or to our own proxy is caught, too.

A server's dislikes (``max_tokens`` at OpenAI's newer models, a temperature, ``response_format``) are
learnt from its 400 and remembered per model.

Limits: answers are not streamed. A proxy of ours that listens on a port that `own_ports` doesn't name
is recognised only by itself, from ``x-metaclaw: off``.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import stamina

from metaclaw_core import __version__
from metaclaw_core.addresses import forbidden_address, parse_ip
from metaclaw_core.errors import MetaClawError, WireError
from metaclaw_core.learn.budget import Budget, BudgetExhausted, Reservation, estimate_tokens
from metaclaw_core.learn.endpoint import Endpoint
from metaclaw_core.model import Json
from metaclaw_core.redact import redact_text
from metaclaw_core.wire.jsonio import dumps, loads_object

__all__ = ["BudgetExhausted", "Completion", "Endpoint", "LLMClient", "LLMRefused", "LLMUnavailable", "Retry"]

# A line for each request and each retry, neither with a reason: what matters is in the exceptions.
for _name in ("httpx", "stamina"):
    logging.getLogger(_name).setLevel(logging.ERROR)

_LONGEST_WAIT = 60.0  # a longer Retry-After is the caller's to wait for
_MAX_ANSWER = 8 * 1024 * 1024
_AGAIN = frozenset({408, 409, 425, 429})  # and everything from 500


class LLMUnavailable(MetaClawError):
    """No answer now; nothing is wrong with the question."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # seconds; None: the server did not say


class LLMRefused(MetaClawError):
    """The server, or one of our own guards, will not answer this. `status` None: a guard of ours."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Completion:
    text: str  # "" where the model said nothing (a filter, or all its tokens went into thinking)
    model: str  # the one that says it answered, else the one asked
    input_tokens: int | None  # as the provider counted; None: it did not say
    output_tokens: int | None
    truncated: bool = False  # cut by max_tokens


@dataclass(frozen=True, slots=True)
class Retry:
    """Times in seconds. A Retry-After takes the place of the computed wait."""

    attempts: int = 4
    wait_initial: float = 0.5
    wait_max: float = 20.0
    wait_jitter: float = 1.0


class LLMClient:
    """One endpoint. Close it with `aclose`, in the event loop that used it."""

    def __init__(
        self,
        endpoint: Endpoint,
        budget: Budget,
        *,
        concurrency: int = 8,
        timeout_s: float = 120.0,
        retry: Retry = Retry(),
        own_ports: Collection[int] = (),
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """`timeout_s` bounds one request from connecting to the last byte. `own_ports` are those that our own proxies
        listen on here. `ssl_context` None: the public authorities."""
        self.endpoint = endpoint
        self.concurrency = concurrency
        self._budget = budget
        self._timeout_s = timeout_s
        self._retry = retry
        self._own_ports = frozenset(own_ports)
        self._slots = asyncio.Semaphore(concurrency)
        self._not_before = 0.0  # monotonic; the server asked for a pause until then
        self._dislikes: dict[str, set[str]] = {}  # model → parameters it must not be sent
        self._http = httpx.AsyncClient(
            trust_env=False,
            follow_redirects=False,
            verify=ssl_context if ssl_context is not None else True,
            timeout=httpx.Timeout(timeout_s, connect=min(10.0, timeout_s), pool=None),
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            headers={"user-agent": f"metaclaw/{__version__}", "x-metaclaw": "off", "accept": "application/json"},
        )

    async def complete(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        purpose: str,
        max_tokens: int,
        temperature: float = 0.0,
        json_object: bool = False,
        model: str | None = None,
    ) -> Completion:
        """The answer to `messages` ({"role": system, user or assistant, "content": text}).

        `purpose` is what the spending is booked under. `model` overrides the endpoint's.
        Raises LLMUnavailable, LLMRefused, BudgetExhausted, StoreError.
        """
        model = model or self.endpoint.model
        size = sum(estimate_tokens(m["content"]) + 8 for m in messages)
        reservation = await self._budget.reserve(purpose, model, size, max_tokens)
        ask = _Ask(tuple(messages), model, max_tokens, temperature, json_object)
        try:
            async for attempt in stamina.retry_context(
                on=_how_to_retry,
                attempts=self._retry.attempts,
                timeout=None,
                wait_initial=self._retry.wait_initial,
                wait_max=self._retry.wait_max,
                wait_jitter=self._retry.wait_jitter,
            ):
                with attempt:
                    return await self._attempt(ask, reservation)
        finally:
            self._budget.release(reservation)
        raise AssertionError("retry_context ends with a result or an exception")

    async def affords(self, purpose: str, input_tokens: int, output_tokens: int) -> None:
        """Raises BudgetExhausted where so much more can't be asked today; nothing is sent and nothing reserved."""
        self._budget.release(await self._budget.reserve(purpose, self.endpoint.model, input_tokens, output_tokens))

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    # --- one request ----------------------------------------------------------------------------

    async def _attempt(self, ask: _Ask, reservation: Reservation) -> Completion:
        await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
        async with self._slots:
            try:
                return await self._adapting(ask, reservation)
            except LLMUnavailable as e:
                if e.retry_after is not None:
                    until = time.monotonic() + min(e.retry_after, _LONGEST_WAIT)
                    self._not_before = max(self._not_before, until)
                raise

    async def _adapting(self, ask: _Ask, reservation: Reservation) -> Completion:
        """The same request again without a parameter that the server turned down; each at most once."""
        dislikes = self._dislikes.setdefault(ask.model, set())
        while True:
            status, headers, body = await self._send(ask.body(self.endpoint.dialect, dislikes), reservation)
            if status == 400:
                parameter = _disliked(body)
                if parameter is not None and parameter not in dislikes:
                    dislikes.add(parameter)
                    continue
            if not 200 <= status < 300:
                raise self._error(status, headers, body)
            try:
                completion = _completion(self.endpoint.dialect, body, ask.model)
            except WireError as e:
                await self._budget.record(reservation, None, None)
                raise LLMUnavailable(self._clean(f"{self._host} answered, but {e}.")) from e
            await self._budget.record(
                reservation, completion.input_tokens, completion.output_tokens, completion.text
            )
            return completion

    async def _send(self, body: bytes, reservation: Reservation) -> tuple[int, httpx.Headers, bytes]:
        request = self._http.build_request(
            "POST",
            self.endpoint.url,
            content=body,
            headers={"content-type": "application/json", **self._credentials()},
            extensions={"trace": self._check_address},
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._http.send(request, stream=True)
                try:
                    return response.status_code, response.headers, await _bounded(response)
                finally:
                    await response.aclose()
        except (httpx.ConnectError, httpx.ConnectTimeout) as e:
            raise LLMUnavailable(f"{self._host} can't be reached: {self._clean(str(e)) or 'time-out'}.") from e
        except (TimeoutError, httpx.TimeoutException) as e:
            await self._budget.record(reservation, None, None)  # it may well have been worked on
            raise LLMUnavailable(f"{self._host} did not answer within {self._timeout_s:g} s.") from e
        except httpx.TransportError as e:
            await self._budget.record(reservation, None, None)
            raise LLMUnavailable(f"The connection to {self._host} broke: {self._clean(str(e))}.") from e

    def _credentials(self) -> dict[str, str]:
        key = self.endpoint.api_key
        if self.endpoint.dialect == "anthropic":
            return {"anthropic-version": "2023-06-01"} | ({"x-api-key": key} if key else {})
        return {"authorization": f"Bearer {key}"} if key else {}

    async def _check_address(self, event: str, info: dict[str, Any]) -> None:
        """httpx tells of each new connection before it is used; the addresses are those of the socket."""
        if event != "connection.connect_tcp.complete":
            return
        stream = info["return_value"]
        address, port = stream.get_extra_info("server_addr")[:2]
        ours = stream.get_extra_info("client_addr")[0]
        problem = forbidden_address(address)
        if problem is None and port in self._own_ports and (parse_ip(address).is_loopback or address == ours):
            problem = "MetaClaw's own proxy (proxy.port)"
        if problem is not None:
            await stream.aclose()
            raise LLMRefused(f"{self._host} is {problem}; it is not asked.")

    # --- errors ---------------------------------------------------------------------------------

    def _error(self, status: int, headers: httpx.Headers, body: bytes) -> LLMUnavailable | LLMRefused:
        said = self._clean(_message_of(body))
        if status in _AGAIN or status >= 500:
            return LLMUnavailable(f"{self._host} answered {status}: {said}", _retry_after(headers))
        if 300 <= status < 400:
            host = urlsplit(headers.get("location", "")).hostname or "another path"
            return LLMRefused(f"{self._host} redirects to {host}, which is not followed; set the API base.", status)
        return LLMRefused(f"{self._host} answered {status}: {said}", status)

    @property
    def _host(self) -> str:
        _, host, port = self.endpoint.origin
        return host if port in (80, 443) else f"{host}:{port}"

    def _clean(self, text: str) -> str:
        """Servers quote the key they were given."""
        key = self.endpoint.api_key
        return redact_text(text.replace(key, "[redacted]") if key else text)


@dataclass(frozen=True, slots=True)
class _Ask:
    messages: tuple[Mapping[str, str], ...]
    model: str
    max_tokens: int
    temperature: float
    json_object: bool

    def body(self, dialect: str, dislikes: Collection[str]) -> bytes:
        fields: dict[str, Json] = {"model": self.model}
        if dialect == "anthropic":
            system = "\n\n".join(m["content"] for m in self.messages if m["role"] == "system")
            if system:
                fields["system"] = system
            fields["messages"] = [dict(m) for m in self.messages if m["role"] != "system"]
            fields["max_tokens"] = self.max_tokens
        else:
            fields["messages"] = [dict(m) for m in self.messages]
            fields["max_completion_tokens" if "max_tokens" in dislikes else "max_tokens"] = self.max_tokens
            if self.json_object and "response_format" not in dislikes:
                fields["response_format"] = {"type": "json_object"}
        if "temperature" not in dislikes:
            fields["temperature"] = self.temperature
        return dumps(fields).encode("ascii")


def _how_to_retry(error: Exception) -> bool | float:
    if not isinstance(error, LLMUnavailable):
        return False
    if error.retry_after is None:
        return True
    return error.retry_after if error.retry_after <= _LONGEST_WAIT else False


async def _bounded(response: httpx.Response) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > _MAX_ANSWER:
            raise httpx.ReadError(f"the answer is longer than {_MAX_ANSWER} bytes")
        parts.append(part)
    return b"".join(parts)


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds from now; the header holds seconds or a date. None: no header, or one that says neither."""
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    if re.fullmatch(r"[0-9]{1,9}(?:\.[0-9]+)?", value):
        return float(value)
    try:
        at = parsedate_to_datetime(value)
    except ValueError:
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0.0, (at - datetime.now(UTC)).total_seconds())


_DISLIKES = {  # what servers name in their 400
    "max_tokens": re.compile(r"max_completion_tokens|unsupported.{0,40}max_tokens", re.IGNORECASE | re.DOTALL),
    "temperature": re.compile(r"temperature", re.IGNORECASE),
    "response_format": re.compile(r"response_format|json_object", re.IGNORECASE),
}


def _disliked(body: bytes) -> str | None:
    """The optional parameter that a 400 complains of, if it is one of those we can leave out."""
    said = _message_of(body)
    return next((name for name, pattern in _DISLIKES.items() if pattern.search(said)), None)


def _message_of(body: bytes) -> str:
    """What an error body says, at most 300 characters of it."""
    try:
        value = loads_object(body, "error")
    except WireError:
        text = body.decode("utf-8", "replace")
    else:
        error = value.get("error", value)
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    return " ".join(text.split())[:300] or "(nothing)"


def _completion(dialect: str, body: bytes, model: str) -> Completion:
    """Raises WireError for what is no answer of the dialect."""
    value = loads_object(body, "its answer")
    usage = value.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    answered = value.get("model")
    answered = answered if isinstance(answered, str) and answered else model
    if dialect == "anthropic":
        blocks = value.get("content")
        if not isinstance(blocks, list):
            raise WireError(f"its answer is no message: {_message_of(body)}")
        parts = [_count(usage.get(n)) for n in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")]
        came_in = None if parts[0] is None else sum(p or 0 for p in parts)
        cut = value.get("stop_reason") == "max_tokens"
        return Completion(_text_of(blocks), answered, came_in, _count(usage.get("output_tokens")), cut)
    try:
        choice = value["choices"][0]
        content = choice["message"]["content"]
    except (KeyError, IndexError, TypeError) as e:
        raise WireError(f"its answer is no chat completion: {_message_of(body)}") from e
    text = content if isinstance(content, str) else _text_of(content if isinstance(content, list) else [])
    counts = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    return Completion(text, answered, *counts, choice.get("finish_reason") == "length")


def _text_of(blocks: list[Any]) -> str:
    return "".join(b["text"] for b in blocks if isinstance(b, dict) and isinstance(b.get("text"), str))


def _count(value: Any) -> int | None:
    """A token count; nonsense is unknown."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else None
