"""Where a session can be learned from: stretches of it that have ended.

Design: a segment ends where the conversation does: the same session key goes on under another session
id, the history is compacted or dropped (/new keeps the id), or nobody speaks for
``skills.session_idle_minutes``. Another session's start ends nothing. A subagent has no segments; it
belongs to the one whose trace it shares. What the machine says by itself (heartbeats, announcements,
titles) neither ends a segment nor keeps it open.

A segment and the cursor of its session are written in one transaction, and its id follows from its first
and last turn, so a crash or a second worker can't make two of one. The boundaries follow from what is
stored, not from when somebody looked, so late looking gives the same segments.

Whose words they are is doubted here as well (`trust`): a session id is plain text that anything behind
the proxy can copy. The copy under another key is another session and is known by its id; one under the
same key stands beside the session's own history, which goes on without it.

Limits: a human text is looked for in later requests by its words; a client that rewrites them looks
like one that dropped its history. Who holds the same key and repeats the whole history can't be told
from the client. A turn that is taken in after its segment was made is left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, Row, and_, bindparam, func, or_, select
from sqlalchemy.dialects.postgresql.dml import Insert as PostgresInsert
from sqlalchemy.dialects.sqlite.dml import Insert as SqliteInsert

from metaclaw_core.model import Kind, Role
from metaclaw_core.store.queries import insert_new, load_chain, upsert
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import evolve_cursors, segments, sessions, turns

_SPOKEN = (Kind.MAIN.value, Kind.TOOL.value)
_RECENT_TEXTS = 5
_FORGOTTEN_SECONDS = 30 * 86_400.0  # a rest that nobody looked at for so long is left alone, unless it is asked for
_MAX_TURNS = 5_000  # looked at in one go; what is beyond comes with the next look
_REMEMBERED = 50_000  # turns
_SURE_CHARS = 12  # a shorter text may stand inside another one by chance
_RUNTIME = re.compile(r"\n\nRuntime: [^\n]*\Z")  # OpenClaw's session line after the first message


@dataclass(frozen=True, slots=True)
class NewSegment:
    id: str
    session: str
    end_reason: str
    turns: int


class SegmentFinder:
    """`find` again and again; it remembers when a session is worth another look, and is right without remembering."""

    def __init__(self, store: Store, idle_s: float) -> None:
        self._store = store
        self._idle_s = idle_s
        self._looked: dict[str, tuple[float, float]] = {}  # session → (its last_at then, when to look again)
        self._successors: dict[str, float] = {}  # session → when the newest one of its key began
        # Content key of a turn → what it was seen to go on from. Not its row's id: after a purge those are given again.
        self._goes_on: dict[str, tuple[int, str, str]] = {}

    def find(self, now: float, *, asked: Collection[str] = (), imported: bool = False) -> list[NewSegment]:
        """Segments that have ended since the last look, written down. `asked`: keys of sessions whose open rest counts
        as ended. `imported`: those read from captures too, which nobody asks for by living on."""
        recent = or_(sessions.c.last_at > now - _FORGOTTEN_SECONDS, sessions.c.id.in_(list(asked)))
        with self._store.reading() as connection:
            open_ = connection.execute(_OPEN.where(recent)).all()
            newest = {(r.principal, r.session_key): r.at for r in connection.execute(_NEWEST)}
        made: list[NewSegment] = []
        for session in open_:
            wanted = session.id in asked
            last_at, look_at = self._looked.get(session.id, (-1.0, 0.0))
            successor_at = newest.get((session.principal, session.session_key), 0.0)
            replaced = successor_at > max(session.first_at, self._successors.get(session.id, 0.0))
            if not wanted and not replaced and session.last_at == last_at and now < look_at:
                continue
            self._successors[session.id] = successor_at
            with self._store.reading() as connection:
                groups, spoke_at = self._groups(connection, session, now, wanted, successor_at, imported or wanted)
            if groups:
                with self._store.transaction() as connection:
                    made += _write(connection, session, groups, now)
            again = spoke_at + self._idle_s if spoke_at is not None else float("inf")
            self._looked[session.id] = (session.last_at, again if again > now else float("inf"))
        return made

    def _groups(
        self, db: Connection, session: Row[Any], now: float, wanted: bool, successor_at: float, imported: bool
    ) -> tuple[list[_Group], float | None]:
        """The ended groups of turns after the session's cursor, and when somebody last spoke (None: nobody did)."""
        rows = _turns_after_cursor(db, session.id, imported)
        groups: list[_Group] = []
        now_open = _Group()

        def close(reason: str, trust: str | None = None) -> None:
            nonlocal now_open
            if now_open.rows:
                now_open.reason, now_open.trust = reason, now_open.trust or trust
                groups.append(now_open)
            now_open = _Group()

        for row in rows:
            if now_open.rows and row.started_at - now_open.rows[-1].started_at > self._idle_s:
                close("idle")
            if row.kind == Kind.COMPACTION.value:
                if now_open.rows:
                    now_open.rows.append(row)
                close("compaction")
                continue
            if now_open.rows and row.history_mark is not None and row.history_mark != now_open.rows[-1].history_mark:
                close("compaction")
            elif now_open.rows and self._dropped_history(db, row, now_open.rows):
                beside = _goes_on_without(db, session.id, row, now_open.rows[0])
                before = now_open.rows[-1]
                close("reset", "it stands beside the session's own history" if beside else None)
                if not beside and row.tools != before.tools:
                    now_open.trust = "a history begins anew with other tools than the session had"
            now_open.rows.append(row)
        spoke_at = now_open.rows[-1].started_at if now_open.rows else None
        if spoke_at is not None and spoke_at < successor_at:
            close("new session")
        elif spoke_at is not None and now - spoke_at > self._idle_s:
            close("idle")
        elif wanted:
            close("asked for")
        return groups, spoke_at

    def _dropped_history(self, db: Connection, row: Row[Any], before: Sequence[Row[Any]]) -> bool:
        """What was seen once need not be read again: an open rest is looked at whenever something is said in its session."""
        seen = (len(before), before[0].content_key, before[-1].content_key)
        if self._goes_on.get(row.content_key) == seen:
            return False
        dropped = _dropped_history(db, row, before)
        if not dropped:
            if len(self._goes_on) >= _REMEMBERED:
                self._goes_on.clear()
            self._goes_on[row.content_key] = seen
        return dropped


