"""The last requests of each session, kept to read the next ones by.

Design: see ``wire.reread`` for why the answer is exact whatever is kept here; this only chooses. A caller's
last sessions are compared with a new body at memory speed, and the one that begins most like it is built upon: the
request before it in the same session as a rule, for the first request of a session one of another.

Bounded in entries and bytes, the least recently used going first. For use on the event loop only.
"""

from __future__ import annotations

from collections import OrderedDict

from metaclaw_core.prefix import Likeness, common_suffix, longest
from metaclaw_core.wire.base import Dialect
from metaclaw_core.wire.reread import Reading, read, reread

MAX_ENTRIES = 24
MAX_BYTES = 4 << 20  # of bodies; what was read from them takes twice that


class Recent:
    def __init__(self) -> None:
        self._readings: OrderedDict[str, tuple[str, Reading]] = OrderedDict()  # by session; with its caller
        self._bytes = 0

    def read(self, dialect: Dialect, body: bytes, path: str, caller: str) -> tuple[Reading, Likeness | None]:
        """What `body` says, and how far it is a body before it. Raises WireError as the dialect's `parse_request` does."""
        own = [
            reading
            for other, reading in reversed(self._readings.values())
            if other == caller and reading.dialect is dialect and reading.path == path
        ]
        place, prefix = longest((reading.body for reading in own), body)
        if place < 0:
            return read(dialect, body, path), None
        old = own[place]
        like = Likeness(old.body, prefix, common_suffix(old.body, body, min(len(old.body), len(body)) - prefix))
        return reread(old, body, path, like) or read(dialect, body, path), like

    def keep(self, session: str, caller: str, reading: Reading) -> None:
        """`reading` as the newest request of `session`, a key that tells callers apart, too."""
        self._drop(self._readings.pop(session, None))
        self._readings[session] = (caller, reading)
        self._bytes += len(reading.body)
        while self._readings and (len(self._readings) > MAX_ENTRIES or self._bytes > MAX_BYTES):
            self._drop(self._readings.popitem(last=False)[1])

    def _drop(self, kept: tuple[str, Reading] | None) -> None:
        if kept is not None:
            self._bytes -= len(kept[1].body)
