"""The spool: where the proxy leaves exchanges for the worker, one SQLite file per proxy process.

Design: the proxy only appends and the worker only reads and deletes, so the two never wait for each
other longer than a commit. WAL with synchronous=NORMAL: a committed row survives `kill -9` of either
process (not a power cut). A row is the `Exchange` itself: its bodies as blobs, all else as one JSON
text, so that a new field needs no migration. Secrets are replaced in `append`, before the commit; a
body that can't be searched is not stored: it fails closed.

Ownership is a `flock` on a file beside the database, held for the life of the writer: the kernel drops
it when the process dies, it works across containers, and a reused pid can't be mistaken for the owner.
Pid and start time are recorded too, for people.

Limits: standard library only, since the proxy imports this module (no SQLAlchemy). POSIX only. A row
that can't be read back is set aside with its reason and keeps the file from being removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from dataclasses import fields as dataclass_fields
from itertools import batched, chain
from pathlib import Path
from types import TracebackType
from typing import Self

import zstandard

from metaclaw_core.decode import decode_body
from metaclaw_core.errors import MetaClawError, StoreError
from metaclaw_core.model import Exchange, Hints, Injection, Json
from metaclaw_core.redact import Redactor, redact, redact_answer, redact_path, redact_text
from metaclaw_core.wire.jsonio import dumps, loads_object

logger = logging.getLogger(__name__)

FORMAT = 1
NOT_STORED = "bodies not stored: "  # begins `Exchange.error` where a body could not be searched for secrets
MAX_BATCH_BYTES = 64 * 1024 * 1024
_ROWS_A_STATEMENT = 64
_BODIES = ("request_body", "response_body")
_HEAD = tuple(f.name for f in dataclass_fields(Exchange) if f.name not in _BODIES)
_ZIP_FROM = 4096  # bytes
_ZIP = zstandard.ZstdCompressor(level=-5)  # fastest: the row lives for seconds
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS exchanges (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- AUTOINCREMENT: a deleted row's id is never given again
    head TEXT NOT NULL,                    -- every field but the bodies, ASCII JSON
    request_body BLOB NOT NULL,
    response_body BLOB NOT NULL,
    set_aside TEXT                         -- why the worker could not take this row; NULL: it waits
);
"""


class SpoolError(StoreError):
    """The spool can't be opened, read or written (disk full, read-only, damaged, owned by another process)."""


# --- redaction --------------------------------------------------------------------------------


type Search = Callable[[bytes], tuple[bytes, int]]  # `redact.redact` or `Redactor.redact`


def redacted(exchange: Exchange, search: Search = redact) -> Exchange:
    """The exchange as it may reach the disk. Never raises.

    A body with a content-encoding is decoded to be searched. The raw bytes are kept only if all of it
    could be decoded and held no secret; else the decoded, redacted bytes with encoding "".
    """
    try:
        request, request_encoding = _redacted_body(exchange.request_body, exchange.request_encoding, search)
        response, response_encoding = _redacted_body(exchange.response_body, exchange.response_encoding, redact_answer)
        return replace(
            exchange,
            path=redact_path(exchange.path),
            request_body=request,
            request_encoding=request_encoding,
            response_body=response,
            response_encoding=response_encoding,
            error=None if exchange.error is None else redact_text(exchange.error),
        )
    except Exception as e:  # noqa: BLE001 - the boundary: what can't be searched for secrets isn't stored
        return replace(
            exchange,
            path=exchange.path.partition("?")[0],
            request_body=b"",
            request_encoding="",
            response_body=b"",
            response_encoding="",
            # Only our own words: another exception's text may quote the very bytes.
            error=NOT_STORED + (str(e) if isinstance(e, MetaClawError) else type(e).__name__),
        )


def _redacted_body(data: bytes, encoding: str, search: Search) -> tuple[bytes, str]:
    if not encoding or not data:
        return search(data)[0], ""
    decoded, complete = decode_body(data, encoding)
    clean, count = search(decoded)
    return (data, encoding) if complete and not count else (clean, "")


# --- rows -------------------------------------------------------------------------------------


