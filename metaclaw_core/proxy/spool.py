"""The writer thread between the event loop and the spool file.

Design: the loop calls `put`, which only appends to a queue; one thread commits what has gathered
every 20 ms or at 64 rows, so an exchange is on disk at most about 50 ms after its response, also where
the loop is busy (measured; a commit takes up to some 15 ms then, for want of the interpreter). Session
state goes through the same thread, so it never reads or writes on the loop.

A commit that fails (disk full, file read-only) is tried again with a growing pause while new rows
queue up in memory, up to a bound in bytes; beyond it the newest are dropped and counted. A spool file
that was removed is made anew; one that turns out to be damaged is left to the worker's report and the
next one is begun. A row that can't be written for its own sake is dropped and counted, so that it
holds up no other. The agent's traffic is never touched by any of this. Bodies are redacted in
`SpoolWriter.append`, before a commit.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from metaclaw_core.model import Exchange
from metaclaw_core.prefix import Likeness
from metaclaw_core.proxy.sessions import SessionFile, SessionRow, Snapshot, row_of
from metaclaw_core.store.spool import SpoolError, SpoolWriter

logger = logging.getLogger(__name__)

GROUP_SECONDS = 0.02
GROUP_ROWS = 64
SESSIONS_SECONDS = 0.08  # between writes of session state, of which only the last counts
MAX_QUEUED_BYTES = 256 << 20
_RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)
_ROW_BYTES = 2048  # what a queued row holds beside its bodies, roughly


type _Queued = tuple[Exchange, Likeness | None]


class Spool:
    """`put` from the event loop; everything else happens in the thread."""

    def __init__(self, path: Path, sessions_path: Path, *, max_bytes: int = MAX_QUEUED_BYTES) -> None:
        """`max_bytes`: what may wait in memory while the disk refuses."""
        self.path = path
        self._sessions_path = sessions_path
        self._max_bytes = max_bytes
        self.dropped = 0  # exchanges lost: the disk refused them for too long, or they could not be written at all
        self.written = 0
        self.last_error: str | None = None
        self._rows: deque[_Queued] = deque()
        self._sessions: dict[str, Snapshot] = {}
        self._queued_bytes = 0
        self._lock = threading.Lock()
        self._wake = threading.Event()  # there is something to write
        self._full = threading.Event()  # and enough of it for a group, or somebody waits: don't gather any longer
        self._idle = threading.Condition(self._lock)
        self._busy = False
        self._closing = threading.Event()
        self._files = 1
        self._writer: SpoolWriter | None = None
        self._session_file: SessionFile | None = None
        self._thread = threading.Thread(target=self._run, name="metaclaw-spool", daemon=True)
        self._thread.start()

    def put(self, exchange: Exchange, like: Likeness | None = None) -> None:
        """Queue one exchange; returns at once. `like`: of its request body to one before it, where that is known."""
        size = _size(exchange)
        with self._lock:
            if self._queued_bytes + size > self._max_bytes and self._rows:
                self.dropped += 1
                if self.dropped == 1:
                    logger.warning(
                        "metaclaw: %s can't be written (%s); exchanges are being dropped. Traffic goes on.",
                        self.path,
                        self.last_error or "the disk is too slow",
                    )
                return
            self._rows.append((exchange, like))
            self._queued_bytes += size
            full = len(self._rows) >= GROUP_ROWS
        self._wake.set()
        if full:
            self._full.set()

    def put_session(self, snapshot: Snapshot) -> None:
        """Queue the state of one session; a later state of the same session replaces it."""
        with self._lock:
            self._sessions[snapshot.key] = snapshot
        self._wake.set()

    @property
    def queued(self) -> int:
        return len(self._rows)

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until everything that was put is committed; False after `timeout` seconds."""
        self._full.set()
        self._wake.set()
        with self._idle:
            self._idle.wait_for(lambda: self._settled or not self._thread.is_alive(), timeout)
            return self._settled

    @property
    def _settled(self) -> bool:
        return not self._rows and not self._sessions and not self._busy

    def close(self, timeout: float = 5.0) -> None:
        """Commit the rest and end the thread."""
        self._closing.set()
        self._full.set()
        self._wake.set()
        self._thread.join(timeout)
        if self._rows:
            logger.warning("metaclaw: %d exchanges could not be written to %s: %s", len(self._rows), self.path, self.last_error)

    # --- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        failures, sessions_due = 0, 0.0
        with contextlib.suppress(SpoolError):  # the first exchange says so, and tries again
            self._writer = SpoolWriter(self.path)  # now, since making a file takes longer than a commit
        while True:
            self._wake.wait()
            self._full.wait(GROUP_SECONDS)  # gather a group
            due = self._full.is_set() or self._closing.is_set() or time.monotonic() >= sessions_due
            with self._lock:
                self._wake.clear()
                self._full.clear()
                rows = list(islice(self._rows, GROUP_ROWS * 4))
                sessions = list(self._sessions.values()) if due else []
                self._busy = bool(rows or sessions)
            problem = self._write_rows(rows) or self._write_sessions(sessions)
            if sessions:
                sessions_due = time.monotonic() + SESSIONS_SECONDS
            failures = failures + 1 if problem else 0
            if problem and failures == 1:
                logger.warning("metaclaw: %s; trying again. Traffic goes on.", problem)
            self.last_error = problem
            with self._idle:
                self._busy = False
                more = bool(self._rows or self._sessions)
                self._idle.notify_all()
            if self._closing.is_set() and (not more or failures > 1):
                break
            if problem:
                self._closing.wait(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS)) - 1])
            if more:
                self._wake.set()
        for file in (self._writer, self._session_file):
            if file is not None:
                file.close()
        with self._idle:
            self._idle.notify_all()

    def _write_rows(self, rows: Sequence[_Queued]) -> str | None:
        """None if they are on disk, or given up for good; else what went wrong, and they stay in the queue."""
        if not rows:
            return None
        try:
            if self._writer is not None and not self.path.exists():
                self._writer.close()  # somebody removed the file: what is written to it now would be lost
                self._writer = None
            self._writer = self._writer or SpoolWriter(self.path)
            self._writer.append([exchange for exchange, _ in rows], [like for _, like in rows])
        except (SpoolError, OSError, sqlite3.Error) as e:
            cause = e.__cause__ if isinstance(e, SpoolError) and e.__cause__ is not None else e
            if isinstance(cause, sqlite3.DatabaseError) and not isinstance(cause, (*_ROW_AT_FAULT, sqlite3.OperationalError)):
                self._next_file()
            if not isinstance(cause, _ROW_AT_FAULT):
                return str(e)
            return self._one_by_one(rows, e)
        except Exception as e:  # noqa: BLE001 - the thread's boundary: without it nothing is ever recorded again
            return self._one_by_one(rows, e)
        self._done(rows)
        return None

    def _one_by_one(self, rows: Sequence[_Queued], error: Exception) -> str | None:
        if len(rows) > 1:
            return next((problem for row in rows if (problem := self._write_rows([row]))), None)
        self.dropped += 1
        logger.warning("metaclaw: an exchange with %s can't be recorded (%s: %s).", rows[0][0].host, type(error).__name__, error)
        self._done(rows)
        return None

    def _next_file(self) -> None:
        """Leave a damaged file where it is."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._files += 1
        self.path = self.path.with_name(f"{self.path.stem.partition('_')[0]}_{self._files}.db")

    def _write_sessions(self, snapshots: Sequence[Snapshot]) -> str | None:
        if not snapshots:
            return None
        try:
            self._session_file = self._session_file or SessionFile(self._sessions_path)
            if not self._session_file.write(_session_rows(snapshots)):
                return None  # no problem, only another proxy's moment: they stay in the queue
        except sqlite3.OperationalError as e:
            return f"{self._sessions_path} can't be written: {e}"
        except (OSError, sqlite3.Error) as e:
            if self._session_file is not None:
                self._session_file.close()
                self._session_file = None  # opened anew: a damaged file is put aside then
            return f"{self._sessions_path} can't be written: {e}"
        with self._lock:
            for snapshot in snapshots:
                if self._sessions.get(snapshot.key) is snapshot:
                    del self._sessions[snapshot.key]
        return None

    def _done(self, rows: Sequence[_Queued]) -> None:
        """`rows` are the oldest of the queue."""
        with self._lock:
            for row in rows:
                self._rows.popleft()
                self._queued_bytes -= _size(row[0])
            self.written += len(rows)


def _session_rows(snapshots: Sequence[Snapshot]) -> list[SessionRow]:
    """Without a state that is no JSON (it holds what a retriever gave, which needn't be ours): that one is given up."""
    rows: list[SessionRow] = []
    for snapshot in snapshots:
        try:
            rows.append(row_of(snapshot))
        except (TypeError, ValueError) as e:
            logger.warning("metaclaw: the state of a session can't be kept (%s).", e)
    return rows


_ROW_AT_FAULT = (sqlite3.DataError, sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.IntegrityError)


def _size(exchange: Exchange) -> int:
    return len(exchange.request_body) + len(exchange.response_body) + _ROW_BYTES
