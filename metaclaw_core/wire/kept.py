"""Requests that were read, kept to read the next ones by.

Design: see ``reread`` for why what is read is exact whatever is kept here; this only keeps and chooses. A caller's requests are
compared with a new body at memory speed, and the one that begins most like it is built upon: the request before it in the same
conversation as a rule, for the first request of a conversation one of another.

Bounded in entries and bytes of bodies, the least recently used going first; about three times the bytes are held in all. Used by
one thread at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

from metaclaw_core.prefix import Likeness, common_suffix, likeness, longest
from metaclaw_core.wire.base import Dialect
from metaclaw_core.wire.reread import Reading

_NEARLY_ALL = 0.9  # of a new body: no other request can have much more in common with it


class Near[T](NamedTuple):
    """A request before, what was kept with it, and how far a new body is the same."""

    reading: Reading
    value: T
    like: Likeness


class Kept[T]:
    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._readings: OrderedDict[Hashable, tuple[str, Reading, T]] = OrderedDict()  # by conversation; with its caller
        self._bytes = 0

    @property
    def size(self) -> int:
        """Bytes of bodies."""
        return self._bytes

    def near(self, dialect: Dialect, body: bytes, path: str, caller: str) -> Near[T] | None:
        """The request of `caller` whose body has most in common with `body`, or nearly; None: there is none."""
        newest: Near[T] | None = None
        own: list[tuple[Reading, T]] = []
        for other, reading, value in reversed(self._readings.values()):
            if other != caller or reading.dialect is not dialect or reading.path != path:
                continue
            if newest is None:  # mostly it is the one
                newest = Near(reading, value, likeness(reading.body, body))
                if newest.like.shared >= _NEARLY_ALL * len(body):
                    return newest
            own.append((reading, value))
        if newest is None:
            return None
        place, prefix = longest((reading.body for reading, _ in own), body)
        if place == 0:
            return newest
        reading, value = own[place]
        suffix = common_suffix(reading.body, body, min(len(reading.body), len(body)) - prefix)
        return Near(reading, value, Likeness(reading.body, prefix, suffix))

    def put(self, conversation: Hashable, caller: str, reading: Reading, value: T) -> None:
        """`reading` as the newest request of `conversation`, a key that tells callers apart, too."""
        self._drop(self._readings.pop(conversation, None))
        self._readings[conversation] = (caller, reading, value)
        self._bytes += len(reading.body)
        while self._readings and (len(self._readings) > self._max_entries or self._bytes > self._max_bytes):
            self._drop(self._readings.popitem(last=False)[1])

    def _drop(self, kept: tuple[str, Reading, T] | None) -> None:
        if kept is not None:
            self._bytes -= len(kept[1].body)
