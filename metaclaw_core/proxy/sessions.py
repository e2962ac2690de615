"""Session state on the hot path: what a session got, so that it keeps getting the same.

Design: an LRU of 2,000 sessions in memory, loaded once at start and written through the spool's
thread, never read from disk on the loop. The file is shared by all proxies of one home, so a restart
repeats the same bytes in the middle of a conversation. Only redacted human text is kept (the last 8).

Limits: two proxies that serve the same session at the same time each keep their own copy; the last
writer wins.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from hashlib import sha256
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from metaclaw_core.agents.base import Prior

MAX_SESSIONS = 2000
MAX_RESPONSES = 8000
MAX_TEXTS = 8
_PRUNE_AFTER = 200  # rows

type SessionRow = tuple[str, bytes, float]  # key, state as JSON, used_at: as it is on disk


class Snapshot(NamedTuple):
    """A session's state at one moment, to be written down by another thread."""

    key: str
    values: tuple[Any, ...]  # in the order of SessionState's fields
    used_at: float


class SessionSink(Protocol):
    def put_session(self, snapshot: Snapshot) -> None: ...


@dataclass(slots=True)
class SessionState:
    """Mutable on purpose: one object per session, changed on the event loop only. Its lists are replaced, never changed:
    a snapshot holds them."""

    session_id: str | None
    session_key: str | None
    epoch: int = 0
    block: str = ""  # the inner text of the injected block; "" if nothing was chosen yet
    skills: list[str] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)  # one a skill; [] in states of an older version
    appends: int = 0  # changes of the block in this epoch after its first choice
    beside: list[tuple[int, str, str, str]] = field(default_factory=list)  # see rewrite.Beside
    generation: int = 0  # of the skill index the newest part of the block came from
    texts: list[str] = field(default_factory=list)  # the last human texts, redacted, oldest first
    turn: str | None = None  # the human turn the block was last planned for
    mark: str | None = None  # Identity.history_mark at the last plan
    messages: int = 0  # in the last request that carried its history
    used_at: float = 0.0  # unix seconds
    pin_turn: str | None = None  # rl mode: the human turn whose weights were chosen last (`route.turn_of`)
    pin_version: int | None = None  # the version that answers it; None: its upstream does


_json = lru_cache(maxsize=64)(json.dumps)  # a block is written down at each human turn and hardly ever another
_FIELDS = tuple(f.name for f in fields(SessionState))
_values = attrgetter(*_FIELDS)
_BLOCK = _FIELDS.index("block")


def row_of(snapshot: Snapshot) -> SessionRow:
    values = snapshot.values
    small = json.dumps(dict(zip(_FIELDS, values, strict=True)) | {"block": ""})
    return snapshot.key, f'{small[:-1]}, "block": {_json(values[_BLOCK])}}}'.encode(), snapshot.used_at


@lru_cache(maxsize=256)
def session_key(principal: str, session: str) -> str:
    """A session is (principal, session id): the same id under another credential is another session."""
    return sha256(f"{principal}\n{session}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Sessions:
    def __init__(self) -> None:
        self._states: OrderedDict[str, SessionState] = OrderedDict()
        self._responses: OrderedDict[str, Prior] = OrderedDict()

    @classmethod
    def load(cls, path: Path) -> Sessions:
        """The saved sessions; a file that is missing or damaged gives none (they are a cache of choices)."""
        sessions = cls()
        if not path.exists():
            return sessions
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, timeout=1)) as db:
            rows = db.execute("SELECT key, value FROM sessions ORDER BY used_at DESC LIMIT ?", (MAX_SESSIONS,)).fetchall()
            for key, value in reversed(rows):
                with contextlib.suppress(ValueError, TypeError):
                    sessions._states[key] = SessionState(**json.loads(value))
        return sessions

    def forget(self, path: Path) -> None:
        """Only what the file still holds: it was purged."""
        self._states = Sessions.load(path)._states
        self._responses.clear()

    def get(self, key: str) -> SessionState | None:
        state = self._states.get(key)
        if state is not None:
            self._states.move_to_end(key)
        return state

    def put(self, key: str, state: SessionState, sink: SessionSink) -> None:
        self._states[key] = state
        self._states.move_to_end(key)
        while len(self._states) > MAX_SESSIONS:
            self._states.popitem(last=False)
        sink.put_session(Snapshot(key, _values(state), state.used_at))

    def remember_response(self, principal: str, response_id: str, prior: Prior) -> None:
        """For clients that send only what is new (`previous_response_id`)."""
        self._responses[f"{principal}\n{response_id}"] = prior
        while len(self._responses) > MAX_RESPONSES:
            self._responses.popitem(last=False)

    def prior(self, principal: str, response_id: str | None) -> Prior | None:
        return self._responses.get(f"{principal}\n{response_id}") if response_id else None

    def __len__(self) -> int:
        return len(self._states)

    def active(self, seconds: float) -> int:
        """Sessions that were used in the last `seconds`."""
        since = time.time() - seconds
        return sum(state.used_at >= since for state in self._states.values())


class SessionFile:
    """The writer's side of the file; used by the spool's thread."""

    def __init__(self, path: Path) -> None:
        """A damaged file is put aside as ``….damaged``. Raises sqlite3.Error or OSError."""
        try:
            self._db = _open(path)
        except sqlite3.OperationalError:
            raise  # locked, full, not ours to write: a moment's matter, or the caller's
        except sqlite3.DatabaseError:
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            path.replace(path.with_name(path.name + ".damaged"))
            self._db = _open(path)
        self._db.execute("PRAGMA busy_timeout=0")
        self._unpruned = _PRUNE_AFTER

    def write(self, rows: Sequence[SessionRow]) -> bool:
        """False, at once, if another proxy of this home is writing. Raises sqlite3.Error."""
        try:
            with self._db:
                self._db.executemany("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?)", rows)
                self._unpruned += len(rows)
                if self._unpruned >= _PRUNE_AFTER:
                    self._db.execute(
                        "DELETE FROM sessions WHERE key NOT IN (SELECT key FROM sessions ORDER BY used_at DESC LIMIT ?)",
                        (MAX_SESSIONS,),
                    )
                    self._unpruned = 0
        except sqlite3.OperationalError as e:
            if e.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            return False
        return True

    def close(self) -> None:
        self._db.close()


def _open(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    db = sqlite3.connect(path, timeout=5, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=OFF")  # a cache of choices; and a wait for the disk would hold up the spool
        db.execute("CREATE TABLE IF NOT EXISTS sessions (key TEXT PRIMARY KEY, value BLOB NOT NULL, used_at REAL NOT NULL)")
        db.execute("SELECT count(value) FROM sessions").fetchone()
    except BaseException:
        db.close()
        raise
    return db


