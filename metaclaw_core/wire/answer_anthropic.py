"""Answers as Anthropic messages.

Design: events become content blocks in their order; a block ends where another kind begins. `message_start` needs counts
that are not known yet: it says 0, as gateways do, and `message_delta` brings the real ones, which clients take over.

A thinking block is written only where the request turned thinking on and did not ask to omit it. Clients send it back in
the tool loop only if it is signed (OpenClaw turns an unsigned one into plain text), so it carries `SIGNATURE`: a constant
by which such a block is recognised as ours.

Limits: Anthropic itself refuses that signature. A conversation that goes on there is answered 400 "Invalid `signature` in
`thinking` block" until the client drops the blocks; OpenClaw does so at once and sends the turn again (tried).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from metaclaw_core.model import Json, Request, StopReason, Usage
from metaclaw_core.wire.answer import (
    SSE_TYPE,
    Answers,
    Call,
    End,
    Event,
    Head,
    ReasoningDelta,
    TextDelta,
    joined,
    sse,
    stop_of,
)
from metaclaw_core.wire.jsonio import loads_object

SIGNATURE: Final = "bWV0YWNsYXcgcG9saWN5"  # "metaclaw policy" in base64
_STOP: Final = {
    StopReason.STOP: "end_turn",
    StopReason.LENGTH: "max_tokens",
    StopReason.TOOL_CALLS: "tool_use",
    StopReason.CONTENT_FILTER: "refusal",
    StopReason.OTHER: "end_turn",
}
_KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class _Anthropic:
    def stream(self, head: Head) -> Stream:
        return Stream(head)

    def whole(self, head: Head, said: Sequence[Event], end: End) -> Json:
        content = [_block(e, whole=True) for e in joined(said, reasoning=_wants_thinking(head.request))]
        stop = _stop(end, called=any(isinstance(e, Call) for e in said))
        return _message(head, content, stop, _usage(end.usage))

    def error(self, status: int, message: str, kind: str, code: str | None) -> Json:
        kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}}


ANSWERS: Final[Answers] = _Anthropic()


class Stream:
    media_type = SSE_TYPE

    def __init__(self, head: Head) -> None:
        self._head = head
        self._thinking = _wants_thinking(head.request)
        self._index = 0
        self._open: type[Event] | None = None  # the kind of the block that is open
        self._called = False

    def start(self) -> bytes:
        nothing = {"input_tokens": 0, "output_tokens": 0}
        message = _message(self._head, [], {"stop_reason": None, "stop_sequence": None}, nothing)
        return _event("message_start", message=message)

    def feed(self, event: Event) -> bytes:
        if isinstance(event, Call):
            self._called = True
            delta: Json = {"type": "input_json_delta", "partial_json": event.arguments}
        elif not event.text or (isinstance(event, ReasoningDelta) and not self._thinking):
            return b""
        elif isinstance(event, TextDelta):
            delta = {"type": "text_delta", "text": event.text}
        else:
            delta = {"type": "thinking_delta", "thinking": event.text}
        out = b""
        if self._open is not type(event) or isinstance(event, Call):
            out = self._close()
            self._open = type(event)
            out += _event("content_block_start", index=self._index, content_block=_block(event, whole=False))
        out += _event("content_block_delta", index=self._index, delta=delta)
        return out + self._close() if isinstance(event, Call) else out

    def keep_alive(self) -> bytes:
        return _event("ping")

    def finish(self, stop: StopReason, usage: Usage, stop_sequence: str | None = None) -> bytes:
        ending = _stop(End(stop, usage, stop_sequence), called=self._called)
        return self._close() + _event("message_delta", delta=ending, usage=_usage(usage)) + _event("message_stop")

    def fail(self, message: str) -> bytes:
        return sse(ANSWERS.error(500, message, "", None), "error")

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        out = b""
        if self._open is ReasoningDelta:
            signature = {"type": "signature_delta", "signature": SIGNATURE}
            out = _event("content_block_delta", index=self._index, delta=signature)
        out += _event("content_block_stop", index=self._index)
        self._open = None
        self._index += 1
        return out


def _wants_thinking(request: Request) -> bool:
    thinking = request.sampling.get("thinking")
    return (
        isinstance(thinking, dict)
        and thinking.get("type") in ("enabled", "adaptive")
        and thinking.get("display") != "omitted"
    )


def _event(name: str, **fields: Json) -> bytes:
    return sse({"type": name, **fields}, name)


def _message(head: Head, content: list[Json], stop: Json, usage: Json) -> Json:
    return {
        "id": head.response_id,
        "type": "message",
        "role": "assistant",
        "model": head.model,
        "content": content,
        **stop,
        "usage": usage,
    }


def _block(event: Event, *, whole: bool) -> Json:
    """The content block, or the empty one that opens it in a stream."""
    if isinstance(event, Call):
        given = loads_object(event.arguments, f"arguments of {event.name}") if whole else {}
        return {"type": "tool_use", "id": event.id, "name": event.name, "input": given}
    text = event.text if whole else ""
    if isinstance(event, TextDelta):
        return {"type": "text", "text": text}
    return {"type": "thinking", "thinking": text, "signature": SIGNATURE if whole else ""}


def _stop(end: End, *, called: bool) -> dict[str, Json]:
    reason = stop_of(end, called=called)
    if reason is StopReason.STOP and end.stop_sequence is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": end.stop_sequence}
    return {"stop_reason": _STOP[reason], "stop_sequence": None}


def _usage(usage: Usage) -> Json:
    """Anthropic counts cache reads and writes apart from `input_tokens`."""
    read, written = usage.cached_tokens, usage.cache_write_tokens
    return {
        "input_tokens": None if usage.input_tokens is None else usage.input_tokens - (read or 0) - (written or 0),
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": read,
        "output_tokens": usage.output_tokens,
    }
