"""Anthropic Messages: `POST …/v1/messages`, as an API key or a subscription sends it.

Design: one function reads a content block, whether it comes from a request, a JSON answer or a
stream. The stream parser only rebuilds the block: every delta type appends its strings to the block
field of the same name, so that a delta type we have never seen still fills its block.

A message with `tool_result` blocks becomes one TOOL message for each and, at the place of its first
other block, one message with the rest. Text without characters is dropped: clients do not send the
empty block of a stream back, and a reply must equal its replay.

Limits: a streamed tool call keeps the string the model emitted, its replay is the compact JSON of the
object, so the two are equal as JSON and not as text. `output_tokens` of `message_start` is a running
count and is not reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from metaclaw_core.wire.answer_anthropic import ANSWERS
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
from metaclaw_core.wire.splice import slot_anthropic
from metaclaw_core.wire.sse import Event, SSESplitter

SAMPLING: Final = frozenset(
    ("max_tokens", "temperature", "top_p", "top_k", "stop_sequences", "thinking", "tool_choice")
) | {"output_config", "output_format"}
_REQUEST: Final = SAMPLING | {"model", "messages", "system", "tools", "stream", "metadata"}
_RESPONSE: Final = frozenset(("id", "type", "role", "model", "content", "stop_reason", "usage"))
_USAGE: Final = frozenset(
    ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"),
)
_MESSAGE: Final = frozenset(("role", "content"))
_TOOL_RESULT: Final = frozenset(("type", "tool_use_id", "content", "is_error"))
_ROLES: Final = {"user": Role.USER, "assistant": Role.ASSISTANT, "system": Role.SYSTEM}
_STOP: Final = {
    "end_turn": StopReason.STOP,
    "stop_sequence": StopReason.STOP,
    "tool_use": StopReason.TOOL_CALLS,
    "max_tokens": StopReason.LENGTH,
    "model_context_window_exceeded": StopReason.LENGTH,
    "refusal": StopReason.CONTENT_FILTER,
}


class Anthropic:
    name = "anthropic"
    answers = ANSWERS
    history = "messages"
    runs = False

    def route(self, method: str, path: str) -> Route | None:
        if method == "POST" and path.partition("?")[0].endswith("/v1/messages"):
            return Route(self.name)
        return None

    def parse_request(self, body: bytes, path: str) -> Request:
        return self.read_request(jsonio.loads_object(body, "request body"), path)

    def read_request(self, obj: dict[str, Json], path: str) -> Request:
        messages: list[Message] = []
        system = _parts(obj.get("system"), "system")
        if system:
            messages.append(Message(Role.SYSTEM, tuple(system)))
        for i, item in enumerate(required(obj, "messages", list, "body")):
            messages += _messages(item, f"messages[{i}]")
        tools = optional(obj, "tools", list, "body") or []
        return Request(
            dialect=self.name,
            model=optional(obj, "model", str, "body"),
            stream=bool(optional(obj, "stream", bool, "body")),
            messages=tuple(messages),
            tools=tuple(_tool(as_object(t, f"tools[{i}]"), f"tools[{i}]") for i, t in enumerate(tools)),
            sampling={k: v for k, v in obj.items() if k in SAMPLING},
            metadata=optional(obj, "metadata", dict, "body") or {},
            extra=rest(obj, _REQUEST),
        )

    def read_items(self, items: list[Json]) -> Items:
        return [tuple(_messages(item, f"messages[{i}]")) for i, item in enumerate(items)]

    def parse_response(self, body: bytes) -> Response:
        obj = jsonio.loads_object(body, "response body")
        if obj.get("type") == "error":
            return Response(message=None, complete=True, error=_error(obj))
        required(obj, "content", list, "response")
        usage = optional(obj, "usage", dict, "response")
        raw_stop = optional(obj, "stop_reason", str, "response")
        return Response(
            message=Message(Role.ASSISTANT, tuple(_parts(obj["content"], "content"))),
            complete=True,
            id=optional(obj, "id", str, "response"),
            model=optional(obj, "model", str, "response"),
            stop_reason=_stop_reason(raw_stop),
            raw_stop_reason=raw_stop,
            usage=_usage(usage),
            extra=_response_extra(obj, usage),
        )

    def stream_parser(self) -> StreamParser:
        return _Stream()

    def parse_error(self, body: bytes) -> ApiError:
        obj = stream_object(body)
        return plain_error(body) if obj is None or "error" not in obj else _error(obj)

    def system_slot(self, body: bytes) -> Slot:
        return slot_anthropic(body)


# --- requests and JSON answers ------------------------------------------------------------------


def _messages(value: Json, where: str) -> list[Message]:
    item = as_object(value, where)
    word = required(item, "role", str, where)
    role = _ROLES.get(word)
    if role is None:
        raise WireError(f"{where}.role is {word[:40]!r}; known are user, assistant and system")
    content = item.get("content")
    if content is None:
        raise WireError(f"{where}.content is missing")
    parts = _parts(content, f"{where}.content")
    extra = rest(item, _MESSAGE) if len(item) > 2 else {}
    if role is not Role.USER or not any(isinstance(p, ToolResult) for p in parts):
        return [Message(role, tuple(parts), extra)]
    others = tuple(p for p in parts if not isinstance(p, ToolResult))
    out: list[Message] = []
    for part in parts:
        if isinstance(part, ToolResult):
            out.append(Message(Role.TOOL, (part,), {} if out else extra))
        elif part is others[0]:
            out.append(Message(role, others, {} if out else extra))
    return out


def _parts(content: Json, where: str) -> list[Part]:
    if content is None:
        return []
    if isinstance(content, str):
        return [Text(content)] if content else []
    if not isinstance(content, list):
        raise WireError(f"{where} is {type(content).__name__}, neither a string nor a list")
    return [p for i, b in enumerate(content) if (p := _part(b, f"{where}[{i}]")) is not None]


def _part(value: Json, where: str, emitted: str | None = None) -> Part | None:
    """One content block; None if there is nothing in it. `emitted` is a streamed call's own argument string."""
    block = as_object(value, where)
    kind = required(block, "type", str, where)
    if kind == "text":
        text = required(block, "text", str, where)
        if len(block) == 2:  # the usual case, and there are hundreds of them in a long request
            return Text(text) if text else None
        # `citations` is null, [] or absent where there are none, by client and by API version.
        extra = {k: v for k, v in block.items() if k not in ("type", "text") and v is not None and v != []}
        return Text(text, extra) if text or extra else None
    if kind == "tool_use":
        arguments = jsonio.dumps(optional(block, "input", dict, where) or {}) if emitted is None else emitted
        return ToolCall(
            name=required(block, "name", str, where),
            arguments=arguments,
            id=optional(block, "id", str, where),
            extra=rest(block, ("type", "id", "name", "input")),
        )
    if kind == "tool_result":
        return _tool_result(block, where)
    if kind == "thinking":
        thinking = optional(block, "thinking", str, where) or ""
        opaque = {k: v for k, v in block.items() if k not in ("type", "thinking") and v is not None and v != ""}
        return Reasoning(thinking, opaque or None) if thinking or opaque else None
    if kind == "redacted_thinking":
        return Reasoning("", block)
    return Opaque(kind, block)