def head_of(exchange: Exchange, **more: Json) -> str:
    """Every field but the bodies, as ASCII JSON."""
    head = {name: getattr(exchange, name) for name in _HEAD}
    hints, injection = exchange.hints, exchange.injection
    head["hints"] = asdict(hints)
    head["injection"] = injection and asdict(injection)
    return dumps(head | more)


def row_of(exchange: Exchange) -> tuple[str, bytes, bytes]:
    """(head, request body, response body) as they are stored: large bodies are compressed, for writing megabytes
    of history that barely changes costs more than compressing it."""
    zipped = [name for name in _BODIES if len(getattr(exchange, name)) >= _ZIP_FROM]
    bodies = [_ZIP.compress(body) if name in zipped else body for name in _BODIES for body in (getattr(exchange, name),)]
    return head_of(exchange, zipped=zipped), bodies[0], bodies[1]


def exchange_of(head: str, request_body: bytes, response_body: bytes) -> Exchange:
    """The reverse of `head_of`. Raises WireError, TypeError or KeyError for what is no exchange."""
    fields = loads_object(head, "spool row")
    zipped = fields.pop("zipped", ())
    if "request_body" in zipped:
        request_body = zstandard.decompress(request_body)
    if "response_body" in zipped:
        response_body = zstandard.decompress(response_body)
    injection = fields.pop("injection", None)
    if injection is not None:
        injection = Injection(**{**injection, "skills": tuple(injection["skills"])})
    return Exchange(
        **{**fields, "hints": Hints(**fields["hints"])},
        injection=injection,
        request_body=request_body,
        response_body=response_body,
    )


# --- the file ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _typed(path: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as e:
        raise SpoolError(f"The spool {path} can't be {doing}: {e}.") from e


def create_private(path: Path) -> None:
    """Make an empty database file, 0600 in folders 0700, unless there is one.

    An existing file is not even opened: to close it again would drop the locks that SQLite holds on it
    for this process.
    """
    for folder in reversed([p for p in path.parents if not p.exists()]):
        folder.mkdir(mode=0o700, exist_ok=True)  # mkdir(parents=True) would give only the last one this mode
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


