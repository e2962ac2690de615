"""Which session an exchange belongs to where the client doesn't say.

Design: the deepest known prefix. Earlier turns of the same principal are looked up by the ids of the
request's chain, from its end backwards: the answer of an earlier turn in the chain is proof, its prompt
is good evidence. A prompt without any answer in it (the opening) proves little, since two conversations
often begin alike: it counts if the earlier turn got no answer or is at most a minute old. Turns that were recorded before ids
had a place (``store.chain``) are found by what their ids were.

A compaction call shows no session. It holds the older part of a conversation as a transcript, and belongs
to the session whose newest request holds all the human lines of it. Where two fit, it is left open.

Limits: a client that rewrites its history down to the system prompt starts a new session.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import chain, repeat
from typing import Any

from sqlalchemy import Connection, bindparam, case, func, or_, select
from sqlalchemy.dialects.postgresql.dml import Insert as PostgresInsert
from sqlalchemy.dialects.sqlite.dml import Insert as SqliteInsert

from metaclaw_core.model import Role
from metaclaw_core.store.chain import unplaced
from metaclaw_core.store.queries import load_chain, upsert
from metaclaw_core.store.tables import sessions, turns

_STEPS = (8, 64, 500)  # ids looked up at once, deepest first: the answer before is near the end
_SAME_OPENING_SECONDS = 60.0
_COMPACTED_SECONDS = 24 * 3600.0
_COMPACTED_SESSIONS = 20
_USER_LINE = re.compile(r"^\[User\]: (.*)$", re.MULTILINE)  # as `conversation_of` gives them


def session_row_id(principal: str, session_id: str) -> str:
    """The key of a session's row: any process derives the same."""
    return sha256(f"{principal}\n{session_id}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


def generated_id(principal: str, opening: str, started_at: float) -> str:
    """A name for a session that has none; `opening` is the chain id of its first messages."""
    return "p-" + sha256(f"{principal}\n{opening}\n{round(started_at * 1e6)}".encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Match:
    session: str  # key of its row
    repeats: bool  # the very same prompt was sent before


_prefix = select(turns.c.session, turns.c.prompt_tip, turns.c.response_tip, turns.c.state, turns.c.started_at).where(
    turns.c.principal == bindparam("principal"),
    turns.c.session.is_not(None),
    or_(
        turns.c.prompt_tip.in_(bindparam("ids", expanding=True)),
        turns.c.response_tip.in_(bindparam("ids", expanding=True)),
    ),
)


def by_prefix(
    connection: Connection, principal: str, ids: Sequence[str], opening: int, started_at: float
) -> Match | None:
    """The session whose turn is the deepest prefix of the chain `ids`; the first `opening` ids hold no answer yet."""
    depth = {name: place for place, chain_id in enumerate(ids) for name in (chain_id, unplaced(chain_id))}
    for some in _from_the_end(ids):
        found: list[tuple[int, bool, float, str]] = []
        for row in connection.execute(_prefix, {"principal": principal, "ids": [*some, *map(unplaced, some)]}):
            if row.response_tip in depth:
                found.append((depth[row.response_tip], True, row.started_at, row.session))
            place = depth.get(row.prompt_tip, -1)
            unanswered = row.state == "skipped" or abs(started_at - row.started_at) <= _SAME_OPENING_SECONDS
            if place >= opening or (place >= 0 and (unanswered or place < len(ids) - 1)):
                found.append((place, False, row.started_at, row.session))
        if found:
            place, answer, _, session = max(found)
            return Match(session, repeats=place == len(ids) - 1 and not answer)
    return None


def _from_the_end(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    end = len(ids)
    for step in chain(_STEPS, repeat(_STEPS[-1])):
        if end <= 0:
            return
        yield ids[max(0, end - step) : end]
        end -= step


def by_conversation(connection: Connection, principal: str, conversation: str, started_at: float) -> str | None:
    """The one session of the last day whose newest request holds every human line of `conversation`."""
    lines = {line for line in _USER_LINE.findall(conversation) if line.strip()}
    if not lines:
        return None
    recent = connection.scalars(
        select(sessions.c.id)
        .where(
            sessions.c.principal == principal,
            sessions.c.last_at >= started_at - _COMPACTED_SECONDS,
            sessions.c.first_at <= started_at,
        )
        .order_by(sessions.c.last_at.desc())
        .limit(_COMPACTED_SESSIONS)
    ).all()
    fits: list[str] = []
    for session in recent:
        tip = connection.scalar(
            select(turns.c.prompt_tip)
            .where(turns.c.session == session, turns.c.prompt_tip.is_not(None), turns.c.started_at <= started_at)
            .order_by(turns.c.started_at.desc(), turns.c.id.desc())
            .limit(1)
        )
        said = "\n".join(m.text for m in load_chain(connection, tip) if m.role is Role.USER)
        if all(line in said for line in lines):
            fits.append(session)
    return fits[0] if len(fits) == 1 else None


@cache
def _touch(dialect: str) -> SqliteInsert | PostgresInsert:
    insert = upsert(dialect, sessions)
    new = insert.excluded
    return insert.on_conflict_do_update(
        index_elements=["id"],
        set_={
            "first_at": case((new.first_at < sessions.c.first_at, new.first_at), else_=sessions.c.first_at),
            "last_at": case((new.last_at > sessions.c.last_at, new.last_at), else_=sessions.c.last_at),
            "session_key": func.coalesce(sessions.c.session_key, new.session_key),
        },
    )


def touch(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Make the rows of sessions (see `tables`), or widen the times of those that are there. No session twice."""
    if rows:
        connection.execute(_touch(connection.dialect.name), rows)
