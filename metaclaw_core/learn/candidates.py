"""Scored answers of our own versions, as `Sample` values.

Design: one question to the store, oldest first, bounded. The split into support and query sessions goes by the client's own
session id; a subagent's session is where the session is that it works for, so that one piece of work never lands on both sides.

Limits: the parent of a subagent is found by the human turn they share; where none is known its own id is used.
"""

from __future__ import annotations

import numpy as np
from sqlalchemy import select

from metaclaw_core.learn.batch import Sample
from metaclaw_core.learn.cluster import Clusters
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.samplefile import unpack_ids, unpack_logprobs
from metaclaw_core.store.tables import samples, sessions, turns

_KINDS = ("main", "tool", "subagent")


def candidates(store: Store, clusters: Clusters, *, scored: bool, limit: int) -> tuple[list[Sample], Clusters]:
    """Up to `limit` answers that no step has taken yet, and the task clusters with theirs. `scored` False: also those that no
    judge has seen (for a teacher alone)."""
    states = ("scored",) if scored else ("scored", "captured")
    query = (
        select(samples, turns.c.id.label("turn"), turns.c.session, turns.c.turn_id, turns.c.kind, turns.c.agent, turns.c.user_text,
               turns.c.reward, sessions.c.session_id)
        .join(turns, turns.c.flow_id == samples.c.flow_id)
        .join(sessions, sessions.c.id == turns.c.session)
        .where(turns.c.state.in_(states), turns.c.kind.in_(_KINDS))
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
        cluster, clusters = clusters.place(row.user_text or "")
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
                cluster=cluster,
                agent=f"{row.agent or '?'}/{row.kind}",
            )
        )
    return found, clusters
