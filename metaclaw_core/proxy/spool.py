"""The writer thread between the event loop and the spool file.

Design: the loop calls `put`, which only appends to a queue; one thread commits what has gathered
every 50 ms or at 64 rows, so an exchange is on disk at most about 50 ms after its response. Session
state goes through the same thread, so it never reads or writes on the loop.

A commit that fails (disk full, file read-only) is tried again with a growing pause while new rows
queue up in memory, up to a bound in bytes; beyond it the newest are dropped and counted. The agent's
traffic is never touched by any of this. Bodies are redacted in `SpoolWriter.append`, before a commit.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from metaclaw_core.model import Exchange
from metaclaw_core.proxy.sessions import SessionFile, SessionRow
from metaclaw_core.store.spool import SpoolError, SpoolWriter

logger = logging.getLogger(__name__)

GROUP_SECONDS = 0.05
GROUP_ROWS = 64
MAX_QUEUED_BYTES = 256 << 20
_RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)


class Spool:
    """`put` from the event loop; everything else happens in the thread."""

    def __init__(self, path: Path, sessions_path: Path) -> None:
        self.path = path
        self._sessions_path = sessions_path
        self.dropped = 0  # exchanges lost because the disk refused them for too long
        self.written = 0
        self.last_error: str | None = None
        self._rows: deque[Exchange] = deque()
        self._sessions: dict[str, SessionRow] = {}
        self._queued_bytes = 0
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._idle = threading.Condition(self._lock)
        self._busy = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="metaclaw-spool", daemon=True)
        self._thread.start()

    def put(self, exchange: Exchange) -> None:
        """Queue one exchange; returns at once."""
        size = len(exchange.request_body) + len(exchange.response_body)
        with self._lock:
            if self._queued_bytes + size > MAX_QUEUED_BYTES and self._rows:
                self.dropped += 1
                if self.dropped == 1:
                    logger.warning(
                        "metaclaw: %s can't be written (%s); exchanges are being dropped. Traffic goes on.",
                        self.path,
                        self.last_error or "the disk is too slow",
                    )
                return
            self._rows.append(exchange)
            self._queued_bytes += size
            full = len(self._rows) >= GROUP_ROWS
        if full or not self._wake.is_set():
            self._wake.set()

    def put_session(self, row: SessionRow) -> None:
        """Queue the state of one session; a later state of the same session replaces it."""
        with self._lock:
            self._sessions[row[0]] = row
        self._wake.set()

    @property
    def queued(self) -> int:
        return len(self._rows)

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until everything that was put is committed; False after `timeout` seconds."""
        self._wake.set()
        with self._idle:
            return self._idle.wait_for(
                lambda: (not self._rows and not self._sessions and not self._busy) or not self._thread.is_alive(), timeout
            )

    def close(self, timeout: float = 5.0) -> None:
        """Commit the rest and end the thread."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout)
        if self._rows:
            logger.warning("metaclaw: %d exchanges could not be written to %s: %s", len(self._rows), self.path, self.last_error)

    # --- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        writer: SpoolWriter | None = None
        session_file: SessionFile | None = None
        failures = 0
        while True:
            self._wake.wait()
            if not self._closing and len(self._rows) < GROUP_ROWS:
                time.sleep(GROUP_SECONDS)  # gather a group
            with self._lock:
                self._wake.clear()
                rows = list(self._rows)[: GROUP_ROWS * 4]
                sessions = list(self._sessions.values())
                self._busy = bool(rows or sessions)
            if self._busy:
                try:
                    if rows:
                        writer = writer or SpoolWriter(self.path)
                        writer.append(rows)
                    if sessions:
                        session_file = session_file or SessionFile(self._sessions_path)
                        session_file.write(sessions)
                except (SpoolError, OSError, sqlite3.Error) as e:
                    failures += 1
                    self._failed(e, failures)
                    if self._closing and failures > 1:
                        break
                    pause = _RETRY_SECONDS[min(failures, len(_RETRY_SECONDS)) - 1]
                    with self._idle:
                        self._busy = False
                        self._idle.notify_all()
                    time.sleep(0.1 if self._closing else pause)
                    self._wake.set()
                    continue
                failures = 0
                self.last_error = None
                self._done(rows, sessions)
            with self._idle:
                self._busy = False
                more = bool(self._rows or self._sessions)
                self._idle.notify_all()
            if more:
                self._wake.set()
            elif self._closing:
                break
        for file in (writer, session_file):
            if file is not None:
                file.close()

    def _done(self, rows: Sequence[Exchange], sessions: Sequence[SessionRow]) -> None:
        with self._lock:
            for row in rows:
                self._rows.popleft()
                self._queued_bytes -= len(row.request_body) + len(row.response_body)
            for session in sessions:
                if self._sessions.get(session[0]) is session:
                    del self._sessions[session[0]]
            self.written += len(rows)

    def _failed(self, error: Exception, failures: int) -> None:
        self.last_error = str(error)
        if failures == 1:
            logger.warning("metaclaw: %s; trying again. Traffic goes on.", error)
