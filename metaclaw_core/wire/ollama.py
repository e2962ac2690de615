"""Ollama chat: `POST /api/chat`, newline-delimited JSON unless the client says `"stream": false`.

Design: a message on this wire has fields, not ordered parts; they are read in one fixed order
(thinking, text, images, tool calls). A stream collects the same fields and is read by the same
function, so a reply equals its replay however it was cut into lines. `content: ""` beside a tool
call is filler and no text.

`/api/chat` is a common path of web applications too. Such a body has no `model`, which Ollama always
has, so `model` is required. `/api/generate` (raw prompts) is not served.

Limits: `function.index` of a tool call is its position and is not kept; durations and other fields of
the last line are kept in `extra` as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

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
from metaclaw_core.wire import jsonio
from metaclaw_core.wire.answer_ollama import ANSWERS
from metaclaw_core.wire.base import Dialect, Items, Route, Slot, StreamParser, rest
from metaclaw_core.wire.fields import (
    MAX_ERROR_MESSAGE,
    as_object,
    count,
    optional,
    plain_error,
    required,
    stream_object,
)
from metaclaw_core.wire.splice import slot_ollama
from metaclaw_core.wire.sse import NDJSONSplitter

SAMPLING: Final = frozenset(("format", "think", "logprobs", "top_logprobs"))  # and everything in `options`
_REQUEST: Final = SAMPLING | {"model", "messages", "tools", "stream", "options"}
_RESPONSE: Final = frozenset(("model", "message", "done", "done_reason", "prompt_eval_count", "eval_count", "error"))
_MESSAGE: Final = frozenset(("role", "content", "thinking", "images", "tool_calls"))
_TOOL_MESSAGE: Final = frozenset(("role", "content", "images", "tool_name", "name", "tool_call_id"))
_ROLES: Final = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT, "tool": Role.TOOL}
_STOP: Final = {"stop": StopReason.STOP, "length": StopReason.LENGTH}


class Ollama:
    name = "ollama"
    answers = ANSWERS
    history = "messages"
    runs = False

    def route(self, method: str, path: str) -> Route | None:
        if method == "POST" and path.partition("?")[0].endswith("/api/chat"):
            return Route(self.name)
        return None

    def parse_request(self, body: bytes, path: str) -> Request:
        return self.read_request(jsonio.loads_object(body, "request body"), path)

    def read_request(self, obj: dict[str, Json], path: str) -> Request:
        items = required(obj, "messages", list, "body")
        tools = optional(obj, "tools", list, "body") or []
        stream = optional(obj, "stream", bool, "body")
        options = optional(obj, "options", dict, "body") or {}
        return Request(
            dialect=self.name,
            model=required(obj, "model", str, "body"),
            stream=True if stream is None else stream,
            messages=tuple(_message(as_object(m, f"messages[{i}]"), f"messages[{i}]") for i, m in enumerate(items)),
            tools=tuple(_tool(as_object(t, f"tools[{i}]"), f"tools[{i}]") for i, t in enumerate(tools)),
            sampling={**options, **{k: v for k, v in obj.items() if k in SAMPLING}},
            extra=rest(obj, _REQUEST),
        )

    def read_items(self, items: list[Json]) -> Items:
        return [(_message(as_object(item, f"messages[{i}]"), f"messages[{i}]"),) for i, item in enumerate(items)]

    def parse_response(self, body: bytes) -> Response:
        obj = jsonio.loads_object(body, "response body")
        if "error" in obj and "message" not in obj:
            return Response(message=None, complete=True, error=_error(obj))
        fields = required(obj, "message", dict, "response")
        message = Message(Role.ASSISTANT, tuple(_parts(fields, "message")), rest(fields, _MESSAGE))
        return _response(obj, message, complete=True)

    def stream_parser(self) -> StreamParser:
        return _Stream()

    def parse_error(self, body: bytes) -> ApiError:
        obj = stream_object(body)
        return plain_error(body) if obj is None or "error" not in obj else _error(obj)

    def system_slot(self, body: bytes) -> Slot:
        return slot_ollama(body)


# --- requests and JSON answers ------------------------------------------------------------------


def _message(item: dict[str, Json], where: str) -> Message:
    word = required(item, "role", str, where)
    role = _ROLES.get(word)
    if role is None:
        raise WireError(f"{where}.role is {word[:40]!r}; known are system, user, assistant and tool")
    if role is not Role.TOOL:
        return Message(role, tuple(_parts(item, where)), rest(item, _MESSAGE))
    images = optional(item, "images", list, where)
    result = ToolResult(
        text=optional(item, "content", str, where) or "",
        call_id=optional(item, "tool_call_id", str, where),
        # `name` is what clients sent before `tool_name` existed.
        name=optional(item, "tool_name", str, where) or optional(item, "name", str, where),
        extra={"blocks": images} if images else {},
    )
    return Message(role, (result,), rest(item, _TOOL_MESSAGE))


def _parts(fields: Mapping[str, Json], where: str) -> list[Part]:
    parts: list[Part] = []
    thinking = optional(fields, "thinking", str, where)
    content = optional(fields, "content", str, where)
    if thinking:
        parts.append(Reasoning(thinking))
    if content:
        parts.append(Text(content))
    parts += [Opaque("image", image) for image in optional(fields, "images", list, where) or []]
    for i, call in enumerate(optional(fields, "tool_calls", list, where) or []):
        parts.append(_tool_call(call, f"{where}.tool_calls[{i}]"))
    return parts


def _tool_call(call: Json, where: str) -> ToolCall:
    obj = as_object(call, where)
    function = required(obj, "function", dict, where)
    return ToolCall(
        name=required(function, "name", str, f"{where}.function"),
        arguments=jsonio.dumps(optional(function, "arguments", dict, f"{where}.function") or {}),
        id=optional(obj, "id", str, where) or None,
        extra=rest(obj, ("id", "type", "function")) | rest(function, ("index", "name", "arguments")),
    )


def _tool(raw: dict[str, Json], where: str) -> Tool:
    function = optional(raw, "function", dict, where) or {}
    return Tool(optional(function, "name", str, where) or "", optional(function, "description", str, where), raw)


def _response(obj: Mapping[str, Json], message: Message | None, *, complete: bool) -> Response:
    """`obj` is the whole answer or a stream's fields, later lines over earlier ones."""
    raw_stop = optional(obj, "done_reason", str, "response")
    stop = None if raw_stop is None else _STOP.get(raw_stop, StopReason.OTHER)
    if stop is StopReason.STOP and message is not None and message.tool_calls:
        stop = StopReason.TOOL_CALLS  # Ollama has no word of its own for it
    counts = Usage(input_tokens=count(obj, "prompt_eval_count"), output_tokens=count(obj, "eval_count"))
    return Response(
        message=message,
        complete=complete,
        model=optional(obj, "model", str, "response"),
        stop_reason=stop,
        raw_stop_reason=raw_stop,
        usage=None if counts == Usage() else counts,
        extra=rest(obj, _RESPONSE),
    )


