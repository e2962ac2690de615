"""Knowing the next request of a tool loop without parsing it whole.

Design: in a tool loop the body is the one before with other messages at the end of its history: what stands
before and after them is byte for byte the same. So the bodies are compared at memory speed, and only the
messages that differ are decoded, in the old body and in the new one. Both ends must be complete: the decoded
items close the list, and everything after it is the same again. Since the old body parsed as a request of its
dialect, so does the new one, and system prompt, session and tools are those that were found there. It counts
as a continuation only if tool results have come and no human speaks in the new messages. Everything else, and
every doubt, is left to the full parse.

Limits: needs the client's trace id, which OpenClaw sends; without one each request is parsed. The raw bytes
``,{"`` are taken for the start of a list item; they can stand at the end of a JSON string too (``"…,{"``), and
then what is decoded from there has no role and is refused.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from metaclaw_core.agents.base import Identity
from metaclaw_core.agents.envelope import CARRIER
from metaclaw_core.model import Kind
from metaclaw_core.prefix import Known
from metaclaw_core.wire.base import Slot

MAX_ENTRIES = 64
MAX_BYTES = 8 << 20
_CANDIDATES = 3
_decode = json.JSONDecoder().raw_decode
_RESULT_TYPES = frozenset({"function_call_output", "custom_tool_call_output"})
_MODEL_TYPES = frozenset({"function_call", "custom_tool_call", "reasoning"})


@dataclass(frozen=True, slots=True)
class Seen:
    """A request that was parsed whole, or proven to continue one that was."""

    known: Known
    identity: Identity
    session: str  # key of the session state
    slot: Slot | None  # in this body; None: it was not looked for, as there was no block
    messages: int  # about: since the full parse each item counts as one, whatever its dialect makes of it


class Continuations:
    """The last served request of each turn, by caller and trace id. Bounded; used on the event loop only."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, Seen] = OrderedDict()
        self._bytes = 0

    def remember(self, key: str, seen: Seen) -> None:
        old = self._seen.pop(key, None)
        if old is not None:
            self._bytes -= len(old.known.body)
        self._seen[key] = seen
        self._bytes += len(seen.known.body)
        while self._seen and (len(self._seen) > MAX_ENTRIES or self._bytes > MAX_BYTES):
            _, dropped = self._seen.popitem(last=False)
            self._bytes -= len(dropped.known.body)

    def next_of(self, key: str, body: bytes) -> Seen | None:
        """`body` as the continuation of the last request under `key`; None if that isn't proven."""
        seen = self._seen.get(key)
        if seen is None:
            return None
        follows = _follow(seen, body)
        if follows is not None:
            self.remember(key, follows)
        return follows


def _follow(seen: Seen, body: bytes) -> Seen | None:
    old = seen.known.body
    shared = seen.known.common_prefix(body)
    rest = seen.known.common_suffix(body, min(len(old), len(body)) - shared)
    if 2 * (shared + rest) < len(old):
        return None  # another session under the same trace, as a subagent's is
    start = shared + 3
    for _ in range(_CANDIDATES):
        start = body.rfind(b',{"', 0, start) + 1
        if not start:
            return None
        before, after = _items(old, start), _items(body, start)
        if before and after:
            break
    else:
        return None
    (old_items, old_end), (new_items, new_end) = before, after
    if not body.startswith(old[old_end:], new_end) or len(body) - new_end != len(old) - old_end:
        return None
    if any(_speaks(item) for item in (*old_items, *new_items)) or _results(new_items) <= _results(old_items):
        return None
    slot = seen.slot
    if slot is not None and slot.at >= start:
        if slot.at < old_end:
            return None
        slot = replace(slot, at=slot.at + new_end - old_end)
    kind = Kind.TOOL if seen.identity.kind is Kind.MAIN else seen.identity.kind
    return Seen(
        known=Known(body),
        identity=seen.identity if kind is seen.identity.kind else replace(seen.identity, kind=kind),
        session=seen.session,
        slot=slot,
        messages=seen.messages + len(new_items) - len(old_items),
    )


def _items(body: bytes, start: int) -> tuple[list[dict[str, Any]], int] | None:
    """The objects from `start` to the end of their list, and the byte after its bracket; None if it isn't so."""
    try:
        text = body[start:].decode()
        items, at = [], 0
        while True:
            item, at = _decode(text, at)
            if not isinstance(item, dict) or not (_role(item) or item.get("type") in _RESULT_TYPES | _MODEL_TYPES):
                return None
            items.append(item)
            if text[at : at + 1] == ",":
                at += 1
                continue
            if text[at : at + 1] != "]":
                return None
            # Characters to bytes: what follows the list is counted from the end, where nothing was decoded.
            return items, len(body) - len(text[at + 1 :].encode())
    except (ValueError, RecursionError):
        return None


def _role(item: dict[str, Any]) -> str | None:
    role = item.get("role")
    return role if isinstance(role, str) else None


def _parts(item: dict[str, Any]) -> Iterable[Any]:
    content = item.get("content", item.get("parts"))
    return content if isinstance(content, list) else ()


def _speaks(item: dict[str, Any]) -> bool:
    """Might a human (or a system prompt) speak here? Anything in a user's role that is neither a result nor a carrier."""
    role = _role(item)
    if role in ("assistant", "model", "tool") or (role is None and item.get("type") in _RESULT_TYPES | _MODEL_TYPES):
        return False
    if role != "user":
        return True
    content = item.get("content")
    if isinstance(content, str):
        return not content.startswith(CARRIER)
    for part in _parts(item):
        if not isinstance(part, dict):
            return True
        text = part.get("text")
        if isinstance(text, str):
            if not text.startswith(CARRIER):
                return True
        elif part.get("type") != "tool_result" and "functionResponse" not in part:
            return True
    return False


def _results(items: list[dict[str, Any]]) -> int:
    """How many hold a tool's result. More than before means a round of a tool loop; as many, a list that we took for it."""
    return sum(map(_is_result, items))


def _is_result(item: dict[str, Any]) -> bool:
    return (
        _role(item) == "tool"
        or item.get("type") in _RESULT_TYPES
        or any(isinstance(p, dict) and (p.get("type") == "tool_result" or "functionResponse" in p) for p in _parts(item))
    )
