"""A batch of exchanges into the store, inside the caller's transaction.

Design: all of a batch is decided first and written then, a statement for each kind of row, in one savepoint. Only where
something is wrong with an exchange is the savepoint undone and each exchange given its own, so that a bad one
never takes its neighbours along; it becomes a row with a reason, and only if even that fails is it reported back. What
the unique keys say is there is left out, which makes at-least-once into exactly-once. What the database knows is
looked up inside the transaction and remembered only until its end: another process may prune in between. A message is
there only if all before it are, so of a history that was seen before its last id is asked for.

A chain holds the client's original messages (see ``ingest_chain``).

Limits: two conversations with the same opening are told apart by the answer only; an identical first
request counts as a repetition for a minute, or when the earlier one failed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, bindparam, select
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError

from metaclaw_core.agents import identify
from metaclaw_core.agents.base import Identity, Prior
from metaclaw_core.agents.openclaw import conversation_of
from metaclaw_core.model import Exchange, Json, Kind, Request, Role
from metaclaw_core.store.chain import blob_id, message_id, pack_message
from metaclaw_core.store.ingest_chain import Chain, chain_of, traced, turn_id_of
from metaclaw_core.store.ingest_columns import exchange_columns, response_columns
from metaclaw_core.store.ingest_writes import Writes
from metaclaw_core.store.queries import add_to_counter, known_messages, load_chain, recorded, with_turn_id
from metaclaw_core.store.reading import Reading
from metaclaw_core.store.sessions import by_conversation, by_prefix, generated_id, session_row_id
from metaclaw_core.store.tables import messages, sessions, turns
from metaclaw_core.store.types import plain

logger = logging.getLogger(__name__)

_ASK_ABOVE = 8  # unknown messages; below it inserting them all is cheaper than asking which are new


@dataclass(frozen=True, slots=True)
class IngestReport:
    stored: int  # new rows, the skipped ones included
    skipped: int  # of them, in state "skipped"
    duplicates: int  # already there
    failed: tuple[tuple[int, str], ...] = ()  # (place in the batch, why) of those that are not in the store


class Ingest:
    """The work of one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._db = connection

    def run(self, readings: Sequence[Reading]) -> IngestReport:
        failed: list[tuple[int, str]] = []
        try:
            counts = self._all_or_none(readings)
        except Exception as e:  # the boundary: what is wrong with one exchange stays with it
            if _is_the_databases(e):
                raise  # and the batch comes again
            counts = Counter()
            for place, reading in enumerate(readings):
                problem = self._alone(reading, counts)
                if problem is not None:
                    bare = Reading(reading.exchange, reading.content_key, None, None, problem, reading.error, None)
                    worse = self._alone(bare, counts)
                    if worse is not None:
                        failed.append((place, f"{problem}; then {worse}"))
        for name, value in sorted(counts.items()):
            add_to_counter(self._db, name, value)
        return IngestReport(counts["stored"], counts["skipped"], counts["duplicates"], tuple(failed))

    def _all_or_none(self, readings: Sequence[Reading]) -> Counter[str]:
        with self._db.begin_nested():
            return _Batch(self._db).put(readings)

    def _alone(self, reading: Reading, counts: Counter[str]) -> str | None:
        """None if the exchange is in the store now, in whatever state; else what went wrong."""
        try:
            try:
                counts += self._all_or_none([reading])
            except IntegrityError:  # another process was first with the turn or its answer, as we shall see
                counts += self._all_or_none([reading])
        except Exception as e:
            if _is_the_databases(e):
                raise
            logger.exception("metaclaw: exchange %s can't be stored as parsed", reading.exchange.flow_id)
            return f"internal error: {type(e).__name__}: {getattr(e, 'orig', None) or e}"
        return None


