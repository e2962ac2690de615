"""What the newest exchanges of each caller said, so that the next one is read by what it adds to them.

Design: an agent sends its history with every request, and all but its end has been searched, parsed and hashed before.
`Recall` keeps the last requests of each conversation: the body with the places of its items (``wire.reread``), the ids
of its messages, and which marks are in it. A new body is compared with the one that it most likely continues. The result
is exactly what a full parse and a full hash give, whatever is kept here: a message is taken over where its bytes are the
same, an id where the message is the same and stands behind the same ids, and a mark is looked for where the bytes differ.

What is in the database it does not know; `Recalled.shared` only says which id is worth asking for.

Bounded in bodies and their bytes, about three times of which it takes in all; the least recently used go first. Used by
one thread at a time. Nothing of it reaches a disk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from metaclaw_core.model import Message, Role, Text
from metaclaw_core.prefix import Likeness, common_suffix, longest
from metaclaw_core.store.chain import blob_id, chain_ids
from metaclaw_core.wire.base import Dialect
from metaclaw_core.wire.reread import Reading, read, reread

MAX_ENTRIES = 64
MAX_BYTES = 8 << 20


@dataclass(slots=True)
class Recalled:
    """A request as it was read, and what is derived from its messages alone."""

    reading: Reading
    ids: list[str]  # (messages,) of the chain that begins with the first message
    shared: int  # how many of `ids` were those of the request it was read by; 0: of none
    tools: str | None  # blob id of the tools; None: there are none
    marks: Collection[bytes] = ()  # those of `has` that are in the body


@dataclass(frozen=True, slots=True)
class Near:
    """A request before, and how far a new body is the same."""

    recalled: Recalled
    like: Likeness


def has(body: bytes, mark: bytes, near: Near | None) -> bool:
    """Is `mark` in `body`? Looks only at what differs from a body that was without it; `near` is of this very body."""
    if near is None or mark in near.recalled.marks:
        return mark in body
    beyond = len(mark) - 1
    start, end = near.like.prefix - beyond, len(body) - near.like.suffix + beyond
    return body.find(mark, max(0, start), end) >= 0


class Recall:
    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], Recalled] = OrderedDict()  # by caller and opening
        self.size = 0  # bytes of bodies

    def near(self, dialect: Dialect, body: bytes, path: str, caller: str) -> Near | None:
        """The request of `caller` whose body has most in common with the start of `body`; None: there is none."""
        own = [
            recalled
            for (other, _), recalled in reversed(self._kept.items())
            if other == caller and recalled.reading.dialect is dialect and recalled.reading.path == path
        ]
        place, prefix = longest((recalled.reading.body for recalled in own), body)
        if place < 0:
            return None
        old = own[place].reading.body
        return Near(own[place], Likeness(old, prefix, common_suffix(old, body, min(len(old), len(body)) - prefix)))

    def read(self, dialect: Dialect, body: bytes, path: str, near: Near | None) -> Recalled:
        """What `body` says. Raises WireError as the dialect's `parse_request` does. `near` is of this very body."""
        old = near.recalled if near is not None else None
        reading = (near and reread(near.recalled.reading, body, path, near.like)) or read(dialect, body, path)
        request = reading.request
        same = old.reading.request if old is not None else None
        shared = _same(same.messages, request.messages) if same is not None else 0
        ids = old.ids[:shared] if old is not None else []
        ids += chain_ids(request.messages[shared:], ids[-1] if ids else None)
        if old is not None and same is not None and request.tools is same.tools:
            tools = old.tools
        else:
            tools = blob_id([tool.raw for tool in request.tools]) if request.tools else None
        return Recalled(reading, ids, shared, tools)

    def keep(self, caller: str, recalled: Recalled) -> None:
        """`recalled` as the newest request of its conversation. One that has no places can't help to read another."""
        reading = recalled.reading
        if reading.close < 0 or not recalled.ids or len(reading.body) > MAX_BYTES:
            return
        key = (caller, _opening(recalled))
        self._drop(self._kept.pop(key, None))
        self._kept[key] = recalled
        self.size += len(reading.body)
        while self._kept and (len(self._kept) > MAX_ENTRIES or self.size > MAX_BYTES):
            self._drop(self._kept.popitem(last=False)[1])

    def _drop(self, recalled: Recalled | None) -> None:
        if recalled is not None:
            self.size -= len(recalled.reading.body)


def _same(old: Sequence[Message], new: Sequence[Message]) -> int:
    """The number of leading messages that have the same ids: the very same values, or equal text."""
    count = 0
    for before, now in zip(old, new, strict=False):
        if before is not now and not _same_text(before, now):
            break
        count += 1
    return count


def _same_text(a: Message, b: Message) -> bool:
    """Of messages of nothing but text: other parts may be equal in Python and not in JSON (1 and True)."""
    if a.role is not b.role or len(a.parts) != len(b.parts):
        return False
    return all(type(p) is Text and type(q) is Text and p.text == q.text for p, q in zip(a.parts, b.parts, strict=True))


def _opening(recalled: Recalled) -> str:
    """Tells conversations apart: the id of the first message that isn't the system's."""
    messages = recalled.reading.request.messages
    place = next((i for i, m in enumerate(messages) if m.role not in (Role.SYSTEM, Role.DEVELOPER)), 0)
    return recalled.ids[place]