def _tool_result(block: dict[str, Json], where: str) -> ToolResult:
    texts: list[str] = []
    blocks: list[Json] = []
    content = block.get("content")
    if isinstance(content, str):
        texts.append(content)
    elif isinstance(content, list):
        for i, inner in enumerate(content):
            place = f"{where}.content[{i}]"
            if as_object(inner, place).get("type") == "text":
                texts.append(required(inner, "text", str, place))
                if len(inner) == 2:
                    continue
            blocks.append(inner)  # more than text
    elif content is not None:
        raise WireError(f"{where}.content is {type(content).__name__}, neither a string nor a list")
    extra = rest(block, _TOOL_RESULT)
    return ToolResult(
        text="\n".join(texts),
        call_id=optional(block, "tool_use_id", str, where),
        is_error=optional(block, "is_error", bool, where),
        extra={"blocks": blocks, **extra} if blocks else extra,
    )


def _tool(raw: dict[str, Json], where: str) -> Tool:
    return Tool(optional(raw, "name", str, where) or "", optional(raw, "description", str, where), raw)


def _stop_reason(word: str | None) -> StopReason | None:
    return None if word is None else _STOP.get(word, StopReason.OTHER)


def _usage(raw: Mapping[str, Json] | None) -> Usage | None:
    """Anthropic counts cache reads and writes apart from `input_tokens`; we count the whole prompt."""
    if raw is None:
        return None
    fresh = count(raw, "input_tokens")
    read = count(raw, "cache_read_input_tokens")
    written = count(raw, "cache_creation_input_tokens")
    return Usage(
        input_tokens=None if fresh is None else fresh + (read or 0) + (written or 0),
        output_tokens=count(raw, "output_tokens"),
        cached_tokens=read,
        cache_write_tokens=written,
    )


def _response_extra(obj: Mapping[str, Json], usage: Mapping[str, Json] | None) -> dict[str, Json]:
    extra = {k: v for k, v in obj.items() if k not in _RESPONSE and v is not None}
    details = {k: v for k, v in (usage or {}).items() if k not in _USAGE and v is not None}
    return {**extra, "usage": details} if details else extra


def _error(obj: dict[str, Json]) -> ApiError:
    error = obj.get("error")
    if not isinstance(error, dict):
        return ApiError(message=str(error or "")[:MAX_ERROR_MESSAGE], raw=obj)
    message, kind = error.get("message"), error.get("type")
    return ApiError(
        message=message[:MAX_ERROR_MESSAGE] if isinstance(message, str) else "",
        type=kind if isinstance(kind, str) else None,
        raw=obj,
    )


