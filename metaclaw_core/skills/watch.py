"""Watching the index file from the proxy, which must take over a new one within two seconds and survive a bad one.

Design: a look is one `stat`; only a file with another time, inode or size is read, in whatever thread calls `poll`.
What is read becomes `current` by one assignment, so a flow that took the old index keeps a whole one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from metaclaw_core.skills.index import Index
from metaclaw_core.skills.indexfile import IndexDamaged, load_index


class IndexWatcher:
    """The newest good index of a file: `current` is replaced, never changed, and is empty until there is a file.

    `poll` looks once; `start` looks every `interval` seconds in a daemon thread until `stop`. A damaged or vanished
    file leaves `current` as it was and `problem` says why; `report`, if given, is told the same once.
    """

    def __init__(self, path: Path, *, interval: float = 1.0, report: Callable[[str], None] | None = None) -> None:
        self.current = Index()
        self.problem: str | None = None
        self._path = path
        self._interval = interval
        self._report = report
        self._seen: tuple[int, int, int] | None = None  # mtime in ns, inode, size
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

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

    def start(self) -> None:
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="metaclaw-skill-index", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while True:
            try:
                self.poll()
            except Exception as e:  # noqa: BLE001  the thread's boundary: it must live to read the next file
                self._fail(f"{self._path} could not be taken over ({e!r})")
            if self._stop.wait(self._interval):
                return

    def _fail(self, problem: str) -> None:
        problem = problem.removesuffix(".")
        if self.problem != problem:
            self.problem = problem
            if self._report is not None:
                self._report(problem)
