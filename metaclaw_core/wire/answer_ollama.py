"""Answers as Ollama chat: one line of JSON for each event, a last one with the reason and the counts.

Design: the form has fields, not ordered parts: text, thinking and calls are each gathered in one. Arguments are an object.
Thinking is written unless the request says `"think": false`. A stream knows no keep-alive.

Limits: durations are not measured here and are absent. Ollama's only reasons are "stop" and "length".
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from metaclaw_core.model import Json, Request, StopReason, Usage
from metaclaw_core.wire.answer import NDJSON_TYPE, Answers, Call, End, Event, Head, ReasoningDelta, TextDelta
from metaclaw_core.wire.jsonio import dumps, loads_object


class _Ollama:
    def stream(self, head: Head) -> Stream:
        return Stream(head)

    def whole(self, head: Head, said: Sequence[Event], end: End) -> Json:
        message: dict[str, Json] = {
            "role": "assistant",
            "content": "".join(e.text for e in said if isinstance(e, TextDelta)),
        }
        thought = "".join(e.text for e in said if isinstance(e, ReasoningDelta))
        if thought and _wants_thinking(head.request):
            message["thinking"] = thought
        if calls := [e for e in said if isinstance(e, Call)]:
            message["tool_calls"] = [_call(call, index) for index, call in enumerate(calls)]
        return {**_head(head), "message": message, **_end(end)}

    def error(self, status: int, message: str, kind: str, code: str | None) -> Json:
        return {"error": message}


ANSWERS: Final[Answers] = _Ollama()


class Stream:
    media_type = NDJSON_TYPE

    def __init__(self, head: Head) -> None:
        self._head = _head(head)
        self._thinking = _wants_thinking(head.request)
        self._calls = 0

    def start(self) -> bytes:
        return b""

    def feed(self, event: Event) -> bytes:
        if isinstance(event, Call):
            call = _call(event, self._calls)
            self._calls += 1
            return self._line({"content": "", "tool_calls": [call]})
        if not event.text or (isinstance(event, ReasoningDelta) and not self._thinking):
            return b""
        if isinstance(event, TextDelta):
            return self._line({"content": event.text})
        return self._line({"content": "", "thinking": event.text})

    def keep_alive(self) -> bytes:
        return b""

    def finish(self, stop: StopReason, usage: Usage, stop_sequence: str | None = None) -> bytes:
        return self._line({"content": ""}, _end(End(stop, usage)))

    def fail(self, message: str) -> bytes:
        return _line(ANSWERS.error(500, message, "", None))

    def _line(self, said: dict[str, Json], end: Json | None = None) -> bytes:
        return _line({**self._head, "message": {"role": "assistant", **said}, **({"done": False} if end is None else end)})


def _line(value: Json) -> bytes:
    return f"{dumps(value)}\n".encode()


def _wants_thinking(request: Request) -> bool:
    return request.sampling.get("think") is not False


def _head(head: Head) -> dict[str, Json]:
    created = datetime.fromtimestamp(head.created, UTC).isoformat(timespec="microseconds")
    return {"model": head.model, "created_at": created.replace("+00:00", "Z")}


def _call(call: Call, index: int) -> Json:
    arguments = loads_object(call.arguments, f"arguments of {call.name}")
    return {"id": call.id, "function": {"index": index, "name": call.name, "arguments": arguments}}


def _end(end: End) -> dict[str, Json]:
    """Unknown counts are left out."""
    counts = {"prompt_eval_count": end.usage.input_tokens, "eval_count": end.usage.output_tokens}
    reason = "length" if end.stop is StopReason.LENGTH else "stop"
    return {"done": True, "done_reason": reason, **{k: v for k, v in counts.items() if v is not None}}