class _Group:
    def __init__(self) -> None:
        self.rows: list[Row[Any]] = []
        self.reason = ""
        self.trust: str | None = None


def user_texts(db: Connection, tip: str | None) -> list[str]:
    """The texts of all user messages of the conversation that ends with `tip`, as the client sent them."""
    return [m.text for m in load_chain(db, tip, Role.USER)]


def holds(texts: Sequence[str], words: str) -> bool:
    """Does one of the client's messages say `words`, whatever it is wrapped in?"""
    words = _RUNTIME.sub("", words).strip()
    ends = ("\n" + words, "] " + words)
    bare = (_RUNTIME.sub("", text).strip() for text in texts)
    return any(text == words or text.endswith(ends) or (len(words) >= _SURE_CHARS and words in text) for text in bare)


def _dropped_history(db: Connection, row: Row[Any], before: Sequence[Row[Any]]) -> bool:
    """Is this a new human turn whose history holds nothing of what was said before?"""
    said = _said(before)
    if (
        row.kind != Kind.MAIN.value
        or row.retry
        or not said
        or row.user_text == said[-1]
        or row.history_known is not True
    ):
        return False
    visible = user_texts(db, row.prompt_tip)
    return bool(visible) and not any(holds(visible, text) for text in said[-_RECENT_TEXTS:])


def _goes_on_without(db: Connection, session: str, row: Row[Any], first: Row[Any]) -> bool:
    """Does `row` continue what was said before `first`? Then what is between the two stands beside the history."""
    known = {"session": session, "started_at": first.started_at, "id": first.id}
    earlier = [text for text in db.scalars(_EARLIER, known) if len(text) >= _SURE_CHARS]
    if not earlier:
        return False
    visible = user_texts(db, row.prompt_tip)
    return any(holds(visible, text) for text in earlier)


def _said(rows: Sequence[Row[Any]]) -> list[str]:
    """What the human said, without the repeats of tool loops and retries."""
    out: list[str] = []
    for row in rows:
        if row.user_text and (not out or out[-1] != row.user_text):
            out.append(row.user_text)
    return out


