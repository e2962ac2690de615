"""From chat messages to token ids and from tokens back to text and tool calls."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from metaclaw_core.engine.errors import EngineError

_OPEN = "<tool_call>"
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


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


@dataclass(frozen=True)
class ToolCalls:
    text: str | None
    """What stood before the first call; None if nothing."""
    calls: list[dict[str, Any]]


def parse_tool_calls(text: str) -> ToolCalls | None:
    """The calls of a reply, or None if there is none or one of them is malformed."""
    found = list(_CALL.finditer(text))
    if not found or text.count(_OPEN) != len(found):
        return None
    calls = []
    for match in found:
        try:
            value = json.loads(match[1])
            function = {"name": value["name"], "arguments": json.dumps(value.get("arguments", {}), ensure_ascii=False)}
        except (ValueError, TypeError, KeyError):
            return None
        if not isinstance(function["name"], str):
            return None
        calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
    return ToolCalls(text[: found[0].start()].strip() or None, calls)


def held_back(text: str, stops: Sequence[str], *, tools: bool) -> int:
    """How many characters at the end of a growing text can't be sent yet: they may be cut off or be a tool call."""
    marks = [*stops, _OPEN] if tools else list(stops)
    keep = 0
    for mark in marks:
        if (at := text.find(mark)) >= 0:
            keep = max(keep, len(text) - at)
        else:
            keep = max([keep, *(n for n in range(1, min(len(mark), len(text) + 1)) if text.endswith(mark[:n]))])
    if tools:  # blanks before a call are dropped with it
        keep = max(keep, len(text) - len(text[: len(text) - keep].rstrip()))
    return keep


class Detokenizer:
    """Text of a growing list of tokens; a character that is not complete yet is left out."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._context: list[int] = []  # the tokens before, whose neighbours may decode differently without them
        self.text = ""

    def push(self, token: int) -> str:
        """All text so far."""
        self._pending.append(token)
        before = self._decode(self._context)
        after = self._decode(self._context + self._pending)
        if not after.endswith("\ufffd"):
            self.text += after[len(before) :]
            self._context, self._pending = self._pending, []
        return self.text

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
