"""OpenAI chat completions, and the many servers that speak nearly the same.

Design: JSON answer and stream end in the same constructor, `_assistant`: the stream parser first
rebuilds the message object that the JSON answer would have held. Parts stand in the order reasoning,
text, refusal, tool calls, because the wire has no order between these fields. An empty string as
content gives no part, so that an answer with calls and ``""`` equals its replay with ``null``.

Differences between servers that are read as the same thing: reasoning under `reasoning_content`
(DeepSeek, vLLM), `reasoning` (OpenRouter) or `reasoning_text`, opaque state under `reasoning_details`
or `reasoning_opaque`, Mistral's `thinking` parts; tool calls without index, all with index 0, or
whose id or name comes again with every delta; arguments as an object; usage inside the choice.

Limits: with n > 1 only the first choice becomes the message, the others stay raw in
`extra["choices"]`. The raw usage object is in `extra["usage"]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from metaclaw_core.errors import WireError
from metaclaw_core.model import (
    ApiError,
    Json,
    Message,
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
from metaclaw_core.wire.answer_openai_chat import ANSWERS
from metaclaw_core.wire.base import Items, Route, Slot, StreamParser, rest
from metaclaw_core.wire.fields import count, optional, required
from metaclaw_core.wire.jsonio import dumps, loads_object
from metaclaw_core.wire.openai_chat_stream import Chunks
from metaclaw_core.wire.openai_common import (
    REASONING,
    api_error,
    content_parts,
    inner,
    objects,
    parse_error,
    refusal,
    result_text,
)
from metaclaw_core.wire.splice import slot_openai_chat
from metaclaw_core.wire.sse import SSESplitter

_PATH = "/chat/completions"
_ROLES = {**{role.value: role for role in Role}, "function": Role.TOOL}

# Whatever shapes the distribution that the answer is drawn from; anything else of the body is `extra`.
# fmt: off
_SAMPLING = frozenset((
    "temperature", "top_p", "top_k", "top_a", "min_p", "typical_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "seed", "n", "best_of", "logprobs", "top_logprobs",
    "max_tokens", "max_completion_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos",
    "reasoning_effort", "reasoning", "thinking", "enable_thinking", "chat_template_kwargs", "verbosity",
    "tool_choice", "function_call", "parallel_tool_calls", "response_format", "prediction", "modalities",
    "guided_json", "guided_regex", "guided_choice", "guided_grammar",
))
# fmt: on
_REQUEST = frozenset(("model", "stream", "messages", "tools", "functions", "metadata")) | _SAMPLING
_STOP = {
    "stop": StopReason.STOP,
    "eos": StopReason.STOP,
    "end_turn": StopReason.STOP,
    "length": StopReason.LENGTH,
    "max_tokens": StopReason.LENGTH,
    "model_length": StopReason.LENGTH,
    "tool_calls": StopReason.TOOL_CALLS,
    "function_call": StopReason.TOOL_CALLS,
    "content_filter": StopReason.CONTENT_FILTER,
}
_OPAQUE = ("reasoning_details", "reasoning_opaque")
_MESSAGE = frozenset(("role", "content"))
_RESULT = _MESSAGE | {"tool_call_id", "name"}
_ASSISTANT = _MESSAGE | {"refusal", "tool_calls", "function_call", *REASONING, *_OPAQUE}


class OpenAIChat:
    name = "openai_chat"
    answers = ANSWERS
    history = "messages"
    runs = False

    def route(self, method: str, path: str) -> Route | None:
        if method != "POST" or _PATH not in path:
            return None
        path = path.partition("?")[0]
        return Route(self.name, model=_deployment(path)) if path.endswith(_PATH) else None

    def parse_request(self, body: bytes, path: str) -> Request:
        return self.read_request(loads_object(body, "request body"), path)

    def read_request(self, obj: dict[str, Json], path: str) -> Request:
        messages = required(obj, "messages", list, "body")
        return Request(
            dialect=self.name,
            model=optional(obj, "model", str, "body") or _deployment(path.partition("?")[0]),
            stream=optional(obj, "stream", bool, "body") or False,
            messages=tuple(_message(m, at) for m, at in objects(messages, "messages")),
            tools=(*_tools(obj.get("tools"), "tools"), *_tools(obj.get("functions"), "functions")),
            sampling={k: v for k, v in obj.items() if k in _SAMPLING},
            metadata=optional(obj, "metadata", dict, "body") or {},
            extra=rest(obj, _REQUEST),
        )

    def read_items(self, items: list[Json]) -> Items:
        return [(_message(item, at),) for item, at in objects(items, "messages")]

    def parse_response(self, body: bytes) -> Response:
        obj = loads_object(body, "response body")
        if "choices" not in obj:
            if not obj.get("error"):
                raise WireError("response body has no choices")
            return Response(None, complete=True, error=api_error(obj["error"], obj))
        return _response(obj, complete=True, error=None)

    def stream_parser(self) -> StreamParser:
        return _Stream()

    def parse_error(self, body: bytes) -> ApiError:
        return parse_error(body)

    def system_slot(self, body: bytes) -> Slot:
        return slot_openai_chat(body)


OPENAI_CHAT = OpenAIChat()


def _deployment(path: str) -> str | None:
    """Azure names the model in the URL: /openai/deployments/<name>/chat/completions."""
    head, _, name = path.removesuffix(_PATH).rpartition("/")
    return name if name and head.endswith("/deployments") else None


# --- messages -----------------------------------------------------------------------------------


def _message(obj: dict[str, Json], where: str) -> Message:
    word = obj.get("role")
    role = _ROLES.get(word) if isinstance(word, str) else None
    if role is None:
        raise WireError(f"{where}.role is not one of {', '.join(_ROLES)}")
    if role is Role.ASSISTANT:
        return _assistant(obj, where)
    if role is Role.TOOL:
        text, blocks = result_text(obj.get("content"), f"{where}.content")
        result = ToolResult(
            text,
            call_id=optional(obj, "tool_call_id", str, where),
            name=optional(obj, "name", str, where),
            extra={"blocks": blocks} if blocks else {},
        )
        return Message(role, (result,), rest(obj, _RESULT))
    return Message(role, tuple(content_parts(obj.get("content"), f"{where}.content")), rest(obj, _MESSAGE))


def _assistant(obj: dict[str, Json], where: str) -> Message:
    """From a request's history, a JSON answer, or a stream put together."""
    if obj.keys() <= _MESSAGE:  # by far the most
        return Message(Role.ASSISTANT, tuple(content_parts(obj.get("content"), f"{where}.content")))
    parts: list[Part] = []
    extra = rest(obj, _ASSISTANT)
    thought = next((k for k in REASONING if isinstance(obj.get(k), str) and obj[k]), None)
    state = next((k for k in _OPAQUE if obj.get(k)), None)
    if thought or state:
        parts.append(Reasoning(obj[thought] if thought else "", opaque=obj[state] if state else None))
    # A second field with the same words (vLLM sends two) is no second thought; a null says nothing.
    said = obj[thought] if thought else None
    extra |= {k: obj[k] for k in REASONING if obj.get(k) and obj[k] != said}
    extra |= {k: obj[k] for k in _OPAQUE if obj.get(k) and k != state}

    parts += content_parts(obj.get("content"), f"{where}.content")
    if refused := optional(obj, "refusal", str, where):
        parts.append(refusal(refused))
    parts += (_tool_call(call, at) for call, at in objects(obj.get("tool_calls"), f"{where}.tool_calls"))
    if (legacy := optional(obj, "function_call", dict, where)) is not None:
        parts.append(_call(legacy, f"{where}.function_call", None, {"type": "function_call"}, "arguments"))
    return Message(Role.ASSISTANT, tuple(parts), extra)


