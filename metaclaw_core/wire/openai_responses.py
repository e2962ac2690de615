"""OpenAI Responses: a flat list of items, read as messages.

Design: the assistant's items that stand between two of anybody else's (reasoning, message, calls) are
one ASSISTANT message, so that an answer's `output` and the same items replayed in a later `input`
give equal parts. For the same reason the ids and states of items, which a client may leave out when
it replays them, are not in the parts: they are listed in order under `Message.extra["items"]`.
A call that the provider executes itself (web search …), an item_reference and any type we don't know
stay raw as `Opaque` in the assistant's message; what a client answers (`*_call_output`) is a TOOL message.

A stream's terminal event repeats the whole answer and is believed; the items gathered on the way are
used where the stream was cut, and where the terminal event came with an empty `output` (Codex).

Limits: with `previous_response_id` or `conversation` the history is at the provider and not in the
request. The answer's echo of the request (`instructions`, `tools`) is dropped. Provider-executed
`*_call_output` items in an answer are `Opaque` there, but TOOL messages when replayed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

from metaclaw_core.errors import WireError
from metaclaw_core.model import (
    ApiError,
    Json,
    Message,
    Opaque,
    Part,
    Reasoning,
    Request,
    Response,
    Role,
    StopReason,
    Text,
    Tool,
    ToolCall,
    ToolResult,
    Usage,
)
from metaclaw_core.wire.answer_openai_responses import ANSWERS
from metaclaw_core.wire.base import Items, Route, Slot, StreamParser, rest
from metaclaw_core.wire.fields import count, optional, required
from metaclaw_core.wire.jsonio import loads_object
from metaclaw_core.wire.openai_common import (
    api_error,
    content_parts,
    inner,
    objects,
    parse_error,
    result_text,
)
from metaclaw_core.wire.openai_responses_stream import Events
from metaclaw_core.wire.splice import slot_openai_responses
from metaclaw_core.wire.sse import SSESplitter

_PATH = "/responses"
_ROLES = {"system": Role.SYSTEM, "developer": Role.DEVELOPER, "user": Role.USER, "assistant": Role.ASSISTANT}
# fmt: off
_SAMPLING = frozenset((
    "temperature", "top_p", "top_logprobs", "seed", "stop", "frequency_penalty", "presence_penalty",
    "max_output_tokens", "max_tool_calls", "tool_choice", "parallel_tool_calls", "reasoning", "text", "truncation",
))
# fmt: on
_REQUEST = _SAMPLING | {"model", "input", "instructions", "stream", "tools", "previous_response_id", "metadata"}
_RESPONSE = ("id", "object", "model", "output", "usage", "error", "instructions", "tools")

_CALLS = {"function_call": "arguments", "custom_tool_call": "input"}  # the field with what the model emitted
# Opaque to us, but the client has to act on them.
_CLIENT_CALLS = frozenset(("computer_call", "local_shell_call", "apply_patch_call"))
_RESULT = "_call_output"
_UNFINISHED = ("queued", "in_progress")
_INCOMPLETE = {
    "max_output_tokens": StopReason.LENGTH,
    "max_tokens": StopReason.LENGTH,
    "content_filter": StopReason.CONTENT_FILTER,
}


class OpenAIResponses:
    name = "openai_responses"
    answers = ANSWERS
    history = "input"
    runs = True

    def route(self, method: str, path: str) -> Route | None:
        if method == "POST" and path.partition("?")[0].endswith(_PATH):
            return Route(self.name)
        return None

    def parse_request(self, body: bytes, path: str) -> Request:
        return self.read_request(loads_object(body, "request body"), path)

    def read_request(self, obj: dict[str, Json], path: str) -> Request:
        if obj.get("input") is None and not any(obj.get(k) for k in ("instructions", "previous_response_id", "prompt")):
            raise WireError("request body has no input")
        messages = list(_messages(obj.get("input")))
        instructions = optional(obj, "instructions", str, "body")
        if instructions is not None:
            messages.insert(0, Message(Role.SYSTEM, (Text(instructions),) if instructions else ()))
        return Request(
            dialect=self.name,
            model=optional(obj, "model", str, "body"),
            stream=optional(obj, "stream", bool, "body") or False,
            messages=tuple(messages),
            tools=tuple(
                Tool(optional(t, "name", str, at) or "", optional(t, "description", str, at), t)
                for t, at in objects(obj.get("tools"), "tools")
            ),
            sampling={k: v for k, v in obj.items() if k in _SAMPLING},
            previous_response_id=optional(obj, "previous_response_id", str, "body"),
            metadata=optional(obj, "metadata", dict, "body") or {},
            extra=rest(obj, _REQUEST),
        )

    def read_items(self, items: list[Json]) -> Items:
        out: Items = []
        run: list[_Located] = []
        for item, where in objects(items, "input"):
            other = _others(item, where)
            if other is not None:
                _close(out, run)
                out.append((other,))
            else:
                run.append((item, where))
        _close(out, run)
        return out

    def parse_response(self, body: bytes) -> Response:
        obj = loads_object(body, "response body")
        if not isinstance(obj.get("output"), list):
            if not obj.get("error"):
                raise WireError("response body has no output")
            obj["output"] = []
        return _response(obj, _answer(objects(obj["output"], "output")), complete=obj.get("status") not in _UNFINISHED)

    def stream_parser(self) -> StreamParser:
        return _Stream()

    def parse_error(self, body: bytes) -> ApiError:
        return parse_error(body)

    def system_slot(self, body: bytes) -> Slot:
        return slot_openai_responses(body)


OPENAI_RESPONSES = OpenAIResponses()


# --- items --------------------------------------------------------------------------------------

type _Located = tuple[dict[str, Json], str]  # an object and its place, for the error


def _messages(value: Json) -> Iterator[Message]:
    if isinstance(value, str):
        yield Message(Role.USER, (Text(value),) if value else ())
        return
    run: list[_Located] = []  # the assistant's items since anybody else's
    for item, where in objects(value, "input"):
        other = _others(item, where)
        if other is None:
            run.append((item, where))
            continue
        if run:
            yield _assistant(run)
            run = []
        yield other
    if run:
        yield _assistant(run)


def _close(out: Items, run: list[_Located]) -> None:
    """The items of `run` are one message, which begins with the first."""
    if run:
        out += [(_assistant(run),), *[None] * (len(run) - 1)]
        run.clear()


def _kind(item: Mapping[str, Json], where: str) -> str:
    kind = optional(item, "type", str, where)
    if kind is not None:
        return kind
    return "message" if "role" in item else "item_reference"  # the two types whose name may be left out


def _others(item: dict[str, Json], where: str) -> Message | None:
    """The message of an item that isn't the assistant's; None if it is."""
    kind = _kind(item, where)
    if kind == "message":
        word = item.get("role")
        role = _ROLES.get(word) if isinstance(word, str) else None
        if role is None:
            raise WireError(f"{where}.role is not one of {', '.join(_ROLES)}")
        if role is Role.ASSISTANT:
            return None
        return Message(
            role, tuple(content_parts(item.get("content"), f"{where}.content")), rest(item, ("type", "role", "content"))
        )
    if kind.endswith(_RESULT):
        return _result(item, kind, where)
    if kind == "mcp_approval_response":
        return Message(Role.USER, (Opaque(kind, item),))
    return None


def _result(item: dict[str, Json], kind: str, where: str) -> Message:
    output = item.get("output")
    extra: dict[str, Json] = {} if kind == "function_call_output" else {"type": kind}
    if isinstance(output, dict) and kind not in ("function_call_output", "custom_tool_call_output"):
        text, blocks = "", [output]  # a screenshot
    else:
        text, blocks = result_text(output, f"{where}.output")
    if blocks:
        extra["blocks"] = blocks
    result = ToolResult(text, call_id=optional(item, "call_id", str, where), extra=extra)
    return Message(Role.TOOL, (result,), rest(item, ("type", "call_id", "output")))


def _answer(items: Iterable[_Located]) -> Message | None:
    run = list(items)
    return _assistant(run) if run else None


def _assistant(run: Iterable[_Located]) -> Message:
    parts: list[Part] = []
    items: list[dict[str, Json]] = []
    for item, where in run:
        found, state = _item(item, where)
        parts += found
        items.append(state)
    return Message(Role.ASSISTANT, tuple(parts), {"items": items} if any(len(i) > 1 for i in items) else {})


def _item(item: dict[str, Json], where: str) -> tuple[list[Part], dict[str, Json]]:
    """The parts of one of the assistant's items, and its type and state (id, status, phase …)."""
    kind = _kind(item, where)
    if kind == "message":
        return list(content_parts(item.get("content"), f"{where}.content")), {
            "type": kind,
            **rest(item, ("type", "role", "content")),
        }
    if kind == "reasoning":
        texts = [
            optional(part, "text", str, at) or ""
            for key in ("summary", "content")
            for part, at in objects(item.get(key), f"{where}.{key}")
        ]
        thought = Reasoning("\n\n".join(texts), opaque=optional(item, "encrypted_content", str, where))
        return [thought], {"type": kind, **rest(item, ("type", "summary", "content", "encrypted_content"))}
    if kind in _CALLS:
        name = required(item, "name", str, where)
        key = _CALLS[kind]
        extra = rest(item, ("type", "id", "status", "call_id", "name", key))
        if kind != "function_call":
            extra = {"type": kind, **extra}
        arguments, call_id = optional(item, key, str, where), optional(item, "call_id", str, where)
        state: dict[str, Json] = {k: item[k] for k in ("id", "status") if k in item}
        return [ToolCall(name, arguments or "", call_id, extra)], {"type": kind, **state}
    return [Opaque(kind, item)], {"type": kind}


