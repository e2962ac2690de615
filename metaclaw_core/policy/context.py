"""What is left out of a conversation that is longer than the model's context.

Design: a call and its results go together, the oldest first; then other old messages. Never left out are the system
prompt, the first human message (it says what all this is about), the newest call and its results, and what came after the
last finished answer from the human. When a prompt does not fit, it is brought down to `TARGET` of the room at once, and
what was left out stays left out for the session: a prompt that changed its beginning at each request would never be a
continuation of the one before, and nothing of it could be reused.

The choice is kept as keys of what was left out. They depend on the content alone, so they hold whatever the client puts
in front or between.

Limits: lengths are estimated from characters; the caller measures the result and asks again if it is still too long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256

from metaclaw_core.model import Message, Reasoning, Role, Text, ToolCall, ToolResult
from metaclaw_core.policy.canonical import reply_key

TARGET = 0.7  # of the room, once it is exceeded


@dataclass(frozen=True, slots=True)
class Unit:
    """What is left out together: messages ``[start, end)``."""

    key: str
    start: int
    end: int
    pair: bool  # a call and its results


def units(messages: Sequence[Message]) -> list[Unit]:
    """All that may ever be left out, in the order of the conversation."""
    first_human = next((i for i, m in enumerate(messages) if m.role is Role.USER), -1)
    found: list[Unit] = []
    seen: Counter[str] = Counter()
    i = 0
    while i < len(messages):
        start, message = i, messages[i]
        i += 1
        if message.role in (Role.SYSTEM, Role.DEVELOPER) or start == first_human:
            continue
        pair = message.role is Role.ASSISTANT and bool(message.tool_calls)
        while pair and i < len(messages) and messages[i].role is Role.TOOL:
            i += 1
        key = _key(messages[start:i])
        seen[key] += 1
        found.append(Unit(f"{key}:{seen[key]}", start, i, pair))
    return found


def leave_out(messages: Sequence[Message], left_out: Collection[str]) -> tuple[list[Message], int]:
    """The messages without those units, and how many units that were."""
    gone = [unit for unit in units(messages) if unit.key in left_out] if left_out else []
    drop = {i for unit in gone for i in range(unit.start, unit.end)}
    return [message for i, message in enumerate(messages) if i not in drop], len(gone)


def choose(messages: Sequence[Message], left_out: Collection[str], *, length: int, target: int) -> set[str]:
    """The keys of what else to leave out so that a prompt of `length` tokens has about `target`. Empty: nothing is left.

    `length` is that of the prompt without what is in `left_out` already.
    """
    all_units = units(messages)
    answered = max((i for i, m in enumerate(messages) if m.role is Role.ASSISTANT and not m.tool_calls), default=-1)
    newest = next((unit for unit in reversed(all_units) if unit.pair), None)
    pairs = [unit for unit in all_units if unit.pair and unit is not newest]
    others = [unit for unit in all_units if not unit.pair and unit.end <= answered + 1]
    present = [message for unit in all_units if unit.key not in left_out for message in messages[unit.start : unit.end]]
    fixed = [m for i, m in enumerate(messages) if not any(u.start <= i < u.end for u in all_units)]
    tokens_per_char = length / max(1, sum(map(_size, present)) + sum(map(_size, fixed)))
    chosen: set[str] = set()
    for unit in (*pairs, *others):
        if length <= target:
            break
        if unit.key not in left_out:
            chosen.add(unit.key)
            length -= max(1, int(tokens_per_char * sum(map(_size, messages[unit.start : unit.end]))))
    return chosen


def _key(messages: Sequence[Message]) -> str:
    pieces = [
        reply_key(message) + message.role.value + "".join(result.text for result in message.tool_results)
        for message in messages
    ]
    return sha256("\0".join(pieces).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _size(message: Message) -> int:
    """Characters, with something for the marks around."""
    size = 16
    for part in message.parts:
        match part:
            case Text() | Reasoning() | ToolResult():
                size += len(part.text)
            case ToolCall():
                size += len(part.name) + len(part.arguments)
    return size
