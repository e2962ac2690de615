"""Stable weights move, or the working ones are taken back: the gate, fed with what live sessions earned.

Design: all that the test needs is in the store, so it is computed anew each time and a restart changes nothing. A line begins
when the working version leaves the stable one. A session counts once, with the mean of what its turns earned since then, for the
version that gave most of its answers; a session of the stable version is a control, and what stable earned before the line is its
history. Only the number of candidates since the last promotion is kept, in the transaction that moves the route.

Limits: sessions that were never scored say nothing. Callers hold the lease of the job "train". A route that was pinned by
hand is left alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, select

from metaclaw_core.learn import journal
from metaclaw_core.learn.gate import Line, judge_line, smallest_drop
from metaclaw_core.model import Json
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import route_events, samples, turns

_HISTORY = 200  # sessions
_KINDS = ("main", "tool", "subagent")


@dataclass(frozen=True, slots=True)
class GateReport:
    verdict: str  # "promote", "rollback", "undecided", or "none": working and stable are the same
    reason: str | None = None
    sessions: int = 0  # of the line
    control: int = 0


def look(store: Store) -> GateReport:
    """Judge the line in force and move the route where the evidence is enough. Raises StoreError."""
    current = journal.in_force(store)
    if current is None or current.working == current.stable or current.pinned:
        return GateReport("none")
    kept: dict[str, Any] = journal.carried(store, "gate") or {}
    candidate = int(kept.get("candidate", 1))
    line = line_of(store, current, candidate)
    found = judge_line(line)
    sessions = sum(len(scores) for _, scores in line.working)
    stable = line.history + line.control if found.history_used else line.control
    said: dict[str, Json] = {**asdict(found), "sessions": sessions, "control": len(line.control)}
    said["detectable_drop"] = smallest_drop(stable, sessions)  # for the report; None: nothing would show yet
    if found.verdict == "promote":
        gate = {"candidate": 1, **said}
        journal.move_route(store, working=current.working, stable=current.working, reason=f"promoted: {found.reason}", carried={"gate": gate})
    elif found.verdict == "rollback":
        gate = {"candidate": candidate + 1, **said}
        journal.move_route(store, working=current.stable, stable=current.stable, reason=f"rolled back: {found.reason}", carried={"gate": gate})
    elif said != {name: value for name, value in kept.items() if name != "candidate"}:
        journal.carry(store, {"gate": {"candidate": candidate, **said}})
    return GateReport(found.verdict, found.reason, sessions, len(line.control))


def line_of(store: Store, current: journal.InForce, candidate: int) -> Line:
    """What was seen since `current`'s working weights left the stable ones."""
    with store.reading() as db:
        began = _began(db, current)
        earned = _earned(db, current.stable)
    history: dict[str, list[float]] = {}
    since: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    for session, version, at, reward in earned:
        if at >= began:
            since[session].append((version, reward))
        elif version == current.stable:
            history.setdefault(session, []).append(reward)
    control: list[float] = []
    working: defaultdict[int, list[float]] = defaultdict(list)
    for rewards in since.values():
        counts = Counter(version for version, _ in rewards)
        version = max(counts, key=lambda v: (counts[v], v))
        score = sum(reward for _, reward in rewards) / len(rewards)
        if version == current.stable:
            control.append(score)
        else:
            working[version].append(score)
    before = [sum(rewards) / len(rewards) for rewards in history.values()]
    return Line(
        candidate=candidate,
        history=tuple(before[-_HISTORY:]),
        control=tuple(control),
        working=tuple((version, tuple(working[version])) for version in sorted(working)),
    )


def _began(db: Connection, current: journal.InForce) -> float:
    """When the working weights left the stable ones: the first event after the last in which they were one."""
    began = float("inf")
    for row in db.execute(select(route_events).where(route_events.c.id <= current.generation).order_by(route_events.c.id.desc())):
        if row.working == row.stable or row.stable != current.stable:
            break
        began = row.at
    return began


def _earned(db: Connection, stable: int) -> list[tuple[str, int, float, float]]:
    """(session, version, time, reward) of scored answers by versions from `stable` on, oldest first. A malformed call earned 0."""
    query = (
        select(turns.c.session, turns.c.version, turns.c.started_at, turns.c.reward, samples.c.malformed)
        .join(samples, samples.c.flow_id == turns.c.flow_id)
        .where(turns.c.version >= stable, turns.c.session.is_not(None), turns.c.kind.in_(_KINDS))
        .order_by(turns.c.started_at, turns.c.id)
    )
    return [
        (row.session, row.version, row.started_at, 0.0 if row.malformed else float(row.reward))
        for row in db.execute(query)
        if row.malformed or row.reward is not None
    ]
