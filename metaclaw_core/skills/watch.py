"""Watching the index file from the proxy, which must take over a new one within two seconds and survive a bad one.

Design: a look is one `stat`; only a file with another time, inode or size is read, in whatever thread calls `poll`.
What is read becomes `current` by one assignment, so a flow that took the old index keeps a whole one.
"""

from __future__ import annotations

from pathlib import Path

from metaclaw_core.skills.index import Index
from metaclaw_core.skills.indexfile import IndexDamaged, load_index


class IndexWatcher:
    """The newest good index of a file: `current` is replaced, never changed, and is empty until there is a file.

    A damaged or vanished file leaves `current` as it was and `problem` says why.
    """

    def __init__(self, path: Path) -> None:
        self.current = Index()
        self.problem: str | None = None
        self._path = path
        self._seen: tuple[int, int, int] | None = None  # mtime in ns, inode, size

    def poll(self) -> bool:
        """Reads the file if it is another one than last time; True if `current` is new."""
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            if self._seen is not None:
                self._fail(f"{self._path} is gone")
            self._seen = None
            return False
        except OSError as e:
            self._fail(f"{self._path} can't be read: {e.strerror}")
            return False
        seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if seen == self._seen:
            return False
        self._seen = seen
        try:
            self.current = load_index(self._path)
        except IndexDamaged as e:
            self._fail(str(e))
            return False
        except OSError as e:
            self._seen = None  # perhaps a moment's matter: look again
            self._fail(f"{self._path} can't be read: {e.strerror}")
            return False
        self.problem = None
        return True

    def _fail(self, problem: str) -> None:
        self.problem = problem.removesuffix(".")
