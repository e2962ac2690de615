"""Forgetting: a session, what is older than a date, or everything, out of every table and file of a home.

Design: turns are chosen, and with them goes whatever only they needed: messages and blobs that no other turn refers
to, sessions without turns, votes, segments, uses. Then the files are written anew (VACUUM) and their logs cut to
nothing, so that the bytes are gone and not only the rows. What is not in the store has its own function: spools, the
proxy's session file, logs. ``HOLDS`` says of every table how it is handled; a test fails for a table without an entry.

Limits: what other sessions repeat of a conversation (a subagent's task, a fork) is theirs and stays, and so does what
newer exchanges of the same session repeat where only a date was given. A learned skill stays; the command names it. An
exchange that is still open is recorded when it ends. PostgreSQL's own log, copies, backups and the disk's free blocks
are out of reach.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Select,
    Table,
    Text,
    and_,
    delete,
    exists,
    func,
    or_,
    select,
    true,
    type_coerce,
    union,
)
from sqlalchemy.exc import DBAPIError

from metaclaw_core.errors import StoreError
from metaclaw_core.store import samplefile
from metaclaw_core.store.queries import MANY
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.spool import make_whole
from metaclaw_core.store.tables import (
    blobs,
    evolve_cursors,
    health,
    job_runs,
    messages,
    notices,
    samples,
    segments,
    sessions,
    skill_uses,
    step_turns,
    turns,
    votes,
)

HOLDS = {
    "turns": "chosen rows",
    "messages": "those no turn refers to any more",
    "blobs": "those no turn refers to any more",
    "sessions": "those without turns",
    "votes": "of the turns",
    "segments": "that begin with one of the turns",
    "evolve_cursors": "of the sessions that are gone",
    "skill_uses": "of the human turns that are gone",
    "job_runs": "reports that name the session",
    "notices": "that name the session",
    "health": "that name the session",
    "leases": "nothing of a session",
    "counters": "nothing of a session",
    "spend": "nothing of a session",
    "caller_spend": "nothing of a session",
    "samples": "of the turns",
    "step_turns": "of the turns",
    "versions": "nothing of a session",
    "route_events": "nothing of a session",
    "steps": "nothing of a session",
    "trainer_state": "nothing of a session",
}
_SECONDS = 15.0
_TOKEN = re.compile(rb"[\w-]{6,}")  # what ids look like; looked up as a whole, since there may be very many


@dataclass(frozen=True, slots=True)
class Selection:
    """What to forget; neither: everything."""

    session: str | None = None  # a session id as the client wrote it (or a generated one), or the key of its row
    before: float | None = None  # unix seconds

    @property
    def everything(self) -> bool:
        return self.session is None and self.before is None


@dataclass(frozen=True, slots=True)
class Found:
    """What a selection means in one store."""

    selection: Selection
    turns: int
    keys: frozenset[str]  # of sessions that will be gone
    touched: frozenset[str]  # of sessions that lose turns and stay
    names: frozenset[str]  # session ids of `keys`
    words: frozenset[str]  # what a log could call them and their turns
    generated: bool  # a client that names no session is among them
    related: tuple[str, ...]  # ids of other sessions that share a human turn with them (subagents)


@dataclass(frozen=True, slots=True)
class PurgeReport:
    turns: int = 0
    sessions: int = 0
    messages: int = 0
    blobs: int = 0
    problems: tuple[str, ...] = ()  # sentences about what could not be cleaned


# --- the store --------------------------------------------------------------------------------


def find(store: Store, selection: Selection) -> Found:
    """Raises StoreError for a session that isn't there."""
    with store.reading() as connection:
        chosen = _chosen(connection, selection)
        count = connection.scalar(select(func.count()).select_from(turns).where(chosen)) or 0
        hit = set(connection.scalars(select(turns.c.session).distinct().where(chosen, turns.c.session.is_not(None))))
        stay = set(connection.scalars(select(turns.c.session).distinct().where(~chosen, turns.c.session.is_not(None))))
        if selection.session is not None:
            hit |= set(connection.scalars(select(sessions.c.id).where(_named(selection.session))))
        keys = frozenset(hit - stay)
        names: set[str] = set()
        words: set[str] = set(keys)
        generated = False
        for some in batched(keys, MANY):
            for row in connection.execute(select(sessions).where(sessions.c.id.in_(some))):
                names.add(row.session_id)
                generated = generated or row.generated
        if not selection.everything:
            for row in connection.execute(select(turns.c.turn_id, turns.c.flow_id, turns.c.trace_id).where(chosen)):
                words |= {word for word in row if word}
        related = _related(connection, chosen, keys) if selection.session is not None else ()
        return Found(
            selection, count, keys, frozenset(hit & stay), frozenset(names), frozenset(words | names), generated, related
        )


