"""How a skill does: how often it was in a prompt, how those turns went, and whether anybody needs it.

Design: one row per skill and human turn, taken from what the proxy recorded as injected; insert-or-ignore,
so looking at the same turns again adds nothing. Figures are computed when asked for. The mean score without
a skill is that of the scored turns since the skill was first used that did not have it: a comparison, not
an experiment.

A learned skill that was in no prompt for ``skills.stale_days`` is marked stale, and active again when it is
used. Nothing a human wrote or edited is touched.

Limits: scores are the judge's, and None where it has not spoken. Rows are kept when their turns are pruned.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select

from metaclaw_core.skills.library import Library
from metaclaw_core.skills.skill import Skill, Status
from metaclaw_core.store.queries import insert_new
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import counters, skill_uses, turns

_CURSOR = "skill uses counted to turn"
_OVERLAP = 1_000  # rows looked at again: on PostgreSQL a lower id may be committed later
_BATCH = 2_000
_DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one skill."""

    turns: int  # human turns it was injected in
    sessions: int
    last_used: float | None  # unix seconds
    score_with: float | None  # mean of the judge's -1, 0, +1; None: no such turn was scored
    score_without: float | None


@dataclass(frozen=True, slots=True)
class LifeReport:
    counted: int = 0  # requests looked at
    stale: tuple[str, ...] = ()
    revived: tuple[str, ...] = ()

    def says_something(self) -> bool:
        return bool(self.stale or self.revived)


def count_uses(store: Store) -> int:
    """Take up what was injected since the last look; how many requests were looked at."""
    looked = 0
    while True:
        with store.reading() as db:
            cursor = int(db.scalar(select(counters.c.value).where(counters.c.name == _CURSOR)) or 0)
            rows = db.execute(
                select(turns.c.id, turns.c.turn_id, turns.c.session, turns.c.injected, turns.c.started_at)
                .where(turns.c.id > max(0, cursor - _OVERLAP) if not looked else turns.c.id > cursor)
                .order_by(turns.c.id)
                .limit(_BATCH)
            ).all()
        if not rows or (not looked and rows[-1].id <= cursor and len(rows) < _BATCH):
            return looked
        uses = [
            {"skill": name, "turn_id": row.turn_id, "session": row.session, "at": row.started_at}
            for row in rows
            if row.injected and row.turn_id
            for name in row.injected
        ]
        last = max(cursor, rows[-1].id)
        with store.transaction() as db:
            insert_new(db, skill_uses, uses)
            db.execute(counters.delete().where(counters.c.name == _CURSOR))
            db.execute(counters.insert().values(name=_CURSOR, value=last))
        looked += len(rows)


def figures(store: Store) -> dict[str, Figures]:
    """Of every skill that was ever injected."""
    with store.reading() as db:
        uses = db.execute(select(skill_uses)).all()
        scored = db.execute(
            select(turns.c.turn_id, turns.c.score, turns.c.started_at)
            .where(turns.c.score.is_not(None), turns.c.turn_id.is_not(None))
            .order_by(turns.c.started_at)
        ).all()
    scores: dict[str, tuple[float, int]] = {
        row.turn_id: (row.started_at, row.score) for row in scored
    }  # the last step counts
    by_skill: dict[str, list[tuple[str, str | None, float]]] = {}
    for use in uses:
        by_skill.setdefault(use.skill, []).append((use.turn_id, use.session, use.at))
    out = {}
    for name, used in by_skill.items():
        having = {turn for turn, _, _ in used}
        since = min(at for _, _, at in used)
        with_it = [scores[turn][1] for turn in having if turn in scores]
        without = [score for turn, (at, score) in scores.items() if at >= since and turn not in having]
        out[name] = Figures(
            len(having), len({s for _, s, _ in used if s}), max(at for _, _, at in used), _mean(with_it), _mean(without)
        )
    return out


def age(library: Library, used: Mapping[str, Figures], stale_days: int, now: float) -> tuple[list[str], list[str]]:
    """Mark what is unused as stale and what is used again as active; the names of both."""
    stale, revived = [], []
    for skill in library.scan().skills:
        if not _learned(skill):
            continue
        found = used.get(skill.name)
        last = max((at for at in (_created(skill), found.last_used if found else None) if at is not None), default=None)
        if last is None:
            continue
        old = now - last > stale_days * _DAY
        if old and skill.status is Status.ACTIVE:
            library.set_status(skill.name, Status.STALE, note=f"{skill.name}: in no prompt for {stale_days} days")
            stale.append(skill.name)
        elif not old and skill.status is Status.STALE:
            library.set_status(skill.name, Status.ACTIVE, note=f"{skill.name}: used again")
            revived.append(skill.name)
    return stale, revived


def look_after(store: Store, library: Library, stale_days: int, now: float | None = None) -> LifeReport:
    """The whole round, for the worker. Raises StoreError, SkillError."""
    counted = count_uses(store)
    stale, revived = age(library, figures(store), stale_days, time.time() if now is None else now)
    return LifeReport(counted, tuple(stale), tuple(revived))


def _learned(skill: Skill) -> bool:
    return skill.provenance is not None and skill.provenance.digest == skill.content_hash


def _created(skill: Skill) -> float | None:
    created = skill.provenance.created if skill.provenance else None
    try:
        return datetime.fromisoformat(created).timestamp() if created else None
    except ValueError:
        return None


def _mean(values: list[int]) -> float | None:
    return sum(values) / len(values) if values else None