# --- answers ------------------------------------------------------------------------------------


def _response(obj: Mapping[str, Json], message: Message | None, *, complete: bool) -> Response:
    """Raises WireError where a field other than `output` has a wrong type."""
    status = optional(obj, "status", str, "body")
    reason = inner(obj, "incomplete_details").get("reason")
    usage = optional(obj, "usage", dict, "body")
    error = obj.get("error")
    extra = rest(obj, _RESPONSE)
    if usage:
        extra["usage"] = usage
    return Response(
        message,
        complete=complete,
        id=optional(obj, "id", str, "body"),
        model=optional(obj, "model", str, "body"),
        stop_reason=_stop_reason(status, reason, message),
        raw_stop_reason=reason if isinstance(reason, str) else None if status in _UNFINISHED else status,
        usage=_usage(usage or {}),
        error=api_error(error, error) if error else None,
        extra=extra,
    )


def _stop_reason(status: str | None, reason: Json, message: Message | None) -> StopReason | None:
    if status is None or status in _UNFINISHED:
        return None
    if status == "incomplete":
        return _INCOMPLETE.get(reason, StopReason.OTHER) if isinstance(reason, str) else StopReason.OTHER
    if status != "completed":  # failed, cancelled
        return StopReason.OTHER
    parts = message.parts if message is not None else ()
    if any(isinstance(p, ToolCall) or (isinstance(p, Opaque) and p.type in _CLIENT_CALLS) for p in parts):
        return StopReason.TOOL_CALLS
    if any(isinstance(p, Text) and p.extra.get("type") == "refusal" for p in parts):
        return StopReason.CONTENT_FILTER
    return StopReason.STOP


