"""The spool: where the proxy leaves exchanges for the worker, one SQLite file per proxy process.

Design: the proxy only appends and the worker only reads and deletes, so the two never wait for each
other longer than a commit. WAL with synchronous=NORMAL: a committed row survives `kill -9` of either
process (not a power cut). A row is the `Exchange` itself: its bodies as blobs, all else as one JSON
text, so that a new field needs no migration. Of a large request body it holds what differs from a *base*, a
body that stands in a table of its own as long as a row needs it (see ``store.bases``). Secrets are replaced in
`append`, before the commit; a body that can't be searched is not stored: it fails closed.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from functools import lru_cache
from itertools import batched, chain, zip_longest
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Self

import zstandard

from metaclaw_core.decode import decode_body
from metaclaw_core.errors import MetaClawError, StoreError
from metaclaw_core.model import Exchange, Hints, Injection, Json
from metaclaw_core.prefix import Likeness
from metaclaw_core.redact import redact, redact_answer, redact_path, redact_text
from metaclaw_core.store.bases import Bases, Delta
from metaclaw_core.wire.jsonio import dumps, loads_object

logger = logging.getLogger(__name__)

FORMAT = 2  # 1: without bases
NOT_STORED = "bodies not stored: "  # begins `Exchange.error` where a body could not be searched for secrets
MAX_BATCH_BYTES = 64 * 1024 * 1024
_ROWS_A_STATEMENT = 64
_KEPT_BYTES = 4 * 1024 * 1024  # of bases, by a reader
_BODIES = ("request_body", "response_body")
_HEAD = tuple(f.name for f in dataclass_fields(Exchange) if f.name not in (*_BODIES, "injection"))
_HINTS = tuple(f.name for f in dataclass_fields(Hints))
_INJECTION = tuple(f.name for f in dataclass_fields(Injection))
_head_values, _hint_values = attrgetter(*_HEAD), attrgetter(*_HINTS)
_block = lru_cache(maxsize=64)(dumps)  # the same text goes with many requests
_ZIP_FROM = 16 * 1024  # bytes; less is written faster than compressed
_ZIP = zstandard.ZstdCompressor(level=-5)  # fastest: the row lives for seconds
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS exchanges (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- AUTOINCREMENT: a deleted row's id is never given again
    head TEXT NOT NULL,                    -- every field but the bodies, ASCII JSON
    request_body BLOB NOT NULL,
    response_body BLOB NOT NULL,
    set_aside TEXT,                        -- why the worker could not take this row; NULL: it waits
    base INTEGER                           -- of which the request body is a difference; NULL: of none
);
CREATE TABLE IF NOT EXISTS bases (
    id INTEGER PRIMARY KEY,
    body BLOB NOT NULL,                    -- zstd
    block TEXT                             -- the text that was injected with it
);
"""


class SpoolError(StoreError):
    """The spool can't be opened, read or written (disk full, read-only, damaged, owned by another process)."""


# --- redaction --------------------------------------------------------------------------------


type Search = Callable[[bytes], tuple[bytes, int]]  # as `redact.redact`