def _turns_after_cursor(db: Connection, session: str, imported: bool) -> list[Row[Any]]:
    cursor = db.execute(select(evolve_cursors).where(evolve_cursors.c.session == session)).first()
    query = (
        select(*_COLUMNS)
        .where(turns.c.session == session, turns.c.kind.in_((*_SPOKEN, Kind.COMPACTION.value)))
        .order_by(turns.c.started_at, turns.c.id)
        .limit(_MAX_TURNS)
    )
    if not imported:
        query = query.where(turns.c.live.is_(True))
    if cursor is not None:
        after = and_(turns.c.started_at == cursor.started_at, turns.c.id > cursor.turn)
        query = query.where(or_(turns.c.started_at > cursor.started_at, after))
    return list(db.execute(query))


def _write(db: Connection, session: Row[Any], groups: Sequence[_Group], now: float) -> list[NewSegment]:
    copied = _copied(db, session)
    rows = [_row(session, group, copied, now) for group in groups]
    insert_new(db, segments, rows)
    last = groups[-1].rows[-1]
    db.execute(_move_cursor(db.dialect.name), {"session": session.id, "started_at": last.started_at, "turn": last.id})
    return [NewSegment(row["id"], session.id, row["end_reason"], row["turns"]) for row in rows]


def _row(session: Row[Any], group: _Group, copied: str | None, now: float) -> dict[str, Any]:
    first, last = group.rows[0], group.rows[-1]
    return {
        "id": sha256(f"{session.id}\n{first.content_key}\n{last.content_key}".encode()).hexdigest()[:16],
        "session": session.id,
        "principal": session.principal,
        "first_turn": first.id,
        "last_turn": last.id,
        "turns": len(group.rows),
        "started_at": first.started_at,
        "ended_at": last.started_at,
        "end_reason": group.reason,
        "trust": group.trust or copied,
        "state": "waiting",
        "detail": None,
        "attempts": 0,
        "next_try_at": 0.0,
        "model": None,
        "edits": None,
        "updated_at": now,
    }


@cache
def _move_cursor(dialect: str) -> SqliteInsert | PostgresInsert:
    cursor = upsert(dialect, evolve_cursors)
    moved = {"started_at": cursor.excluded.started_at, "turn": cursor.excluded.turn}
    return cursor.on_conflict_do_update(  # never back: somebody else may have seen more
        index_elements=["session"], set_=moved, where=evolve_cursors.c.started_at <= cursor.excluded.started_at
    )


def _copied(db: Connection, session: Row[Any]) -> str | None:
    """A session id, or a session key that is in use, under a second principal: the later one may be a copy.

    Also what a client does that changes its provider in the middle of a session; its lessons wait for review.
    """
    other = (sessions.c.principal != session.principal, sessions.c.first_at <= session.first_at)
    if not session.generated:
        twin = select(sessions.c.id).where(sessions.c.session_id == session.session_id, *other).limit(1)
        if db.scalar(twin) is not None:
            return "its session id is also that of another caller, who had it first"
    if session.session_key is not None:
        same_key = (sessions.c.session_key == session.session_key, sessions.c.last_at >= session.first_at)
        if db.scalar(select(sessions.c.id).where(*same_key, *other).limit(1)) is not None:
            return "its session key is in use by another caller, who had it first"
    return None


_COLUMNS = (
    turns.c.id,
    turns.c.content_key,
    turns.c.kind,
    turns.c.retry,
    turns.c.user_text,
    turns.c.history_mark,
    turns.c.history_known,
    turns.c.prompt_tip,
    turns.c.tools,
    turns.c.started_at,
)
_EARLIER = (
    select(turns.c.user_text)
    .where(
        turns.c.session == bindparam("session"),
        turns.c.kind == Kind.MAIN.value,
        turns.c.user_text.is_not(None),
        or_(
            turns.c.started_at < bindparam("started_at"),
            and_(turns.c.started_at == bindparam("started_at"), turns.c.id < bindparam("id")),
        ),
    )
    .order_by(turns.c.started_at.desc(), turns.c.id.desc())
    .limit(_RECENT_TEXTS)
)
_OPEN = (
    select(sessions)
    .outerjoin(evolve_cursors, evolve_cursors.c.session == sessions.c.id)
    .where(or_(evolve_cursors.c.started_at.is_(None), sessions.c.last_at > evolve_cursors.c.started_at))
    .order_by(sessions.c.first_at)
)
_NEWEST = (
    select(sessions.c.principal, sessions.c.session_key, func.max(sessions.c.first_at).label("at"))
    .where(sessions.c.session_key.is_not(None))
    .group_by(sessions.c.principal, sessions.c.session_key)
)