def _usage(raw: Mapping[str, Json]) -> Usage | None:
    usage = Usage(
        input_tokens=count(raw, "input_tokens"),
        output_tokens=count(raw, "output_tokens"),
        cached_tokens=count(inner(raw, "input_tokens_details"), "cached_tokens"),
        cache_write_tokens=count(inner(raw, "input_tokens_details"), "cache_write_tokens"),
        reasoning_tokens=count(inner(raw, "output_tokens_details"), "reasoning_tokens"),
    )
    return None if usage == Usage() else usage


# --- streams ------------------------------------------------------------------------------------


class _Stream:
    def __init__(self) -> None:
        self._events = SSESplitter()
        self._seen = Events()

    def feed(self, chunk: bytes) -> None:
        for event in self._events.feed(chunk):
            self._seen.add(event)

    def finish(self) -> Response:
        for event in self._events.flush():
            self._seen.add(event)
        seen, message = self._seen, None
        output = seen.head.get("output")
        if seen.terminal and isinstance(output, list) and output:
            with suppress(WireError):  # then what was gathered on the way has to do
                message = _answer(objects(output, "output"))
        if message is None:
            message = _answer((item, "item") for item in seen.items() if _readable(item))
        response = _response(seen.head, message, complete=seen.terminal)
        return response if response.error or seen.error is None else replace(response, error=seen.error)


def _readable(item: dict[str, Json]) -> bool:
    try:
        _item(item, "item")
    except WireError:
        return False
    return True