def redacted(exchange: Exchange, search: Search = redact) -> Exchange:
    """The exchange as it may reach the disk. Never raises.

    A body with a content-encoding is decoded to be searched. The raw bytes are kept only if all of it
    could be decoded and held no secret; else the decoded, redacted bytes with encoding "".
    """
    try:
        request, request_encoding = _redacted_body(exchange.request_body, exchange.request_encoding, search)
        response, response_encoding = _redacted_body(exchange.response_body, exchange.response_encoding, redact_answer)
        path = redact_path(exchange.path)
        if (
            request is exchange.request_body
            and response is exchange.response_body
            and path == exchange.path
            and exchange.error is None
            and (request_encoding, response_encoding) == (exchange.request_encoding, exchange.response_encoding)
        ):
            return exchange  # the usual case: a copy costs more than the search
        return replace(
            exchange,
            path=path,
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


type Row = tuple[str, bytes, bytes, int | None]  # head, request body, response body, base: as they are stored


def head_of(exchange: Exchange, **more: Json) -> str:
    """Every field but the bodies, as ASCII JSON; `more` stands beside them or in place of one."""
    head = dict(zip(_HEAD, _head_values(exchange), strict=True))
    head["hints"] = dict(zip(_HINTS, _hint_values(exchange.hints), strict=True))  # `asdict` would copy each value, and be half the cost
    injection = more.pop("injection", None)
    if injection is None and exchange.injection is not None:
        beside = dumps({name: getattr(exchange.injection, name) for name in _INJECTION if name != "text"})
        return f'{dumps(head | more)[:-1]},"injection":{beside[:-1]},"text":{_block(exchange.injection.text)}}}}}'
    return dumps(head | {"injection": injection} | more)


def row_of(exchange: Exchange, delta: Delta | None = None) -> Row:
    """Large bodies are compressed, for writing megabytes costs more than that. `delta`: what the request body is, else
    it is written whole."""
    request, response = exchange.request_body, exchange.response_body
    more: dict[str, Json] = {}
    if delta is not None:
        request, more["delta"] = delta.between, [delta.prefix, delta.suffix]
        injection = exchange.injection
        if injection is not None and injection.text == delta.base.block:
            more["injection"] = {name: getattr(injection, name) for name in _INJECTION} | {"text": None}
    zipped: list[Json] = []
    if len(request) >= _ZIP_FROM:
        request = _ZIP.compress(request)
        zipped.append("request_body")
    if len(response) >= _ZIP_FROM:
        response = _ZIP.compress(response)
        zipped.append("response_body")
    return head_of(exchange, zipped=zipped, **more), request, response, delta.base.id if delta else None


def exchange_of(head: str, request_body: bytes, response_body: bytes, base: tuple[bytes, str | None] | None = None) -> Exchange:
    """The reverse of `row_of`; `base`: its body and block. Raises WireError, ValueError, TypeError or KeyError for what
    is no exchange."""
    fields = loads_object(head, "spool row")
    zipped = fields.pop("zipped", ())
    if "request_body" in zipped:
        request_body = zstandard.decompress(request_body)
    if "response_body" in zipped:
        response_body = zstandard.decompress(response_body)
    delta = fields.pop("delta", None)
    if delta is not None:
        if base is None:
            raise ValueError("its base is missing")
        prefix, suffix = delta
        if prefix + suffix > len(base[0]):
            raise ValueError("its base is too short")
        request_body = base[0][:prefix] + request_body + base[0][len(base[0]) - suffix :]
    injection = fields.pop("injection", None)
    if injection is not None:
        if injection["text"] is None and base is not None:
            injection["text"] = base[1]
        lists = {"skills": tuple(injection["skills"]), "scores": tuple(injection.get("scores", ()))}
        injection = Injection(**{**injection, **lists})
    return Exchange(
        **{**fields, "hints": Hints(**fields["hints"])},
        injection=injection,
        request_body=request_body,
        response_body=response_body,
    )


def make_whole(database: sqlite3.Connection) -> None:
    """Every row without a base, and no base: what is deleted then is gone. In a transaction of its own.

    A row whose base is damaged can't be read any more. Raises sqlite3.Error.
    """
    if not database.execute("SELECT 1 FROM sqlite_schema WHERE name = 'bases'").fetchone():
        return
    database.execute("BEGIN IMMEDIATE")  # a row that comes meanwhile would have lost its base
    bases = {base_id: (body, block) for base_id, body, block in database.execute("SELECT id, body, block FROM bases")}
    rows = database.execute("SELECT id, head, request_body, response_body, base FROM exchanges WHERE base IS NOT NULL")
    for row_id, head, request, response, base_id in rows.fetchall():
        try:
            whole = row_of(exchange_of(head, request, response, _base(bases, base_id)))
        except (MetaClawError, *_NO_EXCHANGE) as e:
            logger.warning("metaclaw: row %d of a spool has lost its request body: %s", row_id, e)
            whole = (head, request, response, None)
        values = "head = ?, request_body = ?, response_body = ?, base = ?"
        database.execute(f"UPDATE exchanges SET {values} WHERE id = ?", (*whole, row_id))  # noqa: S608
    database.execute("DELETE FROM bases")
    database.execute("COMMIT")


_NO_EXCHANGE = (KeyError, TypeError, ValueError, zstandard.ZstdError)


def _base(bases: Mapping[int, tuple[bytes, str | None]], base_id: int | None) -> tuple[bytes, str | None] | None:
    found = None if base_id is None else bases.get(base_id)
    return found and (zstandard.decompress(found[0]), found[1])


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
            if "base" not in {row[1] for row in connection.execute("PRAGMA table_info(exchanges)")}:  # of format 1
                connection.execute("ALTER TABLE exchanges ADD COLUMN base INTEGER")
            last = "SELECT max((SELECT coalesce(max(id), 0) FROM bases), (SELECT coalesce(max(base), 0) FROM exchanges))"
            self._bases = Bases(1 + connection.execute(last).fetchone()[0])
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

    def append(self, exchanges: Sequence[Exchange], likes: Sequence[Likeness | None] = ()) -> None:
        """All of them in one transaction, redacted. Raises SpoolError, and then none is stored.

        `likes`: where it is known, of each request body to one before it; spares a comparison.
        """
        try:
            rows = [self._row(exchange, like) for exchange, like in zip_longest(exchanges, likes)]
            with _typed(self.path, "written"), self._transaction():
                while missing := self._missing(rows):  # the next nearest base may be gone as well
                    self._bases.forget(missing)
                    rows = [self._row(exchange) for exchange in exchanges]
                bases = [(base_id, _ZIP.compress(body), block) for base_id, body, block in self._bases.unwritten]
                self._insert("bases (id, body, block)", bases)
                self._insert("exchanges (head, request_body, response_body, base)", rows)
        finally:
            self._bases.unwritten.clear()  # if they are not on disk now, the next row that needs one will notice

    def _row(self, exchange: Exchange, like: Likeness | None = None) -> Row:
        deltas: list[Delta] = []

        def search(body: bytes) -> tuple[bytes, int]:
            block = exchange.injection.text if exchange.injection else None
            clean, delta = self._bases.delta(body, f"{exchange.dialect} {exchange.principal}", block, like)
            if delta is not None:
                deltas.append(delta)
            return clean, int(clean is not body)

        clean = redacted(exchange, search)
        # An encoded body is stored as it came, if it holds no secret; and one that failed the search has none.
        whole = clean.request_encoding or clean.error != exchange.error or not deltas
        return row_of(clean, None if whole else deltas[0])

    def _missing(self, rows: Sequence[Row]) -> set[int]:
        """The bases of `rows` that are neither on disk nor about to be."""
        needed = {row[3] for row in rows if row[3] is not None} - {unwritten[0] for unwritten in self._bases.unwritten}
        if not needed:
            return set()
        places = ", ".join("?" * len(needed))
        return needed - {row[0] for row in self._db.execute(f"SELECT id FROM bases WHERE id IN ({places})", [*needed])}  # noqa: S608

    def _insert(self, into: str, rows: Sequence[tuple[object, ...]]) -> None:
        for group in batched(rows, _ROWS_A_STATEMENT):
            # One statement, not `executemany`: each step gives the interpreter away, and beside a busy event
            # loop the writer waits for milliseconds to get it back.
            places = ", ".join([f"({', '.join('?' * len(group[0]))})"] * len(group))
            self._db.execute(f"INSERT INTO {into} VALUES {places}", list(chain.from_iterable(group)))  # noqa: S608


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
            self._base_column = "base" if found > 1 else "NULL"
            self._bases: dict[int, tuple[bytes, str | None]] = {}  # least recently used first
            undo.pop_all()

    def batch(self, limit: int, max_bytes: int = MAX_BATCH_BYTES) -> list[tuple[int, Exchange]]:
        """The oldest rows, at most `limit` and about `max_bytes` of bodies, at least one if any waits."""
        out: list[tuple[int, Exchange]] = []
        bad: dict[int, str] = {}
        size = 0
        with _typed(self.path, "read"):
            cursor = self._db.execute(
                f"SELECT id, head, request_body, response_body, {self._base_column} FROM exchanges"  # noqa: S608
                " WHERE set_aside IS NULL ORDER BY id LIMIT ?",
                (limit,),
            )
            for row_id, head, request_body, response_body, base_id in cursor:
                try:
                    exchange = exchange_of(head, request_body, response_body, self._base(base_id))
                except (MetaClawError, *_NO_EXCHANGE) as e:
                    bad[row_id] = f"not an exchange: {e}"
                    continue
                out.append((row_id, exchange))
                size += len(exchange.request_body) + len(exchange.response_body)
                if size >= max_bytes:
                    break
            cursor.close()
        for row_id, reason in bad.items():
            self.set_aside(row_id, reason)
        return out if out or not bad else self.batch(limit, max_bytes)

    def _base(self, base_id: int | None) -> tuple[bytes, str | None] | None:
        """The last ones that were needed are kept, since the rows of several sessions take turns."""
        if base_id is None:
            return None
        kept = self._bases.pop(base_id, None) or _base(
            {row[0]: row[1:] for row in self._db.execute("SELECT id, body, block FROM bases WHERE id = ?", (base_id,))}, base_id
        )
        if kept is not None:
            self._bases[base_id] = kept
            while len(self._bases) > 1 and sum(len(body) for body, _ in self._bases.values()) > _KEPT_BYTES:
                del self._bases[next(iter(self._bases))]
        return kept

    def delete(self, row_ids: Sequence[int]) -> None:
        """Forget rows that the store has committed, and bases that no row needs any more. Once nothing waits, freed pages
        go back to the file system."""
        with _typed(self.path, "written"):
            with self._transaction():
                self._db.executemany("DELETE FROM exchanges WHERE id = ?", [(i,) for i in row_ids])
                if self._base_column == "base":
                    self._db.execute("DELETE FROM bases WHERE id NOT IN (SELECT base FROM exchanges WHERE base IS NOT NULL)")
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
