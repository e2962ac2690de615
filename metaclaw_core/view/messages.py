"""Messages as rows for a page: who speaks, and each part as a heading and plain text.

Design: nothing is interpreted: tool arguments and parts of types we don't know are shown as they were sent, opaque
reasoning only as being there. A part is cut after so many characters with a word on how many are left, because a page
that holds a whole repository helps nobody.

Limits: pictures and files are named, not shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metaclaw_core.model import Message, Opaque, Part, Reasoning, Role, Text, ToolCall, ToolResult
from metaclaw_core.wire.jsonio import dumps

_CHARS = 20_000
_RAW_CHARS = 2_000


@dataclass(frozen=True, slots=True)
class Shown:
    heading: str  # "" for what was simply said
    text: str
    left_out: int = 0  # characters


@dataclass(frozen=True, slots=True)
class Said:
    role: str
    parts: tuple[Shown, ...]
    chars: int


def said(message: Message) -> Said:
    parts = tuple(_shown(part) for part in message.parts)
    return Said(message.role.value, parts, sum(len(part.text) + part.left_out for part in parts))


def split(
    messages: Sequence[Message], user_text: str | None
) -> tuple[tuple[Said, ...], tuple[Said, ...], tuple[Said, ...]]:
    """The system prompt, what went before, and what belongs to the human's last message.

    That is the last one with `user_text` in it, since clients send messages of their own in the user's place, too.
    """
    head = 0
    while head < len(messages) and messages[head].role in (Role.SYSTEM, Role.DEVELOPER):
        head += 1
    users = [i for i in range(head, len(messages)) if messages[i].role is Role.USER]
    asking = [i for i in users if user_text and user_text in messages[i].text]
    last = (asking or users or [head])[-1]
    rows = tuple(said(message) for message in messages)
    return rows[:head], rows[head:last], rows[last:]


def _shown(part: Part) -> Shown:
    match part:
        case Text():
            return _cut("", part.text)
        case Reasoning():
            return _cut("thinking", part.text or "(kept by the provider, not readable)")
        case ToolCall():
            return _cut(f"calls {part.name}", part.arguments)
        case ToolResult():
            failed = ", an error" if part.is_error else ""
            return _cut(f"result of {part.name or part.call_id or 'a tool'}{failed}", part.text)
        case Opaque():
            return _cut(part.type, dumps(part.raw), _RAW_CHARS)


def _cut(heading: str, text: str, limit: int = _CHARS) -> Shown:
    return Shown(heading, text[:limit], max(0, len(text) - limit))
