"""A batch of exchanges into the store, inside the caller's transaction.

Design: one savepoint an exchange, so a bad one never takes its neighbours along; it becomes a row with
a reason, and only if even that fails is it reported back. Insert-or-ignore on the unique keys makes
at-least-once into exactly-once. What the database knows is looked up inside the transaction and
remembered only until its end: another process may prune in between.

A chain holds the client's original messages. A request that continues a provider-side conversation
(`previous_response_id`) is appended to the answer it names; where it brings other instructions than
that one had, the history is chained anew under them, since that is what the model saw.

Limits: two conversations with the same opening are told apart by the answer only; an identical first
request counts as a repetition for a minute, or when the earlier one failed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import takewhile
from typing import Any

from sqlalchemy import Connection, Row, bindparam, select
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError

from metaclaw_core.agents import identify
from metaclaw_core.agents.base import Identity, Prior
from metaclaw_core.agents.openclaw import conversation_of
from metaclaw_core.model import Exchange, Json, Kind, Message, Request, Response, Role
from metaclaw_core.store.chain import blob_id, chain_ids, message_id, pack_message
from metaclaw_core.store.queries import add_to_counter, insert_new, insert_one, known_messages, load_chain
from metaclaw_core.store.reading import Reading
from metaclaw_core.store.sessions import by_conversation, by_prefix, generated_id, touch
from metaclaw_core.store.tables import blobs, messages, sessions, turns
from metaclaw_core.store.types import plain

logger = logging.getLogger(__name__)

_ASK_ABOVE = 8  # unknown messages; below it inserting them all is cheaper than asking which are new
_MAX_INT = 2**31 - 1  # PostgreSQL's integer


@dataclass(frozen=True, slots=True)
class IngestReport:
    stored: int  # new rows, the skipped ones included
    skipped: int  # of them, in state "skipped"
    duplicates: int  # already there
    failed: tuple[tuple[int, str], ...] = ()  # (place in the batch, why) of those that are not in the store


@dataclass(frozen=True, slots=True)
class _Chain:
    """Where a request's messages are: `ids[i]` belongs to `messages[i]`; they follow `parent`."""

    parent: str | None
    messages: tuple[Message, ...]
    ids: tuple[str, ...]
    system_tip: str | None
    history_known: bool

    @property
    def tip(self) -> str | None:
        return self.ids[-1] if self.ids else self.parent


@dataclass(frozen=True, slots=True)
class _Seen:
    new: bool  # False: one of the unique keys was there
    unknown_preambles: int