class _Batch:
    """Exchanges that are written together."""

    def __init__(self, connection: Connection) -> None:
        self._db = connection
        self._writes = Writes(connection)
        self._known: set[str] = set()  # ids of messages and blobs that are in the database or about to be
        self._content: dict[str, Json] = {}  # of the answers that are about to be
        self._turn_ids: set[str] = set()  # of those asked for, the ones that are in the database
        self._asked: set[str] = set()
        self._openings: dict[str, tuple[float, str | None]] = {}  # by turn id: when a turn began, and the human's text

    def put(self, readings: Sequence[Reading]) -> Counter[str]:
        counts: Counter[str] = Counter()
        new = list(self._new(readings))
        counts["duplicates"] = len(readings) - len(new)
        self._known.update(known_messages(self._db, [i for reading in new for i in _worth_asking(reading)]))
        identities = [
            identify(reading.request, reading.exchange.hints, None) if reading.whole and reading.request else None
            for reading in new
        ]
        self._asked.update(turn_id for r, i in zip(new, identities, strict=True) if i and (turn_id := _expected(r, i)))
        self._turn_ids.update(with_turn_id(self._db, self._asked))
        for reading, identity in zip(new, identities, strict=True):
            counts["unknown_preambles"] += self._store(reading, identity)
            counts["stored"] += 1
            counts["skipped"] += reading.reason is not None
        self._writes.flush()
        return counts

    def _new(self, readings: Sequence[Reading]) -> Iterator[Reading]:
        """Those that aren't in the database, and none twice."""
        keys = [(plain(r.exchange.flow_id) or None, r.content_key) for r in readings]
        flows, contents = recorded(self._db, [flow for flow, _ in keys if flow], [content for _, content in keys])
        for (flow, content), reading in zip(keys, readings, strict=True):
            if flow in flows or content in contents:
                continue
            if flow is not None:
                flows.add(flow)
            contents.add(content)
            yield reading

    # --- one exchange ---------------------------------------------------------------------------

    def _store(self, reading: Reading, identity: Identity | None) -> int:
        """How many envelopes were dropped without being known."""
        exchange, request = reading.exchange, reading.request
        row = exchange_columns(reading) | response_columns(reading.response)
        if request is None:  # the answer, if there is one, follows no conversation
            self._writes.turn(row)
            return 0
        prior = self._prior(exchange.principal, request.previous_response_id)
        identity = identity or identify(request, exchange.hints, _as_prior(prior))
        chain = chain_of(reading, request, prior, lambda tip: load_chain(self._db, tip))
        self._put_messages(chain)
        session, repeats = self._session(exchange, request, identity, chain, prior)
        row |= {
            "turn_id": self._turn_id(exchange.principal, session, identity, chain, prior),
            "session": session,
            "agent": identity.agent,
            "kind": identity.kind.value,
            "trace_id": plain(identity.trace),
            "history_mark": plain(identity.history_mark),
            "model": plain(request.model),
            "stream": request.stream,
            "previous_response_id": plain(request.previous_response_id),
            "history_known": chain.history_known,
            "system_tip": chain.system_tip,
            "prompt_tip": chain.tip,
            "tools": self._put_blob([tool.raw for tool in request.tools] or None, reading.tools),
            "sampling": dict(request.sampling) or None,
            "extra": self._put_blob(_lean(metadata=dict(request.metadata), extra=dict(request.extra)) or None),
            "user_text": identity.user_text,
            "injected": list(reading.injected.skills) if reading.injected else None,
            "injected_scores": list(reading.injected.scores) or None if reading.injected else None,
            "injection": self._put_blob(reading.injected.text if reading.injected else None),
            "index_generation": reading.injected.index_generation if reading.injected else None,
            "retry": identity.retry or repeats,
        }
        row |= self._answer(reading, chain)
        self._writes.turn(row)
        if identity.kind in _HOLDS_WORDS:
            began = self._openings.get(row["turn_id"])
            if began is None or exchange.started_at < began[0]:
                self._openings[row["turn_id"]] = (exchange.started_at, identity.user_text)
        return identity.unknown_preambles

    def _turn_id(
        self, principal: str, session: str | None, identity: Identity, chain: Chain, prior: Row[Any] | None
    ) -> str:
        """As `turn_id_of` says, but a trace that holds two messages of the human is two turns: what a person adds while the
        agent works, or says within moments of an answer, travels under the trace of the turn before."""
        turn_id = turn_id_of(principal, session, identity, chain, prior)
        if identity.trace is None or identity.kind not in _HOLDS_WORDS or not identity.user_text:
            return turn_id
        first = self._opening(turn_id)
        if first is None or first == identity.user_text:
            return turn_id
        return traced(principal, session, identity.trace, identity.user_text)

    def _opening(self, turn_id: str) -> str | None:
        """What the human said at the beginning of a turn; None: nothing, or there is no such turn yet."""
        if turn_id not in self._asked or turn_id in self._turn_ids:
            row = self._db.execute(_OPENING, {"turn_id": turn_id}).first()
            waiting = self._openings.get(turn_id)
            if row is not None and (waiting is None or row.started_at <= waiting[0]):
                self._openings[turn_id] = (row.started_at, row.user_text)
            self._asked.add(turn_id)
            self._turn_ids.discard(turn_id)
        return self._openings.get(turn_id, (0.0, None))[1]

    def _answer(self, reading: Reading, chain: Chain) -> dict[str, Any]:
        """Put the answer behind its prompt; the columns that say where it is."""
        message = reading.response.message if reading.response is not None else None
        if message is None:
            return {}
        content = pack_message(message) if reading.answer is None else reading.answer
        if reading.whole and reading.answer_id is not None:
            tip = reading.answer_id
        else:
            tip = message_id(chain.tip, message)
            self._known.update(known_messages(self._db, [tip]))  # what is waiting is known, too
        columns: dict[str, Any] = {"response_tip": tip}
        if tip not in self._known:
            self._writes.answer(tip, chain.tip, content)
            self._known.add(tip)
            self._content[tip] = content
            return columns
        # Somebody has written a message of this id before, perhaps with other reasoning in it.
        stored = self._content.get(tip)
        if stored is None:
            self._writes.flush()
            stored = self._db.scalar(_CONTENT, {"id": tip})
        columns["response"] = None if stored == content else content
        return columns

    # --- content --------------------------------------------------------------------------------

    def _put_messages(self, chain: Chain) -> None:
        shared = chain.shared
        if shared and chain.ids[shared - 1] not in self._known:  # it isn't there, or was never asked for
            shared = 0
        unknown = [place for place in range(shared, len(chain.ids)) if chain.ids[place] not in self._known]
        if len(unknown) > _ASK_ABOVE:
            self._known.update(known_messages(self._db, [chain.ids[place] for place in unknown]))
            unknown = [place for place in unknown if chain.ids[place] not in self._known]
        self._writes.messages(chain, unknown)
        self._known.update(chain.ids[shared:])

    def _put_blob(self, value: Json, key: str | None = None) -> str | None:
        """`key`: its id where it is known."""
        if value is None:
            return None
        key = key or blob_id(value)
        if key not in self._known:
            self._writes.blob(key, value)
            self._known.add(key)
        return key

    # --- whose it is ----------------------------------------------------------------------------

    def _prior(self, principal: str, response_id: str | None) -> Row[Any] | None:
        """The turn whose answer the request continues; only the same principal's."""
        if response_id is None:
            return None
        self._writes.flush()
        return self._db.execute(_PRIOR, {"principal": principal, "response_id": plain(response_id)}).first()

    def _session(
        self, exchange: Exchange, request: Request, identity: Identity, chain: Chain, prior: Row[Any] | None
    ) -> tuple[str | None, bool]:
        """The key of the session's row (None: can't be told), and whether the same prompt was sent before."""
        name, generated, repeats = plain(identity.session_id), False, False
        if name is None:
            self._writes.flush()
        if name is None and identity.kind is Kind.COMPACTION:
            text = conversation_of(request)
            found = by_conversation(self._db, exchange.principal, text, exchange.started_at) if text else None
            return found, False
        if name is None:
            if identity.kind not in _OWN_SESSION:
                return None, False
            found = prior.session if prior is not None else None
            if found is None:
                opening = next((i for i, m in enumerate(chain.messages) if m.role is Role.ASSISTANT), len(chain.ids))
                match = by_prefix(self._db, exchange.principal, chain.ids, opening, exchange.started_at)
                if match is not None:
                    found, repeats = match.session, match.repeats
            if found is not None:
                name, generated = self._db.execute(_SESSION, {"id": found}).one()
        if name is None:
            first = next((i for i, m in enumerate(chain.messages) if m.role is Role.USER), len(chain.ids) - 1)
            opening_id = chain.ids[first] if chain.ids else ""
            name, generated = generated_id(exchange.principal, opening_id, exchange.started_at), True
        key = session_row_id(exchange.principal, name)
        self._writes.session(
            {
                "id": key,
                "principal": exchange.principal,
                "session_id": name,
                "generated": generated,
                "session_key": plain(identity.session_key),
                "agent": identity.agent,
                "first_at": exchange.started_at,
                "last_at": exchange.started_at,
            }
        )
        return key, repeats