# --- streams ------------------------------------------------------------------------------------


class _Block:
    """A content block while it arrives."""

    def __init__(self, start: dict[str, Json]) -> None:
        self.start = start
        self.pieces: dict[str, list[str]] = {}  # block field -> the strings to append to it
        self.citations: list[Json] = []
        self.stopped = False

    def add(self, delta: dict[str, Json]) -> None:
        for key, value in delta.items():
            if key == "type":
                continue
            if key == "citation":
                self.citations.append(value)
            elif isinstance(value, str):
                self.pieces.setdefault(key, []).append(value)

    def part(self, *, ended: bool) -> Part | None:
        block = dict(self.start)
        pieces = {key: "".join(strings) for key, strings in self.pieces.items()}
        emitted = pieces.pop("partial_json", None)
        for key, text in pieces.items():
            before = block.get(key)
            block[key] = before + text if isinstance(before, str) else text
        if self.citations:
            before = block.get("citations")
            block["citations"] = [*(before if isinstance(before, list) else []), *self.citations]
        if block.get("type") == "tool_use":
            if emitted is None or not emitted.strip():
                # A call without arguments sends none; of a cut call they may just be missing.
                emitted = None if block.get("input") or ended or self.stopped else ""
        elif emitted is not None:
            # Calls that the provider runs itself come back with `input` as an object; a cut one stays a string.
            try:
                block["input"] = jsonio.loads(emitted or "{}", "input")
            except WireError:
                block["input"] = emitted
        try:
            return _part(block, "content_block", emitted)
        except WireError:
            return None  # the contract of a stream: what can't be understood is skipped


class _Stream:
    def __init__(self) -> None:
        self._events = SSESplitter()
        self._head: dict[str, Json] = {}  # message_start's message, then what message_delta changed
        self._usage: dict[str, Json] | None = None
        self._blocks: list[_Block] = []
        self._open: dict[int, _Block] = {}
        self._error: ApiError | None = None
        self._stopped = False

    def feed(self, chunk: bytes) -> None:
        for event in self._events.feed(chunk):
            self._take(event)

    def finish(self) -> Response:
        for event in self._events.flush():
            self._take(event)
        complete = self._stopped and self._error is None
        parts = tuple(self._parts(complete))
        raw_stop = _string(self._head, "stop_reason")
        return Response(
            message=Message(Role.ASSISTANT, parts) if parts or complete else None,
            complete=complete,
            id=_string(self._head, "id"),
            model=_string(self._head, "model"),
            stop_reason=_stop_reason(raw_stop),
            raw_stop_reason=raw_stop,
            usage=_usage(self._usage),
            error=self._error,
            extra=_response_extra(self._head, self._usage),
        )

    def _parts(self, ended: bool) -> Iterator[Part]:
        for block in self._blocks:
            part = block.part(ended=ended)
            if part is not None:
                yield part

    def _take(self, event: Event) -> None:
        data = stream_object(event.data)
        if data is None:
            return
        kind = data.get("type", event.event)
        if kind == "message_start" and isinstance(data.get("message"), dict):
            self._head = dict(data["message"])
            self._count({k: v for k, v in _dict(self._head.get("usage")).items() if k != "output_tokens"})
        elif kind == "content_block_start" and isinstance(data.get("content_block"), dict):
            # A new block even where a careless gateway repeats an index.
            block = _Block(data["content_block"])
            self._blocks.append(block)
            self._open[_index(data)] = block
        elif kind == "content_block_delta":
            open_block = self._open.get(_index(data))
            if open_block is not None:
                open_block.add(_dict(data.get("delta")))
        elif kind == "content_block_stop":
            closed = self._open.get(_index(data))
            if closed is not None:
                closed.stopped = True
        elif kind == "message_delta":
            self._head |= _dict(data.get("delta"))
            self._head |= rest(data, ("type", "delta", "usage"))
            self._count(_dict(data.get("usage")))
        elif kind == "message_stop":
            self._stopped = True
        elif kind == "error":
            self._error = _error(data)

    def _count(self, usage: dict[str, Json]) -> None:
        """Counts are cumulative: a later one replaces an earlier one."""
        if usage:
            self._usage = {**(self._usage or {}), **{k: v for k, v in usage.items() if v is not None}}


def _dict(value: Json) -> dict[str, Json]:
    return value if isinstance(value, dict) else {}


def _string(obj: Mapping[str, Json], key: str) -> str | None:
    value = obj.get(key)
    return value if isinstance(value, str) else None


def _index(data: Mapping[str, Json]) -> int:
    value = data.get("index")
    return value if isinstance(value, int) else 0


ANTHROPIC: Final[Dialect] = Anthropic()