def _tool_call(obj: dict[str, Json], where: str) -> ToolCall:
    # The position is in the order of the parts already, and clients drop `index` from the history.
    type = optional(obj, "type", str, where)
    kind, arguments = ("custom", "input") if type == "custom" else ("function", "arguments")
    extra = rest(obj, ("id", "index", kind, "type") if type in (None, "function") else ("id", "index", kind))
    function = required(obj, kind, dict, where)
    return _call(function, f"{where}.{kind}", optional(obj, "id", str, where), extra, arguments)


def _call(function: dict[str, Json], where: str, id: str | None, extra: dict[str, Json], key: str) -> ToolCall:
    name = required(function, "name", str, where)
    if isinstance(function.get(key), dict):  # some servers send the object that the string should hold
        arguments = dumps(function[key])
    else:
        arguments = optional(function, key, str, where) or ""
    if len(function) > 2:
        extra |= rest(function, ("name", key))
    return ToolCall(name, arguments, id or None, extra)


def _tools(value: Json, where: str) -> Iterator[Tool]:
    for obj, at in objects(value, where):
        kind = "custom" if obj.get("type") == "custom" else "function"
        inside = optional(obj, kind, dict, at)
        declared = obj if inside is None else inside  # legacy `functions` have no wrapper
        yield Tool(
            name=optional(declared, "name", str, at) or "",
            description=optional(declared, "description", str, at),
            raw=obj,
        )


