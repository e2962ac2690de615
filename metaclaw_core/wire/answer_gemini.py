"""Answers as Gemini's `GenerateContentResponse`.

Design: every record of a stream is a response of its own with the newest parts; the last one has the finish reason and the
counts. With `alt=sse` in the request's query the records are server-sent events, without it the elements of one JSON
array. A call keeps its id. Thoughts are written only where `thinkingConfig.includeThoughts` asks for them.

A keep-alive is a blank line: Google's Python client parses every other line as JSON, a comment too. An error in the middle
of server-sent events is said twice: as a record, and as a bare line, the way Google says it and all that its JavaScript
client takes for an error.

Limits: no `thoughtSignature`; a client that takes the conversation to Gemini 3 must do what Google says of calls made by
other models. `candidatesTokenCount` is what the output has beyond the thoughts, as Google counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Final
from urllib.parse import parse_qs, urlsplit

from metaclaw_core.model import Json, Request, StopReason, Usage
from metaclaw_core.wire.answer import (
    JSON_TYPE,
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
)
from metaclaw_core.wire.jsonio import dumps, loads_object

_STOP: Final = {
    StopReason.STOP: "STOP",
    StopReason.LENGTH: "MAX_TOKENS",
    StopReason.TOOL_CALLS: "STOP",  # the form has no word of its own for it
    StopReason.CONTENT_FILTER: "SAFETY",
    StopReason.OTHER: "OTHER",
}
_STATUS: Final = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ABORTED",
    413: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class _Gemini:
    def stream(self, head: Head) -> Stream:
        query = parse_qs(urlsplit(head.path).query)
        return Stream(head, array=bool(head.path) and query.get("alt") != ["sse"])

    def whole(self, head: Head, said: Sequence[Event], end: End) -> Json:
        return _record(head, [_part(e) for e in joined(said, reasoning=_wants_thoughts(head.request))], end)

    def error(self, status: int, message: str, kind: str, code: str | None) -> Json:
        name = _STATUS.get(status, "INVALID_ARGUMENT" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "INTERNAL")
        return {"error": {"code": status, "message": message, "status": name}}


ANSWERS: Final[Answers] = _Gemini()


class Stream:
    def __init__(self, head: Head, *, array: bool) -> None:
        self.media_type = JSON_TYPE if array else SSE_TYPE
        self._head = head
        self._array = array
        self._thoughts = _wants_thoughts(head.request)
        self._before = "["  # what stands before the next element of the array

    def start(self) -> bytes:
        return b""

    def feed(self, event: Event) -> bytes:
        if not isinstance(event, Call) and not event.text:
            return b""
        if isinstance(event, ReasoningDelta) and not self._thoughts:
            return b""
        return self._write(_record(self._head, [_part(event)], None))

    def keep_alive(self) -> bytes:
        return b"\n"

    def finish(self, stop: StopReason, usage: Usage, stop_sequence: str | None = None) -> bytes:
        last = self._write(_record(self._head, [{"text": ""}], End(stop, usage)))
        return last + b"]" if self._array else last

    def fail(self, message: str) -> bytes:
        error = ANSWERS.error(500, message, "", None)
        return self._write(error) + (b"]" if self._array else f"{dumps(error)}\n".encode())

    def _write(self, record: Json) -> bytes:
        if not self._array:
            return sse(record)
        before, self._before = self._before, ",\r\n"
        return (before + dumps(record)).encode()


def _wants_thoughts(request: Request) -> bool:
    config = request.sampling.get("thinkingConfig", request.sampling.get("thinking_config"))
    return isinstance(config, dict) and bool(config.get("includeThoughts", config.get("include_thoughts")))


def _part(event: Event) -> Json:
    if isinstance(event, Call):
        arguments = loads_object(event.arguments, f"arguments of {event.name}")
        return {"functionCall": {"id": event.id, "name": event.name, "args": arguments}}
    return {"text": event.text} if isinstance(event, TextDelta) else {"text": event.text, "thought": True}


def _record(head: Head, parts: Sequence[Json], end: End | None) -> Json:
    candidate: dict[str, Json] = {"content": {"role": "model", "parts": parts}, "index": 0}
    record: dict[str, Json] = {"candidates": [candidate], "modelVersion": head.model, "responseId": head.response_id}
    if end is not None:
        candidate["finishReason"] = _STOP[end.stop]
        record["usageMetadata"] = _usage(end.usage)
    return record


def _usage(usage: Usage) -> Json:
    """Unknown counts are left out."""
    read, written, thought = usage.input_tokens, usage.output_tokens, usage.reasoning_tokens
    counts = {
        "promptTokenCount": read,
        "cachedContentTokenCount": usage.cached_tokens,
        "candidatesTokenCount": None if written is None else written - (thought or 0),
        "thoughtsTokenCount": thought,
        "totalTokenCount": None if read is None or written is None else read + written,
    }
    return {key: count for key, count in counts.items() if count is not None}