def purge(store: Store, found: Found) -> PurgeReport:
    """Take it out of the database, in one transaction, and its bytes out of the file."""
    with store.transaction() as connection:
        chosen = _chosen(connection, found.selection)
        gone = select(turns.c.id).where(chosen)
        connection.execute(delete(votes).where(votes.c.turn.in_(gone)))
        connection.execute(delete(step_turns).where(step_turns.c.turn.in_(gone)))
        flows = select(turns.c.flow_id).where(turns.c.id.in_(gone), turns.c.flow_id.is_not(None))
        connection.execute(delete(samples).where(samples.c.flow_id.in_(flows)))
        connection.execute(delete(segments).where(or_(segments.c.first_turn.in_(gone), segments.c.last_turn.in_(gone))))
        turned = connection.execute(delete(turns).where(chosen)).rowcount
        left = select(turns.c.turn_id).where(turns.c.turn_id.is_not(None))
        connection.execute(delete(skill_uses).where(skill_uses.c.turn_id.not_in(left)))
        sessioned = connection.execute(delete(sessions).where(~exists().where(turns.c.session == sessions.c.id))).rowcount
        known = select(sessions.c.id)
        connection.execute(delete(segments).where(segments.c.session.not_in(known)))
        connection.execute(delete(evolve_cursors).where(evolve_cursors.c.session.not_in(known)))
        messaged = _delete_all_but(connection, messages, _live_messages())
        blobbed = _delete_all_but(connection, blobs, _live_blobs())
        _forget_reports(connection, found)
    return PurgeReport(turned, sessioned, messaged, blobbed, tuple(_scrub(store.engine)))


def _chosen(connection: Connection, selection: Selection) -> ColumnElement[bool]:
    if selection.everything:
        return true()
    if selection.before is not None:
        return turns.c.started_at < selection.before
    keys = list(connection.scalars(select(sessions.c.id).where(_named(selection.session or ""))))
    if not keys:
        raise StoreError(f"There is no session {selection.session}: `metaclaw sessions` lists them.")
    return turns.c.session.in_(keys)


def _named(session: str) -> ColumnElement[bool]:
    return or_(sessions.c.session_id == session, sessions.c.id == session)


def _related(connection: Connection, chosen: ColumnElement[bool], keys: Collection[str]) -> tuple[str, ...]:
    other = turns.alias("other")
    shared = (
        select(sessions.c.session_id)
        .distinct()
        .join(other, other.c.session == sessions.c.id)
        .join(turns, and_(turns.c.trace_id == other.c.trace_id, turns.c.principal == other.c.principal))
        .where(chosen, sessions.c.id.not_in(list(keys)))
        .order_by(sessions.c.session_id)
    )
    return tuple(connection.scalars(shared))


def _live_messages() -> Select[Any]:
    """Ids of the messages that a turn's chains hold."""
    tips = union(*(select(turns.c[name].label("id")).where(turns.c[name].is_not(None)) for name in ("system_tip", "prompt_tip", "response_tip")))
    live = select(tips.subquery().c.id).cte("live", recursive=True)
    live = live.union(select(messages.c.parent).join(live, live.c.id == messages.c.id).where(messages.c.parent.is_not(None)))
    return select(live.c.id)


def _live_blobs() -> Select[Any]:
    used = union(*(select(turns.c[name].label("id")).where(turns.c[name].is_not(None)) for name in ("tools", "extra", "injection")))
    return select(used.subquery().c.id)


def _delete_all_but(connection: Connection, table: Table, live: Select[Any]) -> int:
    """How many went. Counted before, since SQLite's driver does not count a statement that begins with WITH."""
    dead = table.c.id.not_in(live)
    count = connection.scalar(select(func.count()).select_from(table).where(dead)) or 0
    if count:
        connection.execute(delete(table).where(dead))
    return count


def _forget_reports(connection: Connection, found: Found) -> None:
    if found.selection.everything:
        for table in (job_runs, notices, health):
            connection.execute(delete(table))
        return
    for column in (job_runs.c.report, job_runs.c.error, notices.c.text, health.c.reason, health.c.detail):
        text = type_coerce(column, Text)
        for some in batched(found.keys | found.names, 50):
            # As JSON writes it: these columns hold JSON text.
            patterns = [text.contains(json.dumps(word)[1:-1], autoescape=True) for word in some]
            connection.execute(delete(column.table).where(or_(*patterns)))


def _scrub(engine: Engine) -> Iterator[str]:
    """Write the database anew without what was deleted."""
    raw = engine.raw_connection()
    try:
        if engine.dialect.name == "sqlite":
            yield from _rewrite(raw.driver_connection, str(engine.url.database))  # type: ignore[arg-type]
            return
    except DBAPIError as e:
        raise StoreError(f"The store can't be written anew: {e.orig}.") from e
    finally:
        raw.close()
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM")