# --- answers ------------------------------------------------------------------------------------


def _response(obj: dict[str, Json], *, complete: bool, error: ApiError | None) -> Response:
    choices = [choice for choice, _ in objects(obj.get("choices"), "choices")]
    first = choices[0] if choices else {}
    message = optional(first, "message", dict, "choices[0]")
    if choices and message is None:
        raise WireError("choices[0] has no message")
    answer = None if message is None else _assistant(message, "choices[0].message")
    raw_stop = optional(first, "finish_reason", str, "choices[0]")
    usage = optional(obj, "usage", dict, "body") or inner(first, "usage")  # Moonshot has it in the choice
    extra = rest(obj, ("id", "model", "object", "choices", "usage", "error"))
    if more := rest(first, ("index", "message", "finish_reason", "usage")):
        extra["choice"] = more
    if choices[1:]:
        extra["choices"] = choices[1:]
    if usage:
        extra["usage"] = usage
    return Response(
        answer,
        complete=complete,
        id=optional(obj, "id", str, "body"),
        model=optional(obj, "model", str, "body"),
        stop_reason=_stop_reason(raw_stop, answer),
        raw_stop_reason=raw_stop,
        usage=_usage(usage),
        error=error or (api_error(obj["error"], obj) if obj.get("error") else None),
        extra=extra,
    )


def _stop_reason(word: str | None, message: Message | None) -> StopReason | None:
    if word is None:
        return None
    reason = _STOP.get(word, StopReason.OTHER)
    if reason is StopReason.STOP and message is not None:
        # A forced tool_choice ends with "stop" although the client must act.
        if message.tool_calls:
            return StopReason.TOOL_CALLS
        if any(isinstance(p, Text) and p.extra.get("type") == "refusal" for p in message.parts):
            return StopReason.CONTENT_FILTER
    return reason


def _usage(raw: Mapping[str, Json]) -> Usage | None:
    read, written = inner(raw, "prompt_tokens_details"), inner(raw, "completion_tokens_details")
    cached, cache_write = count(read, "cached_tokens"), count(read, "cache_write_tokens")
    if cached is None:
        cached = count(raw, "prompt_cache_hit_tokens")  # DeepSeek
    usage = Usage(
        input_tokens=count(raw, "prompt_tokens"),
        output_tokens=count(raw, "completion_tokens"),
        cached_tokens=count(raw, "cached_tokens") if cached is None else cached,  # Moonshot
        cache_write_tokens=count(raw, "cache_creation_input_tokens") if cache_write is None else cache_write,
        reasoning_tokens=count(written, "reasoning_tokens"),
    )
    return None if usage == Usage() else usage


class _Stream:
    def __init__(self) -> None:
        self._events = SSESplitter()
        self._chunks = Chunks()

    def feed(self, chunk: bytes) -> None:
        for event in self._events.feed(chunk):
            self._chunks.add(event)

    def finish(self) -> Response:
        for event in self._events.flush():
            self._chunks.add(event)
        return _response(self._chunks.as_json(), complete=self._chunks.complete, error=self._chunks.error)