class Ingest:
    """The work of one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._db = connection
        self._known: set[str] = set()  # ids of messages and blobs that are in the database
        self._fresh: list[str] = []  # those of the exchange at hand
        self._counts: Counter[str] = Counter()

    def run(self, readings: Sequence[Reading]) -> IngestReport:
        failed: list[tuple[int, str]] = []
        for place, reading in enumerate(readings):
            problem = self._try(reading)
            if problem is not None:
                bare = Reading(reading.exchange, reading.content_key, None, None, problem, reading.error, None)
                worse = self._try(bare)
                if worse is not None:
                    failed.append((place, f"{problem}; then {worse}"))
        for name, value in sorted(self._counts.items()):
            add_to_counter(self._db, name, value)
        return IngestReport(self._counts["stored"], self._counts["skipped"], self._counts["duplicates"], tuple(failed))

    def _try(self, reading: Reading) -> str | None:
        """None if the exchange is in the store now, in whatever state; else what went wrong."""
        self._fresh.clear()
        try:
            with self._db.begin_nested() as savepoint:
                seen = self._store(reading)
                if not seen.new:
                    savepoint.rollback()
        except Exception as e:  # the boundary: what is wrong with one exchange stays with it
            if _is_the_databases(e):
                raise  # and the batch comes again
            logger.exception("metaclaw: exchange %s can't be stored as parsed", reading.exchange.flow_id)
            self._known.difference_update(self._fresh)
            return f"internal error: {type(e).__name__}: {getattr(e, 'orig', None) or e}"
        if not seen.new:
            self._known.difference_update(self._fresh)
            self._counts["duplicates"] += 1
            return None
        self._counts["stored"] += 1
        self._counts["skipped"] += reading.reason is not None
        self._counts["unknown_preambles"] += seen.unknown_preambles
        return None

    # --- one exchange ---------------------------------------------------------------------------

    def _store(self, reading: Reading) -> _Seen:
        exchange, request = reading.exchange, reading.request
        row = _exchange_columns(reading) | _response_columns(reading.response)
        if request is None:  # the answer, if there is one, follows no conversation
            return _Seen(self._insert_turn(row), 0)
        prior = self._prior(exchange.principal, request.previous_response_id)
        identity = identify(request, exchange.hints, _as_prior(prior))
        chain = self._chain(request, prior)
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
            "tools": self._put_blob([tool.raw for tool in request.tools] or None),
            "sampling": dict(request.sampling) or None,
            "extra": self._put_blob(_lean(metadata=dict(request.metadata), extra=dict(request.extra)) or None),
            "user_text": identity.user_text,
            "injected": list(reading.injected.skills) if reading.injected else None,
            "injected_scores": list(reading.injected.scores) or None if reading.injected else None,
            "injection": self._put_blob(reading.injected.text if reading.injected else None),
            "index_generation": reading.injected.index_generation if reading.injected else None,
            "retry": identity.retry or repeats,
        }
        row |= self._answer(reading.response, chain.tip)
        return _Seen(self._insert_turn(row), identity.unknown_preambles)

    def _turn_id(
        self, principal: str, session: str | None, identity: Identity, chain: _Chain, prior: Row[Any] | None
    ) -> str:
        """As `_turn_id` says, but a trace that holds two messages of the human is two turns: what a person adds while the
        agent works, or says within moments of an answer, travels under the trace of the turn before."""
        turn_id = _turn_id(principal, session, identity, chain, prior)
        if identity.trace is None or identity.kind not in (Kind.MAIN, Kind.TOOL) or not identity.user_text:
            return turn_id
        first = self._db.scalar(
            select(turns.c.user_text)
            .where(turns.c.turn_id == turn_id, turns.c.kind.in_((Kind.MAIN.value, Kind.TOOL.value)))
            .order_by(turns.c.started_at, turns.c.id)
            .limit(1)
        )
        if first is None or first == identity.user_text:
            return turn_id
        return _short(principal, session, f"{identity.trace}\n{identity.user_text}")

    def _insert_turn(self, row: dict[str, Any]) -> bool:
        return insert_one(self._db, turns, row)

    def _answer(self, response: Response | None, prompt_tip: str | None) -> dict[str, Any]:
        """Put the answer behind its prompt; the columns that say where it is."""
        message = response.message if response is not None else None
        if message is None:
            return {}
        tip = message_id(prompt_tip, message)
        content = pack_message(message)
        columns: dict[str, Any] = {"response_tip": tip}
        if tip in self._known or not self._put_answer(tip, prompt_tip, content):
            stored = self._db.scalar(select(messages.c.content).where(messages.c.id == tip))
            columns["response"] = None if stored == content else content
        return columns

    # --- content --------------------------------------------------------------------------------

    def _chain(self, request: Request, prior: Row[Any] | None) -> _Chain:
        """Where the request's messages stand: after the answer they continue, else from the root."""
        sent = request.messages
        leading = tuple(takewhile(lambda m: m.role in (Role.SYSTEM, Role.DEVELOPER), sent))
        system_tip = chain_ids(leading)[-1] if leading else None
        if prior is None or prior.response_tip is None:
            whole = request.previous_response_id is None and "conversation" not in request.extra
            return _Chain(None, sent, tuple(chain_ids(sent)), system_tip, whole)
        known = prior.history_known is True
        if not leading or system_tip == prior.system_tip:
            new = sent[len(leading) :]
            return _Chain(prior.response_tip, new, tuple(chain_ids(new, prior.response_tip)), prior.system_tip, known)
        # Instructions are not handed down by the provider: the history now stands under the new ones.
        before = load_chain(self._db, prior.response_tip)
        old = len(list(takewhile(lambda m: m.role in (Role.SYSTEM, Role.DEVELOPER), before)))
        rebased = (*leading, *before[old:], *sent[len(leading) :])
        return _Chain(None, rebased, tuple(chain_ids(rebased)), system_tip, known)

    def _put_messages(self, chain: _Chain) -> None:
        unknown = [i for i in chain.ids if i not in self._known]
        if len(unknown) > _ASK_ABOVE:
            self._known.update(known_messages(self._db, unknown))
        parents = (chain.parent, *chain.ids)
        rows = [
            {"id": chain_id, "parent": parent, "role": message.role.value, "content": pack_message(message)}
            for chain_id, parent, message in zip(chain.ids, parents, chain.messages, strict=False)
            if chain_id not in self._known
        ]
        insert_new(self._db, messages, rows)
        self._remember([row["id"] for row in rows])

    def _put_answer(self, tip: str, parent: str | None, content: Json) -> bool:
        """False: somebody has written a message of this id before, perhaps with other reasoning in it."""
        self._remember([tip])
        row = {"id": tip, "parent": parent, "role": Role.ASSISTANT.value, "content": content}
        return insert_one(self._db, messages, row)

    def _put_blob(self, value: Json) -> str | None:
        if value is None:
            return None
        key = blob_id(value)
        if key not in self._known:
            insert_new(self._db, blobs, [{"id": key, "content": value}])
            self._remember([key])
        return key

    def _remember(self, ids: list[str]) -> None:
        self._known.update(ids)
        self._fresh += ids

    # --- whose it is ----------------------------------------------------------------------------

    def _prior(self, principal: str, response_id: str | None) -> Row[Any] | None:
        """The turn whose answer the request continues; only the same principal's."""
        if response_id is None:
            return None
        return self._db.execute(_PRIOR, {"principal": principal, "response_id": plain(response_id)}).first()

    def _session(
        self, exchange: Exchange, request: Request, identity: Identity, chain: _Chain, prior: Row[Any] | None
    ) -> tuple[str | None, bool]:
        """The key of the session's row (None: can't be told), and whether the same prompt was sent before."""
        name, generated, repeats = plain(identity.session_id), False, False
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
        key = touch(
            self._db,
            principal=exchange.principal,
            session_id=name,
            generated=generated,
            session_key=plain(identity.session_key),
            agent=identity.agent,
            at=exchange.started_at,
        )
        return key, repeats