_OWN_SESSION = (Kind.MAIN, Kind.TOOL, Kind.SUBAGENT, Kind.UNKNOWN)
_HOLDS_WORDS = (Kind.MAIN, Kind.TOOL)
_SESSION = select(sessions.c.session_id, sessions.c.generated).where(sessions.c.id == bindparam("id"))
_CONTENT = select(messages.c.content).where(messages.c.id == bindparam("id"))
_PRIOR = (
    select(turns, sessions.c.session_id, sessions.c.session_key)
    .outerjoin(sessions, sessions.c.id == turns.c.session)
    .where(turns.c.principal == bindparam("principal"), turns.c.response_id == bindparam("response_id"))
    .order_by(turns.c.id.desc())
    .limit(1)
)
_OPENING = (
    select(turns.c.started_at, turns.c.user_text)
    .where(turns.c.turn_id == bindparam("turn_id"), turns.c.kind.in_([kind.value for kind in _HOLDS_WORDS]))
    .order_by(turns.c.started_at, turns.c.id)
    .limit(1)
)


def _worth_asking(reading: Reading) -> Iterator[str]:
    """Ids of messages of which it must be known whether they are in the database."""
    if reading.whole:
        yield from reading.ids[max(0, reading.shared - 1) :]
        if reading.answer_id is not None:
            yield reading.answer_id


def _expected(reading: Reading, identity: Identity) -> str | None:
    """The turn's id, where it can be told without the database."""
    name = plain(identity.session_id)
    if name is None or identity.trace is None:
        return None
    principal = reading.exchange.principal
    return traced(principal, session_row_id(principal, name), identity.trace)


def _as_prior(row: Row[Any] | None) -> Prior | None:
    return row and Prior(row.session_id, row.session_key, Kind(row.kind), row.user_text, row.turn_id)


def _is_the_databases(e: Exception) -> bool:
    """Is it the database that failed (locked, full, gone), and not the content that it refused?"""
    if not isinstance(e, DBAPIError) or isinstance(e, DataError | IntegrityError):
        return False
    return not str(getattr(e.orig, "sqlstate", "")).startswith("54")  # PostgreSQL: a limit is exceeded


def _lean(**fields: Json) -> dict[str, Json]:
    return {k: v for k, v in fields.items() if v}
