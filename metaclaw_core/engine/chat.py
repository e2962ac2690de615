"""From chat messages to token ids, and from a reply's tokens to OpenAI's fields, read as the policy server reads them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from metaclaw_core.engine.errors import EngineError
from metaclaw_core.policy.families import family_of
from metaclaw_core.policy.parse import ReplyReader, new_call_id
from metaclaw_core.policy.tokens import decode
from metaclaw_core.wire.answer import Event, ReasoningDelta, TextDelta


def render_chat(tokenizer: Any, body: Mapping[str, Any]) -> list[int]:
    """The prompt's token ids by the model's own template. Raises EngineError."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise EngineError("messages must be a list of objects.")
    if not tokenizer.chat_template:
        raise EngineError("This model has no chat template; use /completions.")
    tools = None if body.get("tool_choice") == "none" else body.get("tools") or None
    try:
        encoded = tokenizer.apply_chat_template(
            [_plain(message) for message in messages],
            tools=tools,
            add_generation_prompt=True,
            return_dict=True,
            **(body.get("chat_template_kwargs") or {}),
        )
    except (TemplateError, TypeError, ValueError) as e:
        raise EngineError(f"The model's chat template refuses these messages: {e}") from e
    ids: list[int] = encoded["input_ids"]
    return ids


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Text parts joined and tool arguments as objects, which is what templates expect."""
    plain = {key: value for key, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list):
        if odd := {str(part.get("type")) for part in content} - {"text"}:
            raise EngineError(f"The engine reads text only, not {', '.join(sorted(odd))}.")
        plain["content"] = "".join(part["text"] for part in content)
    elif content is None:
        plain["content"] = ""
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _loaded(call["function"].get("arguments"))}} for call in calls
        ]
    return plain


def _loaded(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def reply_reader(
    tokenizer: Any, body: Mapping[str, Any], prompt: Sequence[int], *, stop_ids: Collection[int], stops: Sequence[str]
) -> ReplyReader:
    """For one reply to a chat or, where `body` has no messages, to a prompt of plain text."""
    chat = "messages" in body
    tools = body.get("tools") if body.get("tool_choice") != "none" else None
    functions = [tool["function"] for tool in tools or () if isinstance(tool.get("function"), dict)]
    return ReplyReader(
        tokenizer,
        family_of(tokenizer) if chat else None,
        stop_ids=stop_ids,
        stops=stops,
        schemas={str(f.get("name")): f.get("parameters") or {} for f in functions} or None,
        thinking=chat and decode(tokenizer, prompt[-8:]).rstrip().endswith("<think>"),
        call_id=lambda _: new_call_id("openai_chat"),
    )


def delta_of(event: Event, number: int | None = None) -> dict[str, Any]:
    """The fields of a message that an event adds to. `number`: of a call, in a stream."""
    match event:
        case TextDelta(text):
            return {"content": text}
        case ReasoningDelta(text):
            return {"reasoning_content": text}
    call = {"id": event.id, "type": "function", "function": {"name": event.name, "arguments": event.arguments}}
    return {"tool_calls": [call if number is None else {"index": number, **call}]}


def message_of(events: Iterable[Event]) -> dict[str, Any]:
    """A whole message; `content` is null where there is nothing but calls."""
    message: dict[str, Any] = {"role": "assistant", "content": None}
    for event in events:
        for name, value in delta_of(event).items():
            message[name] = message[name] + value if message.get(name) else value
    if message["content"] is None and "tool_calls" not in message:
        message["content"] = ""
    return message
