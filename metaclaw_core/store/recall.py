"""What the newest exchanges of each caller said, so that the next one is read by what it adds to them.

Design: an agent sends its history with every request, and all but its end has been searched, parsed and hashed before.
`Recall` keeps the last requests of each conversation (``wire.kept``): the body with the places of its items
(``wire.reread``), the ids of its messages, and which marks are in it. The result is exactly what a full parse and a full
hash give, whatever is kept here: a message is taken over where its bytes are the same, an id where the message is the same
and stands behind the same ids, and a mark is looked for where the bytes differ.

What is in the database it does not know; `Recalled.shared` only says which id is worth asking for. Nothing of it reaches a
disk.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from metaclaw_core.model import Message, Role, Text
from metaclaw_core.store.chain import blob_id, chain_ids
from metaclaw_core.wire.base import Dialect
from metaclaw_core.wire.kept import Kept, Near
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


def has(body: bytes, mark: bytes, near: Near[Recalled] | None) -> bool:
    """Is `mark` in `body`? Looks only at what differs from a body that was without it; `near` is of this very body."""
    if near is None or mark in near.value.marks:
        return mark in body
    beyond = len(mark) - 1
    start, end = near.like.prefix - beyond, len(body) - near.like.suffix + beyond
    return body.find(mark, max(0, start), end) >= 0


class Recall(Kept[Recalled]):
    def __init__(self) -> None:
        super().__init__(MAX_ENTRIES, MAX_BYTES)

    def read(self, dialect: Dialect, body: bytes, path: str, near: Near[Recalled] | None) -> Recalled:
        """What `body` says. Raises WireError as the dialect's `parse_request` does. `near` is of this very body."""
        reading = (near and reread(near.reading, body, path, near.like)) or read(dialect, body, path)
        request = reading.request
        shared = _same(near.reading.request.messages, request.messages) if near is not None else 0
        ids = near.value.ids[:shared] if near is not None else []
        ids += chain_ids(request.messages[shared:], ids[-1] if ids else None)
        if near is not None and request.tools is near.reading.request.tools:
            tools = near.value.tools
        else:
            tools = blob_id([tool.raw for tool in request.tools]) if request.tools else None
        return Recalled(reading, ids, shared, tools)

    def keep(self, caller: str, recalled: Recalled) -> None:
        """`recalled` as the newest request of its conversation. One that has no places can't help to read another."""
        reading = recalled.reading
        if reading.close < 0 or not recalled.ids or len(reading.body) > MAX_BYTES:
            return
        self.put((caller, _opening(recalled)), caller, reading, recalled)


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
