"""A request of any dialect as what chat templates take: messages as dicts, tools as OpenAI function declarations.

Design: all templates know system, user, assistant and tool messages with text in them, so everything is brought to
that. What a template can't do is found out by asking it (`Abilities`): one that knows no system prompt gets it in front
of the first user message, one that wants users and assistants to alternate gets neighbours joined. Call ids are numbered
anew: clients rewrite and invent them, and templates that print them (Kimi) want their own form.

Nothing is left out in silence: images and what else is no text raise RenderError. Tools that only the provider can run
(web search and the like) are not declared, since nobody here could run them.

Limits: the error flag of a tool result is not said to the model, no template has a place for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from metaclaw_core.errors import MetaClawError
from metaclaw_core.model import Json, Message, Opaque, Request, Role, Tool, ToolCall, ToolResult
from metaclaw_core.policy.canonical import FREE_FORM, arguments_of, reasoning_of, text_of

type Chat = list[dict[str, Any]]
type ErrorKind = Literal["images", "unsupported", "too_long", "template"]

NO_TOOLS = (
    "The chat template of the policy model has no place for tools, and this conversation has some; "
    "rl.model must name a model that was trained to call them."
)


class RenderError(MetaClawError):
    """The request can't be put before the model; ``str(e)`` is a sentence for the client.

    `kind`: images (or audio, files), unsupported (other content), too_long (for the context), template (the model's
    chat template can't express it).
    """

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a chat template can express."""

    system: bool = True  # a system message at the start
    late_system: bool = True  # and further down
    repeated_user: bool = True  # two user messages in a row
    tools: bool = True  # declarations, calls and results
    readable: bool = True  # in a form that `families` knows
    text_arguments: bool = False  # arguments are wanted as JSON text, not as an object
    global_ids: bool = False  # it prints call ids in Kimi's form, ``functions.NAME:NUMBER``


# --- tools ---------------------------------------------------------------------------------------

_TEXT_INPUT: Json = {"type": "object", "properties": {FREE_FORM: {"type": "string"}}, "required": [FREE_FORM]}


def declared(request: Request) -> Chat:
    """The tools the model may call, as ``{"type": "function", "function": {name, description, parameters}}``."""
    choice = request.sampling.get("tool_choice")
    if choice == "none" or (isinstance(choice, dict) and choice.get("type") == "none"):
        return []
    config = request.sampling.get("toolConfig")
    calling = config.get("functionCallingConfig") if isinstance(config, dict) else None
    if isinstance(calling, dict) and str(calling.get("mode")).upper() == "NONE":
        return []
    return [
        {"type": "function", "function": {"name": tool.name, "description": tool.description or "", "parameters": schema}}
        for tool in request.tools
        if (schema := _schema(tool)) is not None
    ]


def _schema(tool: Tool) -> Json:
    """The parameters' JSON schema; None: not a tool that the client runs."""
    raw = tool.raw if isinstance(tool.raw, dict) else {}
    kind = raw.get("type")
    if not tool.name:
        return None
    if kind == "custom" and "input_schema" not in raw:  # free text (Anthropic's own tools may say "custom", too)
        return _TEXT_INPUT
    inner = raw.get("function")
    inside: Mapping[str, Json] = inner if isinstance(inner, dict) else raw
    for key in ("parameters", "input_schema", "parametersJsonSchema"):
        if isinstance(inside.get(key), dict):
            return _lower_types(inside[key]) if inside is raw and kind is None else inside[key]
    if kind not in (None, "function", "custom"):
        return None  # web_search_20250305 and the like: the provider runs them
    return {"type": "object", "properties": {}}


def _lower_types(schema: Json) -> Json:
    """Gemini writes ``"type": "STRING"``."""
    if isinstance(schema, list):
        return [_lower_types(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value.lower() if key == "type" and isinstance(value, str) else _lower_types(value)
        for key, value in schema.items()
    }


# --- messages ------------------------------------------------------------------------------------


def chat_of(
    messages: Sequence[Message],
    abilities: Abilities,
    ours: Mapping[int, Message],
    harmless: Callable[[Any], Any] = lambda text: text,
) -> Chat:
    """`ours`: what to put for some of the messages, by index: the reply as we know it. `harmless`: done to all other text."""
    chat = _Chat(abilities, harmless)
    head = 0
    while head < len(messages) and messages[head].role in (Role.SYSTEM, Role.DEVELOPER):
        head += 1
    system = "\n\n".join(text for message in messages[:head] if (text := _plain(message)))
    if system:
        chat.system(system)
    for i, message in enumerate(messages[head:], head):
        match message.role:
            case Role.ASSISTANT:
                _plain(message)
                chat.assistant(message, ours.get(i, message))
            case Role.TOOL:
                _plain(message)
                for result in message.tool_results:
                    chat.result(result)
            case Role.USER:
                chat.user(_plain(message))
            case _:
                chat.late_system(_plain(message))
    return chat.messages


def _plain(message: Message) -> str:
    """The text of a message that holds nothing but text. Raises RenderError."""
    for part in message.parts:
        if isinstance(part, Opaque):
            raise _cannot_show(part.type)
        if isinstance(part, ToolResult):
            for block in part.extra.get("blocks", ()):
                kind = block.get("type") if isinstance(block, dict) else "image"
                if kind not in ("text", "input_text", "output_text"):
                    raise _cannot_show(str(kind or next(iter(block), "")))
    return message.text


_MEDIA = ("image", "audio", "video", "file", "document", "inlinedata", "screenshot")


def _cannot_show(kind: str) -> RenderError:
    if any(word in kind.lower() for word in _MEDIA):
        return RenderError("images", f"The policy model reads text only; this conversation holds a part of type {kind}.")
    return RenderError("unsupported", f"A part of type {kind!r} can't be shown to the policy model.")


class _Chat:
    """Messages in the making."""

    def __init__(self, abilities: Abilities, harmless: Callable[[Any], Any]) -> None:
        self.messages: Chat = []
        self._harmless = harmless
        self._abilities = abilities
        self._in_front = ""  # a system prompt on its way to the first user message
        self._waiting: list[tuple[str | None, str, str]] = []  # calls without a result yet: client's id, ours, name
        self._calls = 0

    def system(self, text: str) -> None:
        text = self._harmless(text)
        if self._abilities.system:
            self.messages.append({"role": "system", "content": text})
        else:
            self._in_front = text + "\n\n"

    def late_system(self, text: str) -> None:
        if self._abilities.late_system:
            self.messages.append({"role": "system", "content": self._harmless(text)})
        else:
            self.user(text)

    def user(self, text: str) -> None:
        text, self._in_front = self._in_front + self._harmless(text), ""
        before = self.messages[-1] if self.messages else None
        if before is not None and before["role"] == "user" and not self._abilities.repeated_user:
            before["content"] += "\n\n" + text
        else:
            self.messages.append({"role": "user", "content": text})

    def assistant(self, said: Message, shown: Message) -> None:
        known = shown is not said
        message: dict[str, Any] = {"content": text_of(shown)}
        if reasoning := reasoning_of(shown):
            message["reasoning_content"] = reasoning
        calls = []
        for theirs, ours in zip(said.tool_calls, shown.tool_calls, strict=True):
            id = self._id(ours, known=known)
            self._waiting.append((theirs.id, id, ours.name))
            arguments: Any = arguments_of(ours)
            if self._abilities.text_arguments:
                arguments = json.dumps(arguments, ensure_ascii=False)
            calls.append({"type": "function", "id": id, "function": {"name": ours.name, "arguments": arguments}})
        if calls:
            if not self._abilities.tools:
                raise RenderError("template", NO_TOOLS)
            message["tool_calls"] = calls
        self.messages.append({"role": "assistant", **(message if known else self._harmless(message))})

    def _id(self, call: ToolCall, *, known: bool) -> str:
        number, self._calls = self._calls, self._calls + 1
        if not self._abilities.global_ids:
            return f"call{number:05d}"  # nine characters, the strictest form there is (Mistral)
        return call.id if known and call.id else f"functions.{call.name}:{number}"

    def result(self, result: ToolResult) -> None:
        message = {"role": "tool", "content": self._harmless(result.text)}
        same = (i for i, (id, _, _) in enumerate(self._waiting) if id and id == result.call_id)
        named = (i for i, (_, _, name) in enumerate(self._waiting) if name == result.name)
        at = next(same, next(named, 0 if self._waiting else None))
        if at is not None:
            _, id, name = self._waiting.pop(at)
            message |= {"tool_call_id": id, "name": self._harmless(name)}
        elif result.name:
            message["name"] = self._harmless(result.name)
        self.messages.append(message)
