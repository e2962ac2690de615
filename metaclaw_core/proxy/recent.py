"""The last requests of each session, kept to read the next ones by (see ``wire.kept``). For use on the event loop only."""

from __future__ import annotations

from metaclaw_core.prefix import Likeness
from metaclaw_core.wire.base import Dialect
from metaclaw_core.wire.kept import Kept
from metaclaw_core.wire.reread import Reading, read, reread

MAX_ENTRIES = 24
MAX_BYTES = 4 << 20  # of bodies; what was read from them takes twice that


class Recent(Kept[None]):
    def __init__(self) -> None:
        super().__init__(MAX_ENTRIES, MAX_BYTES)

    def read(self, dialect: Dialect, body: bytes, path: str, caller: str) -> tuple[Reading, Likeness | None]:
        """What `body` says, and how far it is a body before it. Raises WireError as the dialect's `parse_request` does."""
        near = self.near(dialect, body, path, caller)
        if near is None:
            return read(dialect, body, path), None
        return reread(near.reading, body, path, near.like) or read(dialect, body, path), near.like

    def keep(self, session: str, caller: str, reading: Reading) -> None:
        """`reading` as the newest request of `session`, a key that tells callers apart, too."""
        self.put(session, caller, reading, None)
