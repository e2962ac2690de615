"""The store: recorded turns, their way through the states, who works on them.

    captured ─▶ scored ─▶ batched ─▶ trained        side exits: skipped(reason), failed(reason)

Design: a move is one transaction and all or nothing: it fails if one of its turns is no longer in the
state it should leave, so two workers can't both believe they moved it. Work in progress is a claim
with an expiry; a worker that dies holds nothing up for longer than that. Rows come out as plain dicts
that are JSON: what a command prints is what a job sees.

Limits: expiry compares the clocks of the machines that share a database; keep them within seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from itertools import batched
from typing import Any, Self

from sqlalchemy import Connection, Engine, Row, and_, func, or_, select, update
from sqlalchemy.exc import SQLAlchemyError

from metaclaw_core.errors import StoreError
from metaclaw_core.model import Exchange, Json, Kind, Message
from metaclaw_core.store.chain import unpack_message
from metaclaw_core.store.ingest import Ingest, IngestReport
from metaclaw_core.store.ingest_columns import USAGE
from metaclaw_core.store.queries import MANY, load_chain, upsert
from metaclaw_core.store.reading import read
from metaclaw_core.store.recall import Recall
from metaclaw_core.store.tables import blobs, counters, leases, messages, sessions, turns
from metaclaw_core.store.types import plain
from metaclaw_core.store.verify import VerifyReport, verify

_PAGE = 500
_LONGEST_LEASE = 900.0  # seconds; nobody asks for more, so what lasts longer was taken while a clock was ahead
_WITH_SESSION = select(turns, sessions.c.session_id, sessions.c.session_key).outerjoin(
    sessions, sessions.c.id == turns.c.session
)


class State(StrEnum):
    CAPTURED = "captured"  # stored, nothing judged yet
    SCORED = "scored"  # the judge has spoken, an abstention included
    BATCHED = "batched"  # part of a training step that has begun
    TRAINED = "trained"  # part of a step whose weights are saved
    SKIPPED = "skipped"  # of no use to learning, `reason` says why; final
    FAILED = "failed"  # could not be moved on; `attempts` counts, may be tried again


_MOVES: Mapping[State, frozenset[State]] = {
    State.CAPTURED: frozenset({State.SCORED, State.SKIPPED, State.FAILED}),
    State.SCORED: frozenset({State.BATCHED, State.SKIPPED, State.FAILED}),
    State.BATCHED: frozenset({State.TRAINED, State.SCORED, State.SKIPPED, State.FAILED}),  # scored: the step was undone
    State.TRAINED: frozenset(),
    State.SKIPPED: frozenset(),
    State.FAILED: frozenset({State.CAPTURED, State.SCORED, State.SKIPPED}),
}


class Store:
    """One database. Methods raise StoreError if it can't be used; any thread may call them."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self.engine = engine
        self._clock = clock
        self._recall = Recall()
        self._recalling = threading.Lock()

    def close(self) -> None:
        self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- in -----------------------------------------------------------------------------------

    def ingest(self, exchanges: Sequence[Exchange], *, redacted: bool = False) -> IngestReport:
        """Store what is new among `exchanges`, in one transaction; the caller may then forget them.

        `redacted` says that they come from a spool, which has replaced secrets already. Those named in the
        report's `failed` are not in the store; all others are.
        """
        with self._recalling:  # and before the write lock: it takes time
            readings = [read(exchange, redacted=redacted, recall=self._recall) for exchange in exchanges]
        with self._write() as connection:
            return Ingest(connection).run(readings)

    def forget(self) -> None:
        """Drop what was kept of the newest exchanges to read the next ones by: it was purged."""
        with self._recalling:
            self._recall = Recall()

    # --- out ----------------------------------------------------------------------------------

    def turns(
        self,
        *,
        session: str | None = None,
        turn_id: str | None = None,
        principal: str | None = None,
        kind: Kind | str | None = None,
        state: State | str | None = None,
        since: float | None = None,
        limit: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Rows, oldest first; with `limit` the newest that many.

        `session` is a session id as the client wrote it (or a generated one), or the key of its row.
        """
        wanted = [
            column == value
            for column, value in (
                (turns.c.turn_id, turn_id),
                (turns.c.principal, principal),
                (turns.c.kind, kind and str(kind)),
                (turns.c.state, state and str(state)),
            )
            if value is not None
        ]
        if session is not None:
            wanted.append(turns.c.session.in_(self._session_keys(session)))
        if since is not None:
            wanted.append(turns.c.started_at >= since)
        query = _WITH_SESSION
        if limit is not None:
            newest = (
                select(turns.c.id)
                .where(*wanted)
                .order_by(turns.c.started_at.desc(), turns.c.id.desc())
                .limit(limit)
            )
            with self._read() as connection:
                ids = connection.scalars(newest).all()[::-1]
            for some in batched(ids, MANY):
                with self._read() as connection:
                    rows = {row.id: row for row in connection.execute(query.where(turns.c.id.in_(some)))}
                yield from (_turn(rows[i]) for i in some if i in rows)
            return
        page = query = query.where(*wanted).order_by(turns.c.started_at, turns.c.id).limit(_PAGE)
        while True:  # pages by key: nothing is held open while the caller works
            with self._read() as connection:
                found = connection.execute(page).all()
            yield from map(_turn, found)
            if len(found) < _PAGE:
                return
            at, last = found[-1].started_at, found[-1].id
            after = or_(turns.c.started_at > at, and_(turns.c.started_at == at, turns.c.id > last))
            page = query.where(after)

    def _session_keys(self, name: str) -> Sequence[str]:
        """The keys of the sessions called `name`, one a principal. First apart: one statement over both tables would go
        through all turns by time, whatever session they are of."""
        named = plain(name)  # as ingest stores it: long ones are cut, what no column takes is replaced
        with self._read() as connection:
            return connection.scalars(select(sessions.c.id).where(or_(sessions.c.session_id == named, sessions.c.id == named))).all()

    def sessions(self, *, principal: str | None = None) -> Iterator[dict[str, Any]]:
        """Sessions, oldest first, each with its number of turns and how many of each kind."""
        with self._read() as connection:
            kinds: dict[str, dict[str, int]] = {}
            for row in connection.execute(
                select(turns.c.session, turns.c.kind, func.count().label("n"))
                .where(turns.c.session.is_not(None))
                .group_by(turns.c.session, turns.c.kind)
                .order_by(turns.c.kind)
            ):
                kinds.setdefault(row.session, {})[row.kind] = row.n
            query = select(sessions).order_by(sessions.c.first_at, sessions.c.id)
            if principal is not None:
                query = query.where(sessions.c.principal == principal)
            found = connection.execute(query).all()
        for row in found:  # nothing is held open while the caller works
            of_kind = kinds.get(row.id, {})
            yield {**row._mapping, "turns": sum(of_kind.values()), "kinds": of_kind}

    def conversation(self, tip: str | None) -> tuple[Message, ...]:
        """The messages that end with `tip` (a row's `prompt_tip` or `response_tip`), oldest first."""
        with self._read() as connection:
            return load_chain(connection, tip)

    def response(self, row: Mapping[str, Any]) -> Message | None:
        """The answer of a turn exactly as it came, reasoning included; None if there was none."""
        if row["response_tip"] is None:
            return None
        if row["response"] is not None:
            return unpack_message("assistant", row["response"])
        with self._read() as connection:
            stored = connection.execute(select(messages).where(messages.c.id == row["response_tip"])).one()
        return unpack_message(stored.role, stored.content)

    def blob(self, blob_id: str | None) -> Json:
        """What a row's `tools`, `extra` or `injection` stands for; None for None."""
        with self._read() as connection:
            return connection.scalar(select(blobs.c.content).where(blobs.c.id == blob_id)) if blob_id else None

    def counters(self) -> dict[str, int]:
        with self._read() as connection:
            return {row.name: row.value for row in connection.execute(select(counters).order_by(counters.c.name))}

    def verify(self) -> VerifyReport:
        """Re-derive every hash and follow every reference."""
        with self._read() as connection:
            return verify(connection)

    # --- through the states -------------------------------------------------------------------

    def claim(self, state: State | str, owner: str, limit: int, lease_s: float) -> list[dict[str, Any]]:
        """Up to `limit` turns in `state` that nobody works on, oldest first; `owner`'s for `lease_s` seconds."""
        now = self._clock()
        free = or_(turns.c.claimed_by.is_(None), turns.c.claim_expires_at < now)
        with self._write() as connection:
            ids = connection.scalars(
                select(turns.c.id)
                .where(turns.c.state == str(state), free)
                .order_by(turns.c.started_at, turns.c.id)
                .limit(limit)
                .with_for_update(skip_locked=True)  # PostgreSQL: not those another worker is just claiming
            ).all()
            for some in batched(ids, MANY):
                connection.execute(
                    update(turns).where(turns.c.id.in_(some)).values(claimed_by=owner, claim_expires_at=now + lease_s)
                )
            rows = [
                row
                for some in batched(ids, MANY)
                for row in connection.execute(_WITH_SESSION.where(turns.c.id.in_(some)))
            ]
        return [_turn(row) for row in sorted(rows, key=lambda row: (row.started_at, row.id))]

    def move(
        self,
        ids: Sequence[int],
        from_state: State | str,
        to_state: State | str,
        reason: str | None = None,
        *,
        owner: str | None = None,
    ) -> None:
        """All of `ids` from one state to the next, and their claims end. Raises StoreError, and nothing moved, if one
        is not in `from_state` or, with `owner`, claimed by somebody else."""
        with self._write() as connection:
            self.move_in(connection, ids, from_state, to_state, reason, owner=owner)

    def move_in(
        self,
        connection: Connection,
        ids: Sequence[int],
        from_state: State | str,
        to_state: State | str,
        reason: str | None = None,
        *,
        owner: str | None = None,
    ) -> None:
        """`move` as a part of the caller's transaction (see `transaction`)."""
        old, new = State(from_state), State(to_state)
        if new not in _MOVES[old]:
            raise StoreError(f"A turn can't move from {old} to {new}.")
        if reason is None and new in (State.SKIPPED, State.FAILED):
            raise StoreError(f"A move to {new} needs a reason.")
        moved = 0
        for some in batched(dict.fromkeys(ids), MANY):
            where = [turns.c.id.in_(some), turns.c.state == old.value]
            if owner is not None:
                where.append(turns.c.claimed_by == owner)
            moved += connection.execute(
                update(turns)
                .where(*where)
                .values(
                    state=new.value,
                    reason=reason,
                    attempts=turns.c.attempts + int(new is State.FAILED),
                    claimed_by=None,
                    claim_expires_at=None,
                )
            ).rowcount
        wanted = len(set(ids))
        if moved != wanted:
            raise StoreError(f"{wanted - moved} of {wanted} turns are no longer in state {old}; none was moved.")

    def release(self, ids: Sequence[int], owner: str) -> int:
        """Give up `owner`'s claims on `ids`; how many there were."""
        with self._write() as connection:
            return sum(
                connection.execute(
                    update(turns)
                    .where(turns.c.id.in_(some), turns.c.claimed_by == owner)
                    .values(claimed_by=None, claim_expires_at=None)
                ).rowcount
                for some in batched(ids, MANY)
            )

    # --- leases -------------------------------------------------------------------------------

    def acquire_lease(self, name: str, owner: str, ttl_s: float) -> bool:
        """Make `owner` the holder of `name` for `ttl_s` seconds, unless another holds it. Also renews one's own. A lease that
        lasts longer than anybody is given was taken while the clock was ahead, and holds up nobody."""
        if ttl_s > _LONGEST_LEASE - 60:  # the clocks of two machines may be apart
            raise ValueError(f"a lease of {ttl_s} s is too long")
        now = self._clock()
        with self._write() as connection:
            insert = upsert(connection.dialect.name, leases).values(name=name, owner=owner, expires_at=now + ttl_s)
            taken = connection.execute(
                insert.on_conflict_do_update(
                    index_elements=["name"],
                    set_={"owner": owner, "expires_at": now + ttl_s},
                    where=or_(leases.c.owner == owner, leases.c.expires_at < now, leases.c.expires_at > now + _LONGEST_LEASE),
                ).returning(leases.c.owner)
            ).first()
        return taken is not None

    def renew_lease(self, name: str, owner: str, ttl_s: float) -> bool:
        """Prolong a lease that `owner` still holds; False: it was lost, stop working."""
        now = self._clock()
        held = (leases.c.name == name, leases.c.owner == owner, leases.c.expires_at >= now)
        with self._write() as connection:
            return connection.execute(update(leases).where(*held).values(expires_at=now + ttl_s)).rowcount == 1

    def release_lease(self, name: str, owner: str) -> None:
        with self._write() as connection:
            connection.execute(leases.delete().where(leases.c.name == name, leases.c.owner == owner))

    # --- connections --------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A write transaction for what belongs together with a move (`move_in`)."""
        with self._write() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection for questions that this class has no method for."""
        with self._read() as connection:
            yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with _typed(self.engine), self.engine.connect() as connection:
            connection = connection.execution_options(metaclaw_write=True)
            with connection.begin():
                yield connection

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with _typed(self.engine), self.engine.connect() as connection:
            yield connection


@contextmanager
def _typed(engine: Engine) -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as e:
        raise StoreError(f"The store {engine.url!r} can't be used: {getattr(e, 'orig', None) or e}.") from e


def _turn(row: Row[Any]) -> dict[str, Any]:
    """A row as JSON, its token counts gathered under `usage` (None: nothing was reported)."""
    fields = dict(row._mapping)
    usage = {name: fields.pop(name) for name in USAGE}
    return fields | {"usage": usage if any(v is not None for v in usage.values()) else None}
