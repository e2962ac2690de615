"""Scored answers of our own versions, as `Sample` values.

Design: one question to the store, oldest first, bounded. The split into support and query sessions goes by the client's own
session id; a subagent's session is where the session is that it works for, so that one piece of work never lands on both sides.

Tasks are told apart (`placed`) only among the turns of a step: which others were looked at beside them changes from run to run,
and a step that is done again must be the same.

Limits: the parent of a subagent is found by the human turn they share; where none is known its own id is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from sqlalchemy import ColumnElement, func, select

from metaclaw_core.learn.batch import Logged, Sample, oldest
from metaclaw_core.learn.batch import select as select_batch
from metaclaw_core.learn.cluster import Clusters
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.samplefile import unpack_ids, unpack_logprobs
from metaclaw_core.store.tables import samples, sessions, turns

_KINDS = ("main", "tool", "subagent")


def waiting(store: Store, *, scored: bool) -> tuple[int, int]:
    """(how many answers no step has taken yet, the newest one's turn; 0: there is none). `scored`: as for `candidates`."""
    query = select(func.count(), func.max(turns.c.id)).select_from(turns).join(samples, turns.c.flow_id == samples.c.flow_id)
    with store.reading() as db:
        count, newest = db.execute(query.where(*_free(scored))).one()
    return int(count), int(newest or 0)


class Lookout[L: Logged]:
    """Chooses the turns of a step. What was looked at in vain is not looked at again until something has come."""

    def __init__(
        self,
        store: Store,
        *,
        what: str,
        wanted: int,
        min_sessions: int,
        scored: bool,
        order: Callable[[L], tuple[float, ...]] = oldest,
    ) -> None:
        """`what` they are, for people; `scored`: as for `candidates`; `order`: as for `batch.select`."""
        self._store, self._what, self._wanted, self._min_sessions, self._scored, self._order = store, what, wanted, min_sessions, scored, order
        self._looked: tuple[tuple[int, int, int], str] | None = None  # what was there at the last look, and why it was not enough

    def choose(self, base: int, eligible: Callable[[], tuple[Sequence[L], int]]) -> tuple[tuple[L, ...] | None, str, int]:
        """Those of the next step, from the version `base`; None: there are not enough, with the reason; and how many turns were
        found that never can be of use. `eligible`: what may be chosen now, and the number of these; they are set aside."""
        there = self._there(base)
        if there[0] < self._wanted:
            return None, f"{there[0]} of {self._wanted} {self._what} are there", 0
        if self._looked is not None and self._looked[0] == there:
            return None, self._looked[1], 0
        found, never = eligible()
        chosen = select_batch(found, batch_size=self._wanted, min_sessions=self._min_sessions, order=self._order)
        why = f"{len(found)} of {self._wanted} {self._what} are there, from {len({one.session for one in found})} sessions"
        if chosen is None:
            self._looked = self._there(base), why
        return chosen, why, never

    def _there(self, base: int) -> tuple[int, int, int]:
        return (*waiting(self._store, scored=self._scored), base)


def candidates(store: Store, *, scored: bool, limit: int) -> list[Sample]:
    """Up to `limit` answers that no step has taken yet, each in a cluster of its own name, "". `scored` False: also those that
    no judge has seen (for a teacher alone)."""
    query = (
        select(samples, turns.c.id.label("turn"), turns.c.session, turns.c.turn_id, turns.c.kind, turns.c.agent, turns.c.reward,
               sessions.c.session_id)
        .join(turns, turns.c.flow_id == samples.c.flow_id)
        .join(sessions, sessions.c.id == turns.c.session)
        .where(*_free(scored))
        .order_by(turns.c.started_at, turns.c.id)
        .limit(limit)
    )  # fmt: skip
    with store.reading() as db:
        rows = db.execute(query).all()
        shared = {row.turn_id for row in rows if row.kind == "subagent"}
        parents = dict(
            tuple(row)
            for row in db.execute(
                select(turns.c.turn_id, sessions.c.session_id)
                .join(sessions, sessions.c.id == turns.c.session)
                .where(turns.c.turn_id.in_(shared), turns.c.kind == "main")
            )
        )
    found = []
    for row in rows:
        kept = row.prompt_ids is not None
        found.append(
            Sample(
                turn=row.turn,
                session=row.session,
                split_by=parents.get(row.turn_id, row.session_id) if row.kind == "subagent" else row.session_id,
                human_turn=row.turn_id,
                klass=row.klass,
                prompt_ids=unpack_ids(row.prompt_ids).astype(np.int32) if kept else np.zeros(0, np.int32),
                tokens=unpack_ids(row.tokens).astype(np.int32) if kept else np.zeros(0, np.int32),
                logprobs=unpack_logprobs(row.logprobs).astype(np.float32) if kept else np.zeros(0, np.float32),
                version=row.version,
                stop_reason=row.stop_reason,
                reward=row.reward,
                malformed=row.malformed,
                redacted=row.redacted,
                created_at=row.created_at,
                cluster="",
                agent=f"{row.agent or '?'}/{row.kind}",
            )
        )
    return found


def placed(store: Store, batch: Sequence[Sample], clusters: Clusters) -> tuple[list[Sample], Clusters]:
    """`batch` with the cluster of each turn's task, and the clusters with theirs."""
    with store.reading() as db:
        rows = db.execute(select(turns.c.id, turns.c.user_text).where(turns.c.id.in_([s.turn for s in batch])))
        texts: dict[int, str | None] = {row.id: row.user_text for row in rows}
    found = []
    for sample in batch:
        cluster, clusters = clusters.place(texts.get(sample.turn) or "")
        found.append(replace(sample, cluster=cluster))
    return found, clusters


def _free(scored: bool) -> tuple[ColumnElement[bool], ...]:
    states = ("scored",) if scored else ("scored", "captured")
    return turns.c.state.in_(states), turns.c.kind.in_(_KINDS), turns.c.session.is_not(None)
