"""Answers as OpenAI Responses.

Design: events become output items in their order; an item ends where another kind begins, a call is an item of its own.
A stream tells each of its steps as it happens, with the sequence numbers and indexes that OpenAI's client checks, and ends
with the same response object that the JSON answer is. Item ids are made from the response's: they are its own among all
ids, and the same whenever the answer is written again.

Reasoning is an item with a summary, and only for a client that keeps the history itself (`store` false) and does not ask for
encrypted reasoning. Any other sends the item back to its provider by id; should that be OpenAI, it answers "Item 'rs_…' not
found" and the turn is dead, while an unknown `previous_response_id` makes the client send its history again. Both were
tried with OpenClaw.

Limits: the response object echoes what the request set but for `instructions` and `tools`, which are 50 kB that would
stand in a stream three times. A call of a tool of type "custom" is answered as a function call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
)
from metaclaw_core.wire.answer_openai_chat import KEEP_ALIVE, openai_error

_INCOMPLETE: Final = {StopReason.LENGTH: "max_output_tokens", StopReason.CONTENT_FILTER: "content_filter"}
# What the response object says of the request, and what it says where the request said nothing.
_ECHO: Final[Mapping[str, Json]] = {
    "background": False,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "parallel_tool_calls": True,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "default",
    "store": True,
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "top_logprobs": 0,
    "top_p": None,
    "truncation": "disabled",
    "user": None,
}


class _OpenAIResponses:
    def stream(self, head: Head) -> Stream:
        return Stream(head)

    def whole(self, head: Head, said: Sequence[Event], end: End) -> Json:
        suffix = _suffix(head.response_id)
        told = joined(said, reasoning=_wants_reasoning(head.request))
        items = [_item(event, _id(event, suffix, index)) for index, event in enumerate(told)]
        if items and end.stop in _INCOMPLETE:
            _cut(items[-1])
        return _response(head, items, end=end)

    def error(self, status: int, message: str, kind: str, code: str | None) -> Json:
        return openai_error(message, kind, code)


ANSWERS: Final[Answers] = _OpenAIResponses()


class Stream:
    media_type = SSE_TYPE

    def __init__(self, head: Head) -> None:
        self._head = head
        self._suffix = _suffix(head.response_id)
        self._reasoning = _wants_reasoning(head.request)
        self._number = 0  # of the next event
        self._items: list[dict[str, Json]] = []
        self._open: TextDelta | ReasoningDelta | None = None  # kind of the item that is open
        self._pieces: list[str] = []  # what it holds so far

    def start(self) -> bytes:
        response = _response(self._head, [])
        return self._event("response.created", response=response) + self._event("response.in_progress", response=response)

    def feed(self, event: Event) -> bytes:
        if isinstance(event, Call):
            return self._close() + self._call(event)
        if not event.text or (isinstance(event, ReasoningDelta) and not self._reasoning):
            return b""
        out = b"" if type(self._open) is type(event) else self._close() + self._begin(event)
        self._pieces.append(event.text)
        at = self._at(event)
        if isinstance(event, TextDelta):
            return out + self._event("response.output_text.delta", **at, delta=event.text, logprobs=[])
        return out + self._event("response.reasoning_summary_text.delta", **at, delta=event.text)

    def keep_alive(self) -> bytes:
        return KEEP_ALIVE

    def finish(self, stop: StopReason, usage: Usage, stop_sequence: str | None = None) -> bytes:
        out = self._close(cut=stop in _INCOMPLETE)
        response = _response(self._head, self._items, end=End(stop, usage))
        return out + self._event(f"response.{response['status']}", response=response)

    def fail(self, message: str) -> bytes:
        out = self._close(cut=True)
        error = {"code": "server_error", "message": message}
        return out + self._event("response.failed", response=_response(self._head, self._items, error=error))

    # --- items ---

    def _begin(self, event: TextDelta | ReasoningDelta) -> bytes:
        self._open = event
        text, at = isinstance(event, TextDelta), self._at(event)
        empty = _item(type(event)(""), at["item_id"])
        part = empty["content" if text else "summary"][0]
        bare = {**empty, "content": [], "status": "in_progress"} if text else {**empty, "summary": []}
        out = self._event("response.output_item.added", output_index=at["output_index"], item=bare)
        return out + self._event(f"response.{'content' if text else 'reasoning_summary'}_part.added", **at, part=part)

    def _close(self, *, cut: bool = False) -> bytes:
        """The end of the open item, if there is one."""
        opened = self._open
        if opened is None:
            return b""
        whole, at = type(opened)("".join(self._pieces)), self._at(opened)
        item = _item(whole, at["item_id"])
        if isinstance(whole, TextDelta):
            part = item["content"][0]
            out = self._event("response.output_text.done", **at, text=whole.text, logprobs=[])
            out += self._event("response.content_part.done", **at, part=part)
        else:
            part = item["summary"][0]
            out = self._event("response.reasoning_summary_text.done", **at, text=whole.text)
            out += self._event("response.reasoning_summary_part.done", **at, part=part)
        self._open, self._pieces = None, []
        if cut:
            _cut(item)
        return out + self._done(item)

    def _call(self, call: Call) -> bytes:
        index = len(self._items)
        item = _item(call, _id(call, self._suffix, index))
        bare = {**item, "arguments": "", "status": "in_progress"}
        at = {"item_id": item["id"], "output_index": index}
        out = self._event("response.output_item.added", output_index=index, item=bare)
        out += self._event("response.function_call_arguments.delta", **at, delta=call.arguments)
        out += self._event("response.function_call_arguments.done", **at, arguments=call.arguments)
        return out + self._done(item)

    def _done(self, item: dict[str, Json]) -> bytes:
        index = len(self._items)
        self._items.append(item)
        return self._event("response.output_item.done", output_index=index, item=item)

    def _at(self, event: TextDelta | ReasoningDelta) -> dict[str, Json]:
        """The place of the open item's only part."""
        index = len(self._items)
        part = "content_index" if isinstance(event, TextDelta) else "summary_index"
        return {"item_id": _id(event, self._suffix, index), "output_index": index, part: 0}

    def _event(self, name: str, /, **fields: Json) -> bytes:
        number, self._number = self._number, self._number + 1
        return sse({"type": name, "sequence_number": number, **fields}, name)


