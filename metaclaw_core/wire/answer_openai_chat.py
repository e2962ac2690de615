"""Answers as OpenAI chat completions.

Design: the form has fields, not ordered parts: text, reasoning and calls are each gathered in one. Reasoning is in
`reasoning_content`, where open-weight servers put it and clients look for it. As at OpenAI, a stream tells its usage
only where `stream_options.include_usage` asks for it, in a last chunk without choices.

Limits: a client's stop string is not named (the form can't say it); `system_fingerprint` and `service_tier` are absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from metaclaw_core.model import Json, StopReason, Usage
from metaclaw_core.wire.answer import SSE_TYPE, Answers, Call, End, Event, Head, ReasoningDelta, TextDelta, sse, stop_of

KEEP_ALIVE: Final = b": keep-alive\n\n"
_STOP: Final = {
    StopReason.STOP: "stop",
    StopReason.LENGTH: "length",
    StopReason.TOOL_CALLS: "tool_calls",
    StopReason.CONTENT_FILTER: "content_filter",
    StopReason.OTHER: "stop",
}


class _OpenAIChat:
    def stream(self, head: Head) -> Stream:
        return Stream(head)

    def whole(self, head: Head, said: Sequence[Event], end: End) -> Json:
        text = "".join(e.text for e in said if isinstance(e, TextDelta))
        thought = "".join(e.text for e in said if isinstance(e, ReasoningDelta))
        calls = [_call(e) for e in said if isinstance(e, Call)]
        message: dict[str, Json] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if thought:
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = calls
        reason = _STOP[stop_of(end, called=bool(calls))]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {**_head(head, "chat.completion"), "choices": [choice], **_usage(end.usage)}

    def error(self, status: int, message: str, kind: str, code: str | None) -> Json:
        return openai_error(message, kind, code)


ANSWERS: Final[Answers] = _OpenAIChat()


class Stream:
    media_type = SSE_TYPE

    def __init__(self, head: Head) -> None:
        options = head.request.extra.get("stream_options")
        self._counted = isinstance(options, dict) and options.get("include_usage") is True
        self._head = _head(head, "chat.completion.chunk")
        self._calls = 0

    def start(self) -> bytes:
        return self._delta({"role": "assistant", "content": ""})

    def feed(self, event: Event) -> bytes:
        if isinstance(event, Call):
            call = {"index": self._calls, **_call(event)}
            self._calls += 1
            return self._delta({"tool_calls": [call]})
        if not event.text:
            return b""
        return self._delta({"content" if isinstance(event, TextDelta) else "reasoning_content": event.text})

    def keep_alive(self) -> bytes:
        return KEEP_ALIVE

    def finish(self, stop: StopReason, usage: Usage, stop_sequence: str | None = None) -> bytes:
        last = self._delta({}, _STOP[stop_of(End(stop, usage), called=self._calls > 0)])
        if self._counted and (counts := _usage(usage)):
            last += sse({**self._head, "choices": [], **counts})
        return last + b"data: [DONE]\n\n"

    def fail(self, message: str) -> bytes:
        return sse(openai_error(message, "server_error", None))

    def _delta(self, delta: Json, reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return sse({**self._head, "choices": [choice], **({"usage": None} if self._counted else {})})


def openai_error(message: str, kind: str, code: str | None) -> Json:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _head(head: Head, kind: str) -> dict[str, Json]:
    return {"id": head.response_id, "object": kind, "created": int(head.created), "model": head.model}


def _call(call: Call) -> dict[str, Json]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _usage(usage: Usage) -> Mapping[str, Json]:
    """Under its key; nothing where one of the two counts is unknown, for the form insists on both."""
    if usage.input_tokens is None or usage.output_tokens is None:
        return {}
    counts: dict[str, Json] = {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }
    if usage.cached_tokens is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    if usage.reasoning_tokens is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return {"usage": counts}