class _Spool:
    """One open spool file; used by one thread at a time."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._db = connection
        self._db.execute("PRAGMA busy_timeout=5000")
        self._db.execute("PRAGMA synchronous=NORMAL")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # SQLite itself has rolled back on a full disk
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def meta(self) -> dict[str, str]:
        """`format`, and `pid` and `started_at` (unix seconds) of the last owner."""
        with _typed(self.path, "read"):
            return dict(self._db.execute("SELECT key, value FROM meta"))


class SpoolWriter(_Spool):
    """The owner's side. Creates the file (0600) and its folder (0700); one writer per file.

    May be made in one thread and used in another, but not by two at once. Raises SpoolError.
    """

    def __init__(self, path: Path) -> None:
        self._redactor = Redactor()
        with _typed(path, "opened"), contextlib.ExitStack() as undo:
            create_private(path)
            self._lock = _lock(path)
            if self._lock is None:
                raise SpoolError(f"The spool {path} is in use by another process.")
            undo.callback(os.close, self._lock)
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            undo.callback(connection.close)
            super().__init__(path, connection)
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # acts on a new file only
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA journal_size_limit=16777216")
            # The worker's deletes check-point the log, off the proxy's path; 64 MiB is for a proxy without one.
            connection.execute("PRAGMA wal_autocheckpoint=16384")
            connection.executescript(_SCHEMA)
            owner = {"format": FORMAT, "pid": os.getpid(), "started_at": time.time()}
            with self._transaction():
                connection.executemany(
                    "INSERT OR REPLACE INTO meta VALUES (?, ?)", [(k, str(v)) for k, v in owner.items()]
                )
            undo.pop_all()

    def close(self) -> None:
        super().close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _search(self, exchange: Exchange) -> Search:
        caller = f"{exchange.dialect} {exchange.principal}"
        return lambda data: self._redactor.redact(data, f"{caller} {exchange.hints.trace_id}", caller)

    def append(self, exchanges: Sequence[Exchange]) -> None:
        """All of them in one transaction, redacted. Raises SpoolError, and then none is stored."""
        rows = [row_of(redacted(exchange, self._search(exchange))) for exchange in exchanges]
        with _typed(self.path, "written"), self._transaction():
            for group in batched(rows, _ROWS_A_STATEMENT):
                # One statement, not `executemany`: each step gives the interpreter away, and beside a busy event
                # loop the writer waits for milliseconds to get it back.
                places = ", ".join(["(?, ?, ?)"] * len(group))
                values = list(chain.from_iterable(group))
                self._db.execute(f"INSERT INTO exchanges (head, request_body, response_body) VALUES {places}", values)  # noqa: S608


class SpoolReader(_Spool):
    """The worker's side. Raises SpoolError, also for a file of a newer format."""

    def __init__(self, path: Path) -> None:
        with _typed(path, "opened"), contextlib.ExitStack() as undo:
            connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None)
            undo.callback(connection.close)
            super().__init__(path, connection)
            found = int(self.meta().get("format", "0"))
            if found > FORMAT:
                raise SpoolError(
                    f"The spool {path} was written by a newer MetaClaw (format {found}); upgrade this one."
                )
            undo.pop_all()

    def batch(self, limit: int, max_bytes: int = MAX_BATCH_BYTES) -> list[tuple[int, Exchange]]:
        """The oldest rows, at most `limit` and about `max_bytes` of bodies, at least one if any waits."""
        out: list[tuple[int, Exchange]] = []
        bad: dict[int, str] = {}
        size = 0
        with _typed(self.path, "read"):
            cursor = self._db.execute(
                "SELECT id, head, request_body, response_body FROM exchanges WHERE set_aside IS NULL ORDER BY id LIMIT ?",
                (limit,),
            )
            for row_id, head, request_body, response_body in cursor:
                try:
                    out.append((row_id, exchange_of(head, request_body, response_body)))
                except (MetaClawError, KeyError, TypeError, ValueError) as e:
                    bad[row_id] = f"not an exchange: {e}"
                size += len(request_body) + len(response_body)
                if size >= max_bytes:
                    break
            cursor.close()
        for row_id, reason in bad.items():
            self.set_aside(row_id, reason)
        return out if out or not bad else self.batch(limit, max_bytes)

    def delete(self, row_ids: Sequence[int]) -> None:
        """Forget rows that the store has committed. Once nothing waits, freed pages go back to the file system."""
        with _typed(self.path, "written"):
            with self._transaction():
                self._db.executemany("DELETE FROM exchanges WHERE id = ?", [(i,) for i in row_ids])
            if self._db.execute("SELECT 1 FROM exchanges LIMIT 1").fetchone() is None:
                self._db.execute("PRAGMA incremental_vacuum").fetchall()

    def set_aside(self, row_id: int, reason: str) -> None:
        """Keep a row that can't be ingested, but out of the way of the others."""
        logger.error("metaclaw: row %d of %s is set aside: %s", row_id, self.path, reason)
        with _typed(self.path, "written"), self._transaction():
            self._db.execute("UPDATE exchanges SET set_aside = ? WHERE id = ?", (reason, row_id))

    def counts(self) -> tuple[int, int]:
        """(rows that wait, rows set aside)."""
        with _typed(self.path, "read"):
            row = self._db.execute("SELECT count(*) - count(set_aside), count(set_aside) FROM exchanges").fetchone()
        return int(row[0]), int(row[1])


# --- ownership --------------------------------------------------------------------------------


def _lock(path: Path) -> int | None:
    """An exclusive lock on the spool's lock file as an open descriptor; None if somebody holds it."""
    lock_path = path.with_name(path.name + ".lock")
    while True:
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        # `remove_if_done` may have unlinked the file between open and flock: then the lock guards nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock_path.stat()):
                return descriptor
        os.close(descriptor)


def has_owner(path: Path) -> bool:
    """Does a living process write to this spool?"""
    with _typed(path, "examined"):
        descriptor = _lock(path)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def remove_if_done(path: Path) -> bool:
    """Delete a spool that is empty and whose owner is gone; False if it stays."""
    with _typed(path, "removed"):
        descriptor = _lock(path)
        if descriptor is None:
            return False
        try:
            with SpoolReader(path) as reader:
                if reader.counts() != (0, 0):
                    return False
            for suffix in ("", "-wal", "-shm", ".lock"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            return True
        finally:
            os.close(descriptor)