def _wants_reasoning(request: Request) -> bool:
    include = request.extra.get("include")
    sealed = isinstance(include, list) and "reasoning.encrypted_content" in include
    return request.extra.get("store") is False and not sealed


def _suffix(response_id: str) -> str:
    return response_id.removeprefix("resp_")[-48:]  # an id has at most 64 characters


def _id(event: Event, suffix: str, index: int) -> str:
    kind = "fc" if isinstance(event, Call) else "msg" if isinstance(event, TextDelta) else "rs"
    return f"{kind}_{suffix}_{index}"


def _item(event: Event, id: str) -> dict[str, Json]:
    if isinstance(event, Call):
        return {
            "id": id,
            "type": "function_call",
            "status": "completed",
            "call_id": event.id,
            "name": event.name,
            "arguments": event.arguments,
        }
    if isinstance(event, ReasoningDelta):
        return {"id": id, "type": "reasoning", "summary": [{"type": "summary_text", "text": event.text}]}
    part = {"type": "output_text", "text": event.text, "annotations": [], "logprobs": []}
    return {"id": id, "type": "message", "status": "completed", "role": "assistant", "content": [part]}


def _cut(item: dict[str, Json]) -> None:
    """Mark a text that has no end. A call is written whole, and of reasoning nobody says it."""
    if item["type"] == "message":
        item["status"] = "incomplete"


def _response(head: Head, output: Sequence[Json], *, end: End | None = None, error: Json = None) -> dict[str, Json]:
    """The response object: failed with an error, at its end, else in progress."""
    request = head.request
    given = {**request.sampling, **request.extra}
    reason = _INCOMPLETE.get(end.stop) if end is not None else None
    if error is not None:
        status = "failed"
    else:
        status = "in_progress" if end is None else "completed" if reason is None else "incomplete"
    return {
        "id": head.response_id,
        "object": "response",
        "created_at": int(head.created),
        "status": status,
        "error": error,
        "incomplete_details": None if reason is None else {"reason": reason},
        "instructions": None,
        "model": head.model,
        "output": list(output),
        "previous_response_id": request.previous_response_id,
        "metadata": dict(request.metadata),
        "tools": [],
        "usage": None if end is None else _usage(end.usage),
        **{key: default if given.get(key) is None else given[key] for key, default in _ECHO.items()},
    }


def _usage(usage: Usage) -> Json:
    """None where one of the two counts is unknown, for the form insists on both; so it does in the details."""
    if usage.input_tokens is None or usage.output_tokens is None:
        return None
    cached, thought = usage.cached_tokens, usage.reasoning_tokens
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": None if cached is None else {"cached_tokens": cached},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": None if thought is None else {"reasoning_tokens": thought},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }
