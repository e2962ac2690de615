"""Gemini `generateContent` and `streamGenerateContent`: the Gemini API, Vertex AI and gateways.

Design: model and streaming are in the URL. Google reads camelCase and snake_case alike and takes a
single object where a list is meant, so both are folded at the edge and one spelling is used inside.
With `alt=sse` a stream is server-sent events, without it one JSON array; the first byte decides,
because the parser does not see the URL. A stream cuts text into parts at will, so adjacent text (and
adjacent thought) of the model is joined, in replies and in the history alike: a reply equals its
replay. Empty parts, which end many streams, are dropped.

A signature stays with its part: `Reasoning.opaque` for a thought, else `extra["thoughtSignature"]`.
A function response of one string, `output`, `result` or `error` (a failed call), is that text; any other
is its JSON. Where the text alone does not say what the object was, `extra["response"]` keeps it.

Limits: candidate 0 only (a JSON answer keeps the others in `extra["candidates"]`); streamed function
arguments (`partialArgs`) stay in `extra` and are not assembled. Cloud Code's `v1internal` is not served.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Final
from urllib.parse import unquote

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
from metaclaw_core.wire.answer_gemini import ANSWERS
from metaclaw_core.wire.base import Dialect, Items, Route, Slot, StreamParser, rest
from metaclaw_core.wire.fields import MAX_ERROR_MESSAGE, as_object, count, optional, plain_error, stream_object
from metaclaw_core.wire.json_array import ObjectSplitter
from metaclaw_core.wire.splice import slot_gemini
from metaclaw_core.wire.sse import SSESplitter

# A colon in a path may be percent-encoded; tuned models and Vertex endpoints have their own collections.
_PATH: Final = re.compile(
    r"/(?:models|tunedModels|endpoints)/([^/]+?)(?::|%3[Aa])(generateContent|streamGenerateContent)$"
)
_CAMEL: Final = {
    "system_instruction": "systemInstruction",
    "generation_config": "generationConfig",
    "tool_config": "toolConfig",
    "function_declarations": "functionDeclarations",
    "function_call": "functionCall",
    "function_response": "functionResponse",
    "inline_data": "inlineData",
    "file_data": "fileData",
    "executable_code": "executableCode",
    "code_execution_result": "codeExecutionResult",
    "thought_signature": "thoughtSignature",
}
_REQUEST: Final = frozenset(("contents", "systemInstruction", "generationConfig", "toolConfig", "tools"))
_CONTENT: Final = frozenset(("role", "parts"))
_RESPONSE: Final = frozenset(("candidates", "usageMetadata", "modelVersion", "responseId"))
_CANDIDATE: Final = frozenset(("content", "finishReason", "index"))
_USAGE: Final = frozenset(
    ("promptTokenCount", "cachedContentTokenCount", "candidatesTokenCount", "thoughtsTokenCount", "totalTokenCount")
)
_CALL: Final = frozenset(("name", "args", "id"))
_BESIDE: Final = frozenset(("thought", "thoughtSignature", "videoMetadata", "mediaResolution", "partMetadata"))
_ROLES: Final = {"user": Role.USER, "model": Role.ASSISTANT, "function": Role.USER, "tool": Role.USER}
_STOP: Final = {
    "STOP": StopReason.STOP,
    "MAX_TOKENS": StopReason.LENGTH,
    "SAFETY": StopReason.CONTENT_FILTER,
    "RECITATION": StopReason.CONTENT_FILTER,
    "BLOCKLIST": StopReason.CONTENT_FILTER,
    "PROHIBITED_CONTENT": StopReason.CONTENT_FILTER,
    "SPII": StopReason.CONTENT_FILTER,
    "IMAGE_SAFETY": StopReason.CONTENT_FILTER,
    "IMAGE_PROHIBITED_CONTENT": StopReason.CONTENT_FILTER,
    "IMAGE_RECITATION": StopReason.CONTENT_FILTER,
}


class Gemini:
    name = "gemini"
    answers = ANSWERS
    history = "contents"
    runs = False

    def route(self, method: str, path: str) -> Route | None:
        if method != "POST" or "enerateContent" not in path:
            return None
        match = _PATH.search(path.partition("?")[0])
        if match is None:
            return None
        return Route(self.name, model=unquote(match[1]), stream=match[2] == "streamGenerateContent")

    def parse_request(self, body: bytes, path: str) -> Request:
        return self.read_request(jsonio.loads_object(body, "request body"), path)

    def read_request(self, obj: dict[str, Json], path: str) -> Request:
        route = self.route("POST", path)
        if route is None:
            raise WireError("the path is not one of generateContent or streamGenerateContent")
        obj = _camel(obj)
        messages: list[Message] = []
        system = optional(obj, "systemInstruction", dict, "body")
        if system is not None:
            parts = _content_parts(system, "systemInstruction", joined=False)
            if parts:
                messages.append(Message(Role.SYSTEM, parts, rest(system, _CONTENT)))
        if obj.get("contents") is None:
            raise WireError("body.contents is missing")
        for i, item in enumerate(_objects(obj, "contents", "body")):
            messages.extend(_messages(item, f"contents[{i}]"))
        config = optional(obj, "generationConfig", dict, "body") or {}
        choice = optional(obj, "toolConfig", dict, "body")
        return Request(
            dialect=self.name,
            model=route.model,
            stream=bool(route.stream),
            messages=tuple(messages),
            tools=tuple(_tools(obj)),
            sampling=config if choice is None else {**config, "toolConfig": choice},
            extra=rest(obj, _REQUEST),
        )

    def read_items(self, items: list[Json]) -> Items:
        return [tuple(_messages(as_object(item, f"contents[{i}]"), f"contents[{i}]")) for i, item in enumerate(items)]

    def parse_response(self, body: bytes) -> Response:
        obj = jsonio.loads_object(body, "response body")
        if "error" in obj:
            return Response(message=None, complete=True, error=_error(obj))
        candidates = _objects(obj, "candidates", "response")
        candidate = candidates[0] if candidates else None
        message = None
        if candidate is not None:
            content = optional(candidate, "content", dict, "candidates[0]") or {}
            message = Message(
                Role.ASSISTANT,
                _content_parts(content, "candidates[0].content", joined=True),
                rest(content, _CONTENT),
            )
        extra = rest(obj, _RESPONSE) | rest(candidate or {}, _CANDIDATE)
        if len(candidates) > 1:
            extra["candidates"] = candidates[1:]
        return _response(obj, candidate or {}, message, extra, complete=True)

    def stream_parser(self) -> StreamParser:
        return _Stream()

    def parse_error(self, body: bytes) -> ApiError:
        try:
            value = jsonio.loads(body, "error body")
        except WireError:
            return plain_error(body)
        if isinstance(value, list) and value:  # an error of a stream that is a JSON array
            value = value[0]
        return _error(value) if isinstance(value, dict) and "error" in value else plain_error(body)

    def system_slot(self, body: bytes) -> Slot:
        return slot_gemini(body)


# --- requests and JSON answers ------------------------------------------------------------------


def _camel(obj: dict[str, Json]) -> dict[str, Json]:
    """The same fields under camelCase names; the object itself where there is nothing to rename."""
    if _CAMEL.keys().isdisjoint(obj):
        return obj
    return {_CAMEL.get(key, key): value for key, value in obj.items()}


def _objects(obj: Mapping[str, Json], key: str, where: str) -> list[dict[str, Json]]:
    """A repeated field of messages: a list, or one object standing for a list of one."""
    value = obj.get(key)
    if value is None:
        return []
    items = value if isinstance(value, list) else [value]
    return [item if isinstance(item, dict) else as_object(item, f"{where}.{key}[{i}]") for i, item in enumerate(items)]


def _messages(content: dict[str, Json], where: str) -> list[Message]:
    word = optional(content, "role", str, where) or "user"
    role = _ROLES.get(word)
    if role is None:
        raise WireError(f"{where}.role is {word[:40]!r}; known are user, model, function and tool")
    parts = _content_parts(content, where, joined=role is Role.ASSISTANT)
    extra = {} if content.keys() <= _CONTENT else rest(content, _CONTENT)
    if role is Role.ASSISTANT or not any(isinstance(p, ToolResult) for p in parts):
        return [Message(role, parts, extra)]
    others = tuple(p for p in parts if not isinstance(p, ToolResult))
    out: list[Message] = []
    for part in parts:
        if isinstance(part, ToolResult):
            out.append(Message(Role.TOOL, (part,), {} if out else extra))
        elif part is others[0]:
            out.append(Message(role, others, {} if out else extra))
    return out


def _content_parts(content: Mapping[str, Json], where: str, *, joined: bool) -> tuple[Part, ...]:
    raw = _objects(content, "parts", where)
    if len(raw) == 1 and (text := _bare_text(raw[0])):  # the usual case, and there are hundreds of them in a long request
        return (Text(text),)
    parts = [p for i, item in enumerate(raw) if (p := _part(item, f"{where}.parts[{i}]")) is not None]
    return tuple(_join(parts)) if joined and len(parts) > 1 else tuple(parts)


def _bare_text(raw: dict[str, Json]) -> str | None:
    """The text of a part that has nothing else."""
    text = raw.get("text") if len(raw) == 1 else None
    return text if isinstance(text, str) else None


def _part(raw: dict[str, Json], where: str) -> Part | None:
    """One part; None if there is nothing in it."""
    bare = _bare_text(raw)
    if bare is not None:
        return Text(bare) if bare else None
    obj = _camel(raw)
    thought = bool(optional(obj, "thought", bool, where))
    call = optional(obj, "functionCall", dict, where)
    if call is not None:
        name = optional(call, "name", str, where)
        if not name:
            raise WireError(f"{where}.functionCall.name is missing")
        return ToolCall(
            name=name,
            arguments=jsonio.dumps(optional(call, "args", dict, where) or {}),
            id=optional(call, "id", str, where),
            extra=rest(call, _CALL) | rest(obj, ("functionCall",)),
        )
    result = optional(obj, "functionResponse", dict, where)
    if result is not None:
        return _tool_result(result, rest(obj, ("functionResponse",)), where)
    data = next((key for key in obj if key not in _BESIDE and key != "text"), None)
    if data is not None:
        return Opaque(data, raw)
    text = optional(obj, "text", str, where) or ""
    extra = {k: v for k, v in obj.items() if k not in ("text", "thought") and v is not None and v != ""}
    if not text and not extra:
        return None
    return Reasoning(text, extra or None) if thought else Text(text, extra)


def _join(parts: Iterable[Part]) -> Iterator[Part]:
    """Adjacent text becomes one text, adjacent thought one thought; of the fields beside it the last value counts."""
    for kind, run in groupby(parts, type):
        if kind is Text:
            texts = [p for p in run if isinstance(p, Text)]
            yield Text("".join(p.text for p in texts), {k: v for p in texts for k, v in p.extra.items()})
        elif kind is Reasoning:
            thoughts = [p for p in run if isinstance(p, Reasoning)]
            opaque = {k: v for p in thoughts for k, v in (p.opaque or {}).items()}
            yield Reasoning("".join(p.text for p in thoughts), opaque or None)
        else:
            yield from run


def _tool_result(result: dict[str, Json], beside: dict[str, Json], where: str) -> ToolResult:
    response = optional(result, "response", dict, where) or {}
    extra = rest(result, ("name", "id", "response", "parts")) | beside
    blocks = _objects(result, "parts", where)
    if blocks:
        extra["blocks"] = blocks
    key, value = next(iter(response.items())) if len(response) == 1 else ("", None)
    plain = value if isinstance(value, str) and key in ("output", "result", "error") else None
    if plain is None or key == "result":
        extra["response"] = response
    return ToolResult(
        text=jsonio.dumps(response) if plain is None else plain,
        call_id=optional(result, "id", str, where),
        name=optional(result, "name", str, where),
        is_error=True if "error" in response and "output" not in response else None,
        extra=extra,
    )


def _tools(obj: Mapping[str, Json]) -> Iterator[Tool]:
    for i, item in enumerate(_objects(obj, "tools", "body")):
        where = f"tools[{i}]"
        tool = _camel(item)
        for raw in _objects(tool, "functionDeclarations", where):
            yield Tool(optional(raw, "name", str, where) or "", optional(raw, "description", str, where), raw)
        for key, value in tool.items():
            if key != "functionDeclarations":  # googleSearch, codeExecution …
                yield Tool("", None, {key: value})


def _response(
    obj: Mapping[str, Json],
    candidate: Mapping[str, Json],
    message: Message | None,
    extra: dict[str, Json],
    *,
    complete: bool,
) -> Response:
    finish, blocked = optional(candidate, "finishReason", str, "candidates[0]"), _block_reason(obj)
    if finish is not None:
        stop: StopReason | None = _STOP.get(finish, StopReason.OTHER)
        if stop is StopReason.STOP and message is not None and message.tool_calls:
            stop = StopReason.TOOL_CALLS  # Gemini has no word of its own for it
    else:
        stop = None if blocked is None else StopReason.CONTENT_FILTER
    usage = optional(obj, "usageMetadata", dict, "response")
    details = rest(usage or {}, _USAGE)
    return Response(
        message=message,
        complete=complete,
        id=optional(obj, "responseId", str, "response"),
        model=optional(obj, "modelVersion", str, "response"),
        stop_reason=stop,
        raw_stop_reason=blocked if finish is None else finish,
        usage=_usage(usage),
        extra={**extra, "usageMetadata": details} if details else extra,
    )


def _block_reason(obj: Mapping[str, Json]) -> str | None:
    feedback = optional(obj, "promptFeedback", dict, "response")
    return None if feedback is None else optional(feedback, "blockReason", str, "promptFeedback")


def _usage(raw: Mapping[str, Json] | None) -> Usage | None:
    """`promptTokenCount` holds the cached tokens, `candidatesTokenCount` does not hold the thoughts."""
    if not raw:
        return None
    written, thoughts = count(raw, "candidatesTokenCount"), count(raw, "thoughtsTokenCount")
    return Usage(
        input_tokens=count(raw, "promptTokenCount"),
        # Google leaves a zero out of its JSON: thoughts without an answer have no candidatesTokenCount.
        output_tokens=None if written is None and thoughts is None else (written or 0) + (thoughts or 0),
        cached_tokens=count(raw, "cachedContentTokenCount"),
        reasoning_tokens=thoughts,
    )


def _error(obj: dict[str, Json]) -> ApiError:
    error = obj.get("error")
    if not isinstance(error, dict):
        return ApiError(message=str(error or "")[:MAX_ERROR_MESSAGE], raw=obj)
    message, status, code = error.get("message"), error.get("status"), error.get("code")
    return ApiError(
        message=message[:MAX_ERROR_MESSAGE] if isinstance(message, str) else "",
        type=status if isinstance(status, str) else None,
        code=str(code) if isinstance(code, int | str) else None,
        raw=obj,
    )


# --- streams ------------------------------------------------------------------------------------


class _Stream:
    def __init__(self) -> None:
        self._events = SSESplitter()
        self._array: ObjectSplitter | None = None
        self._started = False
        self._head: dict[str, Json] = {}
        self._candidate: dict[str, Json] = {}
        self._parts: list[Part] = []
        self._error: ApiError | None = None

    def feed(self, chunk: bytes) -> None:
        if not self._started:
            chunk = chunk.lstrip(b"\xef\xbb\xbf \t\r\n")
            if not chunk:
                return
            self._started = True
            if chunk[:1] in b"[{":
                self._array = ObjectSplitter()
        if self._array is not None:
            for raw in self._array.feed(chunk):
                self._take(raw)
        else:
            for event in self._events.feed(chunk):
                self._take(event.data)

    def finish(self) -> Response:
        for event in self._events.flush():
            self._take(event.data)
        parts = tuple(_join(self._parts))
        ended = "finishReason" in self._candidate or _block_reason(self._head) is not None
        complete = self._error is None and (ended or (self._array is not None and self._array.closed))
        message = Message(Role.ASSISTANT, parts) if parts or "finishReason" in self._candidate else None
        extra = rest(self._head, _RESPONSE) | rest(self._candidate, _CANDIDATE)
        return replace(_response(self._head, self._candidate, message, extra, complete=complete), error=self._error)

    def _take(self, data: str | bytes) -> None:
        obj = stream_object(data)
        if obj is None:
            return
        if "error" in obj:
            self._error = _error(obj)
            return
        for key, value in obj.items():
            if key == "usageMetadata" and isinstance(value, dict):
                self._head[key] = {**self._head.get(key, {}), **value}  # running totals
            elif key == "promptFeedback" and isinstance(value, dict):
                reason = value.get("blockReason")
                if reason is None or isinstance(reason, str):
                    self._head[key] = value
            elif key in ("responseId", "modelVersion"):
                if isinstance(value, str):
                    self._head[key] = value
            elif key not in ("candidates", "usageMetadata", "promptFeedback"):
                self._head[key] = value
        candidates = obj.get("candidates")
        for candidate in candidates if isinstance(candidates, list) else [candidates]:
            if isinstance(candidate, dict) and candidate.get("index", 0) == 0:
                self._take_candidate(candidate)

    def _take_candidate(self, candidate: dict[str, Json]) -> None:
        for key, value in candidate.items():
            if key not in ("content", "finishReason") or (key == "finishReason" and isinstance(value, str)):
                self._candidate[key] = value
        content = candidate.get("content")
        parts = content.get("parts") if isinstance(content, dict) else None
        for raw in parts if isinstance(parts, list) else [parts]:
            if not isinstance(raw, dict):
                continue
            try:
                part = _part(raw, "parts")
            except WireError:
                continue  # the contract of a stream: what can't be understood is skipped
            if part is not None:
                self._parts.append(part)


GEMINI: Final[Dialect] = Gemini()
