"""Asking the caller's own model with the caller's own key, on the very path where that key works.

Design: the same `complete` as `LLMClient`, for one call at a time and never twice: a refusal is the
caller's provider talking about the caller's key, so it is recorded (`credentials` pauses) and not retried.
The request is the smallest of its dialect; the answer is read by the dialect itself, stream or not, as the
path demands. What may be spent is bounded before anything is sent.

Limits: no JSON mode and no temperature, which are what models disagree about most. An answer that comes as
a stream is read whole.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import httpx

from metaclaw_core import __version__
from metaclaw_core.addresses import ForbiddenAddress, refuse_forbidden
from metaclaw_core.errors import WireError
from metaclaw_core.learn.budget import Budget
from metaclaw_core.learn.credentials import Borrowed, Callers
from metaclaw_core.learn.llm import Completion, LLMRefused, LLMUnavailable
from metaclaw_core.model import Json, Response, StopReason
from metaclaw_core.redact import redact_text
from metaclaw_core.wire import by_name
from metaclaw_core.wire.jsonio import dumps

_MAX_ANSWER = 8 << 20
_LEAST_ANSWER = 300  # tokens; in less than that nothing can be said


class CallerClient:
    """For one borrowed key."""

    def __init__(
        self,
        borrowed: Borrowed,
        callers: Callers,
        budget: Budget,
        *,
        timeout_s: float = 120.0,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.model = borrowed.model
        self._key = borrowed.key
        self._left = borrowed.tokens
        self._callers = callers
        self._budget = budget
        self._timeout_s = timeout_s
        self._ssl = ssl_context  # None: the public authorities

    async def complete(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        purpose: str,
        max_tokens: int,
        temperature: float = 0.0,
        json_object: bool = False,
    ) -> Completion:
        """Raises LLMUnavailable, LLMRefused, BudgetExhausted, StoreError. LLMRefused without a status: it would take
        more than the caller's share."""
        asked = sum(most_tokens(m["content"]) + 8 for m in messages)
        max_tokens = min(max_tokens, self._left - asked)
        if max_tokens < _LEAST_ANSWER:
            raise LLMRefused(f"{asked} tokens of prompt leave no room for an answer in the caller's share.")
        reservation = await self._budget.reserve(purpose, self.model, asked, max_tokens)
        try:
            await asyncio.to_thread(self._callers.announce, self._key)
            body = request_body(self._key.dialect, self.model, messages, max_tokens, self._key.host)
            status, answer = await self._send(dumps(body))
            response = self._answer(answer) if status is not None and 200 <= status < 300 else None
            usage = response.usage if response is not None else None
            came_in = usage.input_tokens if usage else None
            went_out = usage.output_tokens if usage else None
            took = 0
            if status is None or status < 300:  # an error status: refused before it was worked on
                await self._budget.record(reservation, came_in, went_out)
                took = (asked if came_in is None else came_in) + (max_tokens if went_out is None else went_out)
            self._left -= took
            await asyncio.to_thread(self._callers.record, self._key, took, status)
        finally:
            self._budget.release(reservation)
        if response is None:
            raise self._error(status, answer)
        text = response.message.text if response.message is not None else ""
        cut = response.stop_reason is StopReason.LENGTH
        return Completion(text, response.model or self.model, came_in, went_out, cut)

    async def _send(self, content: str) -> tuple[int | None, bytes]:
        """(status, body); (None, what went wrong) where no answer came."""
        headers = {
            "content-type": "application/json",
            "user-agent": f"metaclaw/{__version__}",
            "x-metaclaw": "off",
            self._key.header: f"Bearer {self._key.key}" if self._key.header == "authorization" else self._key.key,
        }
        if self._key.dialect == "anthropic":
            headers["anthropic-version"] = "2023-06-01"
        port = "" if (self._key.scheme, self._key.port) in (("https", 443), ("http", 80)) else f":{self._key.port}"
        url = f"{self._key.scheme}://{self._key.host}{port}{self._key.path}"
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                httpx.AsyncClient(
                    trust_env=False,
                    follow_redirects=False,
                    verify=self._ssl if self._ssl is not None else _public_authorities(),
                    timeout=self._timeout_s,
                ) as client,
                client.stream("POST", url, content=content, headers=headers, extensions={"trace": refuse_forbidden}) as response,
            ):
                parts: list[bytes] = []
                async for part in response.aiter_bytes():
                    parts.append(part)
                    if sum(map(len, parts)) > _MAX_ANSWER:
                        break
                return response.status_code, b"".join(parts)
        except (TimeoutError, httpx.HTTPError, ForbiddenAddress) as e:
            return None, (str(e) or type(e).__name__).encode("utf-8", "replace")

    def _answer(self, body: bytes) -> Response | None:
        dialect = by_name(self._key.dialect)
        try:
            if body.lstrip()[:1] == b"{":
                return dialect.parse_response(body)
            parser = dialect.stream_parser()
            parser.feed(body)
            return parser.finish()
        except WireError:
            return None

    def _error(self, status: int | None, body: bytes) -> LLMUnavailable | LLMRefused:
        said = body.decode("utf-8", "replace")
        if status is not None:
            said = by_name(self._key.dialect).parse_error(body).message
        said = redact_text(said.replace(self._key.key, "[redacted]"))[:300]
        if status is None or status in (401, 408, 429) or status >= 500 or 200 <= status < 300:
            return LLMUnavailable(f"{self._key.host} answered {status or 'nothing'} to the caller's key: {said}")
        return LLMRefused(f"{self._key.host} answered {status} to the caller's key: {said}", status)


@cache
def _public_authorities() -> ssl.SSLContext:
    """Reading them takes twenty milliseconds."""
    return httpx.create_ssl_context(trust_env=False)


def most_tokens(text: str) -> int:
    """At least as many tokens as `text` has: one for 3.5 ASCII characters, one for three bytes of the rest."""
    ascii_chars = sum(map(str.isascii, text))
    rest = len(text.encode("utf-8", "surrogatepass")) - ascii_chars
    return int(ascii_chars / 3.5 + rest / 3) + 1


def request_body(dialect: str, model: str, messages: Sequence[Mapping[str, str]], max_tokens: int, host: str) -> Json:
    """The smallest request of `dialect` that asks `messages`."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    spoken = [m for m in messages if m["role"] != "system"]
    chat: list[dict[str, Any]] = [{"role": m["role"], "content": m["content"]} for m in messages]
    match dialect:
        case "openai_chat":
            limit = "max_completion_tokens" if host.endswith("openai.com") else "max_tokens"
            return {"model": model, "messages": chat, limit: max_tokens}
        case "openai_responses":
            content = [{"role": m["role"], "content": m["content"]} for m in spoken]
            return {
                "model": model,
                "instructions": system,
                "input": content,
                "max_output_tokens": max_tokens,
                "store": False,
            }
        case "anthropic":
            body: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "messages": [dict(m) for m in spoken]}
            return {**body, "system": system} if system else body
        case "gemini":
            roles = {"user": "user", "assistant": "model"}
            contents = [{"role": roles[m["role"]], "parts": [{"text": m["content"]}]} for m in spoken]
            body = {"contents": contents, "generationConfig": {"maxOutputTokens": max_tokens}}
            return {**body, "systemInstruction": {"parts": [{"text": system}]}} if system else body
        case "ollama":
            return {"model": model, "messages": chat, "stream": False, "options": {"num_predict": max_tokens}}
    raise WireError(f"{dialect} is no dialect that can be asked")