def _rewrite(database: sqlite3.Connection, name: str) -> Iterator[str]:
    """VACUUM and an empty log, so that no byte of a deleted row is in the files; else a sentence why not."""
    try:
        database.execute("VACUUM")
        deadline = time.monotonic() + _SECONDS
        while database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            if time.monotonic() > deadline:
                yield f"{name}-wal could not be emptied, because another process reads it: stop the proxy and purge again."
                return
            time.sleep(0.05)
    except sqlite3.Error as e:
        yield f"{name} could not be written anew ({e}): deleted rows may still be in its file; purge again."


# --- the other files --------------------------------------------------------------------------


def purge_spools(folder: Path, found: Found) -> list[str]:
    """Rows that wait or were set aside, and the freed bytes of all others; sentences about files that can't be cleaned."""
    problems: list[str] = []
    for path in sorted(folder.glob("*.db")):
        try:
            with _opened(path) as database:
                make_whole(database)
                rows = [row[0] for row in database.execute("SELECT id, head, request_body, response_body FROM exchanges") if _in_spool(row, found)]
                database.executemany("DELETE FROM exchanges WHERE id = ?", [(row_id,) for row_id in rows])
                problems += _rewrite(database, str(path))
        except (sqlite3.Error, OSError) as e:
            problems.append(f"{path} can't be read ({e}), so it may hold what should be forgotten: remove it.")
    return problems


def _in_spool(row: tuple[int, str, bytes, bytes], found: Found) -> bool:
    _, head, request, response = row
    if found.selection.everything:
        return True
    if found.selection.before is not None:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return float(json.loads(head)["started_at"]) < found.selection.before
        return False
    return any(name in head or name.encode() in request or name.encode() in response for name in found.names)


def purge_session_file(path: Path, found: Found) -> list[str]:
    """The proxy's own memory of sessions. Of a client that names none, any may be meant: then all such rows go, which
    costs those sessions a newly chosen block."""
    path.with_name(path.name + ".damaged").unlink(missing_ok=True)
    if not path.exists():
        return []
    try:
        with _opened(path) as database:
            for key, value, used_at in database.execute("SELECT key, value, used_at FROM sessions").fetchall():
                if _is_gone(key, value, used_at, found):
                    database.execute("DELETE FROM sessions WHERE key = ?", (key,))
                elif key in found.touched:
                    kept = json.dumps({**json.loads(value), "texts": []}).encode()
                    database.execute("UPDATE sessions SET value = ? WHERE key = ?", (kept, key))
            return list(_rewrite(database, str(path)))
    except (sqlite3.Error, OSError) as e:
        return [f"{path} can't be read ({e}), so it may hold what should be forgotten: stop the proxy and remove it."]


def _is_gone(key: str, value: bytes, used_at: float, found: Found) -> bool:
    if found.selection.everything or key in found.keys:
        return True
    if found.selection.before is not None and used_at < found.selection.before:
        return True
    try:
        name = json.loads(value).get("session_id")
    except (ValueError, AttributeError):
        return True  # nobody can read it, the proxy neither
    return name in found.names or (name is None and found.generated)


def purge_policy_file(path: Path, found: Found) -> list[str]:
    """What the policy server remembers. Of a client that names no session any may be meant: then all memory goes, which
    costs those sessions that their replies are tokenised anew."""
    if not path.exists():
        return []
    try:
        with _opened(path) as database:
            samplefile.forget(
                database,
                sessions=found.keys | found.names,
                flows=found.words,
                before=found.selection.before,
                memory=found.generated,
                everything=found.selection.everything,
            )
            return list(_rewrite(database, str(path)))
    except (sqlite3.Error, OSError) as e:
        return [f"{path} can't be read ({e}), so it may hold what should be forgotten: stop the proxy and remove it."]


def purge_logs(folder: Path, found: Found) -> list[str]:
    """Lines that name the session or one of its turns; everything where everything is forgotten."""
    words = {word.encode() for word in found.words}
    odd = [word for word in words if not _TOKEN.fullmatch(word)]
    problems: list[str] = []
    for path in sorted(folder.glob("*.log*")):
        try:
            with path.open("r+b") as file:
                lines = file.readlines()
                kept = [] if found.selection.everything else [line for line in lines if not _names(line, words, odd)]
                if len(kept) < len(lines):
                    file.seek(0)
                    file.truncate()  # in place: a running process goes on writing at the end
                    file.writelines(kept)
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as e:
            problems.append(f"{path} can't be cleaned ({e.strerror}): remove it by hand.")
    return problems


def _names(line: bytes, words: set[bytes], odd: Sequence[bytes]) -> bool:
    return not words.isdisjoint(_TOKEN.findall(line)) or any(word in line for word in odd)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None)) as database:
        database.execute("PRAGMA busy_timeout=10000")
        yield database


def learned_from(skill_sessions: Iterable[tuple[str, Sequence[str]]], found: Found) -> list[str]:
    """Names of skills whose provenance holds a forgotten session."""
    ids = found.keys | found.names
    return sorted(name for name, known in skill_sessions if any(session in ids for session in known))
