"""Text beside what a human said: where it goes in a body, and taking it out again.

Design: what ``splice`` does at the end of the system prompt, at the end of one of the history's messages. Where that
message lies in the bytes is known from the `Reading`, so only the message itself is decoded. The pieces have the same
seal, and are recognised by it at the end of a user's message and nowhere else.

Limits: a body whose history is no list (a bare `input` of Responses), and dialects without `HasHistory`, have no place.
"""

from __future__ import annotations

from dataclasses import replace

from metaclaw_core.errors import SpliceError, WireError
from metaclaw_core.model import Role
from metaclaw_core.wire import splice
from metaclaw_core.wire.base import Dialect, Slot
from metaclaw_core.wire.reread import Reading, read


def slot_beside(reading: Reading, message: int) -> Slot:
    """The end of the text of ``reading.request.messages[message]``, a user's. Raises SpliceError."""
    if reading.close < 0:
        raise SpliceError("the history is not known item by item")
    if reading.request.messages[message].role is not Role.USER:
        raise SpliceError("the message is not a user's")
    # An item may give several messages, and in Responses several items one of the assistant (-1: all but the first).
    item = max((i for i, place in enumerate(reading.places[:-1]) if 0 <= place <= message), default=None)
    if item is None:
        raise SpliceError("the message is not in the history")
    start = reading.starts[item]
    slot = splice.slot_message(reading.dialect.name, reading.body[start : reading.ends[item]])
    return replace(slot, at=slot.at + start)


def without_beside(dialect: Dialect, body: bytes, path: str) -> tuple[bytes, list[str]]:
    """The body as it was, and the texts that had been put beside what the human said, oldest first."""
    try:
        reading = read(dialect, body, path)
    except WireError:
        return body, []
    texts: list[str] = []
    for index in range(len(reading.request.messages) - 1, -1, -1):  # from the end, so that the places in front stay
        try:
            removed = splice.remove(body, slot_beside(reading, index))
        except SpliceError:
            continue
        if removed is not None:
            body, text = removed
            texts.insert(0, text)
    return body, texts