_OWN_SESSION = (Kind.MAIN, Kind.TOOL, Kind.SUBAGENT, Kind.UNKNOWN)
USAGE = ("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens")
_SESSION = select(sessions.c.session_id, sessions.c.generated).where(sessions.c.id == bindparam("id"))
_PRIOR = (
    select(turns, sessions.c.session_id, sessions.c.session_key)
    .outerjoin(sessions, sessions.c.id == turns.c.session)
    .where(turns.c.principal == bindparam("principal"), turns.c.response_id == bindparam("response_id"))
    .order_by(turns.c.id.desc())
    .limit(1)
)


def _as_prior(row: Row[Any] | None) -> Prior | None:
    return row and Prior(row.session_id, row.session_key, Kind(row.kind), row.user_text, row.turn_id)


def _turn_id(principal: str, session: str | None, identity: Identity, chain: _Chain, prior: Row[Any] | None) -> str:
    """One name for all requests of a human turn: tool loop, retries, announcements of its own session."""
    if identity.trace is not None:
        return _short(principal, session, identity.trace)
    place = _human_place(chain.messages, identity.user_text)
    if place is None:
        if prior is not None and prior.turn_id is not None:
            return str(prior.turn_id)  # a tool loop whose human message is at the provider
        return _short(principal, session, chain.tip)
    # Not the message's own id: a retry rewrites the human's words, the text without the rewording is the same.
    before = chain.ids[place - 1] if place else chain.parent
    return _short(principal, session, f"{before}\n{identity.user_text or chain.messages[place].text}")


def _human_place(sent: Sequence[Message], user_text: str | None) -> int | None:
    """The last user message that is the human's text, else ends with it, else holds it, else the last one."""
    users = [(i, m.text) for i, m in enumerate(sent) if m.role is Role.USER]
    if user_text:
        for fits in (str.__eq__, str.endswith, str.__contains__):
            if places := [i for i, text in users if fits(text, user_text)]:
                return places[-1]
    return users[-1][0] if users else None


def _short(*parts: str | None) -> str:
    return sha256("\n".join(p or "" for p in parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _exchange_columns(reading: Reading) -> dict[str, Any]:
    """Every column that one exchange alone decides, and None for the others."""
    exchange = reading.exchange
    return dict.fromkeys(c.name for c in turns.columns if c.name != "id") | {
        "flow_id": plain(exchange.flow_id) or None,
        "content_key": reading.content_key,
        "principal": plain(exchange.principal),
        "kind": Kind.UNKNOWN.value,
        "dialect": plain(exchange.dialect),
        "scheme": plain(exchange.scheme),
        "host": plain(exchange.host),
        "port": exchange.port,
        "path": plain(exchange.path),
        "redacted": reading.redacted,
        "status_code": exchange.status_code,
        "error": reading.error,
        "state": "captured" if reading.reason is None else "skipped",
        "reason": reading.reason,
        "retry": False,
        "attempts": 0,
        "started_at": exchange.started_at,
        "duration_ms": exchange.duration_ms,
        "live": exchange.live,
        "version": exchange.version,
    }


def _response_columns(response: Response | None) -> dict[str, Any]:
    """What the answer alone decides."""
    if response is None:
        return {}
    columns: dict[str, Any] = {
        "response_id": plain(response.id),
        "response_model": plain(response.model),
        "stop_reason": response.stop_reason.value if response.stop_reason else None,
        "raw_stop_reason": plain(response.raw_stop_reason),
        "response_extra": dict(response.extra) or None,
    }
    if response.usage is not None:
        columns |= {name: _count(getattr(response.usage, name)) for name in USAGE}
    if (message := response.message) is not None:
        calls = [{"name": c.name, "arguments": c.arguments, "id": c.id} for c in message.tool_calls]
        columns |= {"assistant_text": message.text or None, "tool_calls": calls or None}
    return columns


def _is_the_databases(e: Exception) -> bool:
    """Is it the database that failed (locked, full, gone), and not the content that it refused?"""
    if not isinstance(e, DBAPIError) or isinstance(e, DataError | IntegrityError):
        return False
    return not str(getattr(e.orig, "sqlstate", "")).startswith("54")  # PostgreSQL: a limit is exceeded


def _count(value: int | None) -> int | None:
    """A token count as the database can hold it; nonsense is unknown."""
    return value if value is not None and 0 <= value <= _MAX_INT else None


def _lean(**fields: Json) -> dict[str, Json]:
    return {k: v for k, v in fields.items() if v}