def _error(obj: dict[str, Json]) -> ApiError:
    error = obj.get("error")
    if isinstance(error, dict):  # the shape of its OpenAI-compatible endpoints and of gateways
        message, kind = error.get("message"), error.get("type")
        kind = kind if isinstance(kind, str) else None
    else:
        message, kind = error, None
    return ApiError(message=message[:MAX_ERROR_MESSAGE] if isinstance(message, str) else "", type=kind, raw=obj)


# --- streams ------------------------------------------------------------------------------------


class _Stream:
    def __init__(self) -> None:
        self._lines = NDJSONSplitter()
        self._fields: dict[str, Json] = {}  # of the lines, without `message`
        self._strings: dict[str, list[str]] = {"content": [], "thinking": []}
        self._lists: dict[str, list[Json]] = {"images": [], "tool_calls": []}
        self._beside: dict[str, Json] = {}  # unknown fields of the message
        self._logprobs: list[Json] = []
        self._error: ApiError | None = None

    def feed(self, chunk: bytes) -> None:
        for line in self._lines.feed(chunk):
            self._take(line)

    def finish(self) -> Response:
        for line in self._lines.flush():
            self._take(line)
        complete = self._fields.get("done") is True and self._error is None
        message = {key: "".join(strings) for key, strings in self._strings.items()} | self._lists
        parts = tuple(_parts(message, "message"))
        fields = self._fields | ({"logprobs": self._logprobs} if self._logprobs else {})
        answer = Message(Role.ASSISTANT, parts, self._beside) if parts or complete else None
        return replace(_response(fields, answer, complete=complete), error=self._error)

    def _take(self, line: str) -> None:
        data = stream_object(line)
        if data is None:
            return
        if "error" in data:
            self._error = _error(data)
        message = data.pop("message", None)
        logprobs = data.pop("logprobs", None)
        if isinstance(logprobs, list):
            self._logprobs += logprobs
        for key in ("model", "done_reason"):
            if not isinstance(data.get(key), str):
                data.pop(key, None)
        self._fields |= data
        if not isinstance(message, dict):
            return
        self._beside |= rest(message, _MESSAGE)
        for key, strings in self._strings.items():
            if isinstance(message.get(key), str):
                strings.append(message[key])
        if isinstance(message.get("images"), list):
            self._lists["images"] += message["images"]
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else []:
            try:
                _tool_call(call, "tool_calls")
            except WireError:
                continue  # the contract of a stream: what can't be understood is skipped
            self._lists["tool_calls"].append(call)


OLLAMA: Final[Dialect] = Ollama()
