"""What the policy server must not lose: one SQLite file of its own, ``METACLAW_HOME/run/policy.db``.

Design: three tables. `samples`: the exact tokens of answers, committed before an answer's last byte is sent and taken
into the store by ingest (`pending`, then `remove`). `replies`: the tokens of each assistant message per session, so that
a later request, also after a restart, continues what was really sampled. `responses`: our own Responses ids with the
messages since the one they continue, for clients that send only what is new. WAL with synchronous=NORMAL, as the spool:
what is committed survives `kill -9` of any process.

A sample whose prompt or reply held a secret comes without ids (the server sees to it); such a reply is not remembered
here either, and messages are stored with their secrets replaced.

Limits: `replies` and `responses` are a memory, not a record: what is older than `KEEP_SECONDS` goes, and the oldest first
where they exceed `KEEP_BYTES`. Samples stay until they are taken.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

import numpy as np
import zstandard
from numpy.typing import NDArray

from metaclaw_core.errors import StoreError
from metaclaw_core.model import Json, Message, Role
from metaclaw_core.store.chain import pack_message, redact_message, unpack_message
from metaclaw_core.store.spool import create_private
from metaclaw_core.store.types import pack, unpack

FILE = "policy.db"
KEEP_SECONDS = 7 * 86_400.0
KEEP_BYTES = 200 << 20
_DEEPEST = 10_000  # responses that one conversation may be linked from
_SCHEMA = """
CREATE TABLE IF NOT EXISTS samples (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    flow_id TEXT NOT NULL UNIQUE,
    session TEXT,                          -- as the proxy named it; NULL: it named none
    created_at REAL NOT NULL,
    head TEXT NOT NULL,                    -- every other column but the next three, JSON
    prompt_ids BLOB, tokens BLOB, logprobs BLOB
);
CREATE TABLE IF NOT EXISTS replies (
    session TEXT NOT NULL, key TEXT NOT NULL, tokens BLOB NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (session, key)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS replies_at ON replies (at);
CREATE TABLE IF NOT EXISTS responses (
    id TEXT NOT NULL, principal TEXT NOT NULL, session TEXT, parent TEXT, messages BLOB NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (principal, id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS responses_at ON responses (at);
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
"""


# --- arrays -----------------------------------------------------------------------------------


def pack_ids(ids: Sequence[int] | NDArray[np.int32]) -> bytes:
    """int32, little-endian, zstd."""
    return zstandard.compress(np.asarray(ids, dtype="<i4").tobytes(), 3)


def unpack_ids(data: bytes) -> NDArray[np.int32]:
    """Shape (T,). Raises StoreError for what `pack_ids` never wrote."""
    return _unpacked(data, "<i4")


def pack_logprobs(logprobs: Sequence[float] | NDArray[np.float32]) -> bytes:
    """float32, little-endian, zstd."""
    return zstandard.compress(np.asarray(logprobs, dtype="<f4").tobytes(), 3)


def unpack_logprobs(data: bytes) -> NDArray[np.float32]:
    """Shape (T,), natural logarithms. Raises StoreError for what `pack_logprobs` never wrote."""
    return _unpacked(data, "<f4")


def _unpacked(data: bytes, kind: str) -> NDArray[Any]:
    try:
        return np.frombuffer(zstandard.decompress(data), dtype=kind)
    except (zstandard.ZstdError, ValueError) as e:
        raise StoreError(f"A sample's tokens are damaged ({e}); `metaclaw store verify` says where.") from e


# --- values -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer of ours; the fields are the columns of the table `samples`, which says what they mean."""

    flow_id: str
    created_at: float
    base_model: str
    tokenizer: str
    version: int
    checkpoint: str | None
    klass: str
    klass_reason: str | None
    sampling: Mapping[str, Json]
    prompt_ids: Sequence[int]
    tokens: Sequence[int]
    logprobs: Sequence[float]
    reused: int
    segments: int
    stop_reason: str
    malformed: bool
    redacted: bool  # the ids are then not stored

    def head(self) -> dict[str, Json]:
        """Every column but flow, time and arrays."""
        return {
            "base_model": self.base_model,
            "tokenizer": self.tokenizer,
            "version": self.version,
            "checkpoint": self.checkpoint,
            "klass": self.klass,
            "klass_reason": self.klass_reason,
            "sampling": dict(self.sampling),
            "prompt_length": len(self.prompt_ids),
            "length": len(self.tokens),
            "reused": self.reused,
            "segments": self.segments,
            "stop_reason": self.stop_reason,
            "malformed": self.malformed,
            "redacted": self.redacted,
        }


@dataclass(frozen=True, slots=True)
class Reply:
    """The tokens behind an assistant message, stop token included where one was sampled."""

    key: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Response:
    """One of our own Responses answers."""

    id: str
    principal: str
    parent: str | None  # the response it continues, if that is in this file; None: `messages` is all there is
    messages: tuple[Message, ...]  # since the parent, the answer last


def continued(before: Sequence[Message], sent: Sequence[Message]) -> tuple[Message, ...]:
    """The whole conversation where `sent` follows `before`. New instructions replace old ones, as the API has it; where
    none are sent the old ones stay, as a client that sends only what is new means it."""
    leading = tuple(takewhile(_instructs, sent))
    if not leading:
        return (*before, *sent)
    old = len(list(takewhile(_instructs, before)))
    return (*leading, *before[old:], *sent[len(leading) :])


def _instructs(message: Message) -> bool:
    return message.role in (Role.SYSTEM, Role.DEVELOPER)


# --- the server's side ------------------------------------------------------------------------


@contextlib.contextmanager
def _typed(path: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as e:
        raise StoreError(f"{path} can't be {doing}: {e}.") from e


class SampleFile:
    """The open file; used by one thread at a time, any. Methods raise StoreError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _typed(path, "opened"), contextlib.ExitStack() as undo:
            create_private(path)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            undo.callback(self._db.close)
            self._db.execute("PRAGMA busy_timeout=5000")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def keep(
        self, session: str | None, sample: Sample | None, reply: Reply | None = None, response: Response | None = None
    ) -> None:
        """All of it in one transaction. A flow that has a sample keeps its first one; None is nothing to keep."""
        now = time.time()
        with _typed(self.path, "written"), _transaction(self._db):
            if sample is not None:
                arrays: tuple[bytes | None, ...] = (None, None, None)
                if not sample.redacted:
                    arrays = (pack_ids(sample.prompt_ids), pack_ids(sample.tokens), pack_logprobs(sample.logprobs))
                self._db.execute(
                    "INSERT OR IGNORE INTO samples (flow_id, session, created_at, head, prompt_ids, tokens, logprobs)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (sample.flow_id, session, sample.created_at, json.dumps(sample.head()), *arrays),
                )
            if reply is not None and session is not None:
                self._db.execute(
                    "INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", (session, reply.key, pack_ids(reply.tokens), now)
                )
            if response is not None:
                said = pack([[m.role.value, pack_message(redact_message(m))] for m in response.messages])
                self._db.execute(
                    "INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?)",
                    (response.id, response.principal, session, response.parent, said, now),
                )

    def replies(self, session: str) -> dict[str, tuple[int, ...]]:
        """Tokens by key, oldest first."""
        with _typed(self.path, "read"):
            rows = self._db.execute("SELECT key, tokens FROM replies WHERE session = ? ORDER BY at", (session,)).fetchall()
        return {key: tuple(unpack_ids(tokens).tolist()) for key, tokens in rows}

    def conversation(self, principal: str, response_id: str) -> tuple[Message, ...] | None:
        """Everything up to and including that answer; None: it is not ours, or a part of it is forgotten."""
        steps: list[Sequence[Message]] = []
        wanted: str | None = response_id
        while wanted is not None and len(steps) < _DEEPEST:
            with _typed(self.path, "read"):
                row = self._db.execute(
                    "SELECT parent, messages FROM responses WHERE principal = ? AND id = ?", (principal, wanted)
                ).fetchone()
            if row is None:
                return None
            wanted = row[0]
            steps.append([unpack_message(role, content) for role, content in unpack(row[1])])
        if wanted is not None:
            return None
        whole: tuple[Message, ...] = ()
        for step in reversed(steps):
            whole = continued(whole, step)
        return whole

    def forgotten(self) -> int:
        """How many times something was purged: after a change, what is held in memory has to go too."""
        with _typed(self.path, "read"):
            row = self._db.execute("SELECT value FROM meta WHERE key = 'forgotten'").fetchone()
        return int(row[0]) if row else 0

    def prune(self, now: float, *, keep_seconds: float = KEEP_SECONDS, keep_bytes: int = KEEP_BYTES) -> int:
        """Forget what is too old or too much of `replies` and `responses`; how many rows went."""
        gone = 0
        with _typed(self.path, "written"), _transaction(self._db):
            for table, column in (("replies", "tokens"), ("responses", "messages")):
                gone += self._db.execute(f"DELETE FROM {table} WHERE at < ?", (now - keep_seconds,)).rowcount  # noqa: S608
                # Each table may have half; `kept` counts from the newest down.
                gone += self._db.execute(
                    f"DELETE FROM {table} WHERE at <= (SELECT coalesce(max(at), 0) FROM"  # noqa: S608
                    f" (SELECT at, sum(length({column}) + 100) OVER (ORDER BY at DESC) AS kept FROM {table}) WHERE kept > ?)",
                    (keep_bytes // 2,),
                ).rowcount
        return gone


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # SQLite itself has rolled back on a full disk
            database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


# --- ingest's side ----------------------------------------------------------------------------


def pending(path: Path, limit: int = 64) -> list[tuple[int, dict[str, Any]]]:
    """The oldest samples that wait, as (row id here, columns of the table `samples`); [] where there is no file.

    Raises StoreError.
    """
    if not path.exists():
        return []
    with _typed(path, "read"), _opened(path) as database:
        rows = database.execute(
            "SELECT id, flow_id, created_at, head, prompt_ids, tokens, logprobs FROM samples ORDER BY id LIMIT ?", (limit,)
        ).fetchall()
    return [
        (row_id, {"flow_id": flow_id, "created_at": at, **json.loads(head), "prompt_ids": prompt, "tokens": ids, "logprobs": logprobs})
        for row_id, flow_id, at, head, prompt, ids, logprobs in rows
    ]


def remove(path: Path, row_ids: Collection[int]) -> None:
    """Forget samples that the store has committed. Raises StoreError."""
    with _typed(path, "written"), _opened(path) as database, _transaction(database):
        database.executemany("DELETE FROM samples WHERE id = ?", [(i,) for i in row_ids])


def forget(
    database: sqlite3.Connection,
    *,
    sessions: Collection[str] = (),
    flows: Collection[str] = (),
    before: float | None = None,
    memory: bool = False,
    everything: bool = False,
) -> None:
    """Take out sessions (as the proxy names them), flows, what is older than `before`, the `memory` of all sessions, or
    everything; a running server then does the same. The caller writes the file anew. Raises sqlite3.Error."""
    with _transaction(database):
        for table, at in (("samples", "created_at"), ("replies", "at"), ("responses", "at")):
            if everything or (memory and table != "samples"):
                database.execute(f"DELETE FROM {table}")  # noqa: S608
            if before is not None:
                database.execute(f"DELETE FROM {table} WHERE {at} < ?", (before,))  # noqa: S608
            database.executemany(f"DELETE FROM {table} WHERE session = ?", [(name,) for name in sessions])  # noqa: S608
        database.executemany("DELETE FROM samples WHERE flow_id = ?", [(flow,) for flow in flows])
        database.execute("INSERT INTO meta VALUES ('forgotten', 1) ON CONFLICT (key) DO UPDATE SET value = value + 1")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None)) as database:
        database.execute("PRAGMA busy_timeout=5000")
        yield database
