"""The trainer's journal: each step in transactions, so that a kill at any point leaves one route, no turn trained twice
and none lost.

    claimed ──▶ saved ──▶ published ──▶ routed
       │                      └───────▶ rejected
       └──▶ abandoned (its turns are scored again, or skipped where the reason lies in them)

Design: a claim moves turns from scored to batched and names them. Once the weights are saved at the server one transaction
writes down where, makes the version, moves the turns on and keeps what the trainer carries from step to step; only then do
they count as trained. A claim that got no further is abandoned: its turns are scored again, and training goes on from the
state before it, as if the step had never begun. What was saved and not yet published or routed is taken up where it was.
The route is the newest row of `route_events`: there is one at any time. Its file is written after it, and again by whoever
starts next.

Limits: callers hold the lease of the job "train". Turns that were purged meanwhile are gone from the step, too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from metaclaw_core.errors import StoreError
from metaclaw_core.model import Json
from metaclaw_core.store.queries import upsert
from metaclaw_core.store.rollouts import State, Store
from metaclaw_core.store.tables import route_events, step_turns, steps, trainer_state, turns, versions


class StepState(StrEnum):
    CLAIMED = "claimed"  # turns are set aside for it; nothing of it is saved
    SAVED = "saved"  # weights and optimiser are at the server, the turns are trained
    PUBLISHED = "published"  # weights to sample from are there as well
    ROUTED = "routed"  # it serves
    REJECTED = "rejected"  # saved, and trained on further, but it must not serve
    ABANDONED = "abandoned"  # undone


_LEFT = ("rejected", "retired")  # status of versions that nothing is trained on
OPEN = (StepState.CLAIMED, StepState.SAVED, StepState.PUBLISHED)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a step did with one turn it had claimed."""

    turn: int
    reason: str | None  # why it was left out; None: trained on
    reward: float | None = None
    advantage: float | None = None
    mean_ratio: float | None = None
    staleness: int | None = None


@dataclass(frozen=True, slots=True)
class Version:
    id: int
    base_model: str
    parent: int | None
    state_path: str | None  # None: the base model itself
    sampler_path: str | None  # None: the base model, or not published yet
    expires_at: float | None
    status: str


@dataclass(frozen=True, slots=True)
class InForce:
    """The route as the store has it."""

    generation: int
    working: int
    stable: int
    pinned: bool
    reason: str


# --- versions and routes --------------------------------------------------------------------------


def begin(
    store: Store, base_model: str, state_path: str | None = None, sampler_path: str | None = None, expires_at: float | None = None
) -> Version:
    """The version that training begins with, and a route to it, unless there is one: the base model, or what it is resumed from.

    A route of another base model is left: a new first version is made and takes the route, since nothing of the old
    one can be trained on or served any more.
    """
    with store.transaction() as db:
        current = _in_force(db)
        if current is not None:
            version = _version(db, current.working)
            if version.base_model == base_model and (state_path is None or _has_state(db, base_model, state_path)):
                return version
        row = {"base_model": base_model, "state_path": state_path, "sampler_path": sampler_path, "status": "stable", "expires_at": expires_at}
        made = db.execute(insert(versions).values(created_at=time.time(), **row).returning(versions.c.id)).scalar_one()
        why = "training begins" if state_path is None else f"training goes on from {state_path}"
        _route(db, int(made), int(made), pinned=False, reason=why)
        return _version(db, int(made))


def version(store: Store, number: int) -> Version:
    """Raises StoreError where there is none."""
    with store.reading() as db:
        return _version(db, number)


def in_force(store: Store) -> InForce | None:
    """The route now; None: there has been none."""
    with store.reading() as db:
        return _in_force(db)


def latest_trained(store: Store, base_model: str) -> Version | None:
    """The newest version with a saved state, served or not: where the next step begins. A rolled back one is not."""
    with store.reading() as db:
        query = select(versions.c.id).where(versions.c.base_model == base_model, versions.c.status.not_in(_LEFT))
        number = db.scalar(query.order_by(versions.c.id.desc()).limit(1))
        return None if number is None else _version(db, int(number))


def move_route(
    store: Store, *, working: int, stable: int, reason: str, pinned: bool = False, carried: Mapping[str, Json] | None = None
) -> InForce:
    """Let other versions serve, in one transaction; the versions' own states follow, and `carried` is kept with it.
    Raises StoreError for unknown versions."""
    with store.transaction() as db:
        for number in (working, stable):
            _version(db, number)
        _keep(db, carried or {})
        return _route(db, working, stable, pinned=pinned, reason=reason)


def _route(db: Connection, working: int, stable: int, *, pinned: bool, reason: str) -> InForce:
    serving = versions.c.status.in_(("working", "stable"))
    db.execute(update(versions).where(serving, versions.c.id.not_in((working, stable))).values(status="retired", reason=reason))
    db.execute(update(versions).where(versions.c.id == stable).values(status="stable", reason=None))
    if working != stable:
        db.execute(update(versions).where(versions.c.id == working).values(status="working", reason=None))
    values = {"at": time.time(), "working": working, "stable": stable, "pinned": pinned, "reason": reason}
    made = db.execute(insert(route_events).values(**values).returning(route_events.c.id)).scalar_one()
    return InForce(int(made), working, stable, pinned, reason)


def _in_force(db: Connection) -> InForce | None:
    row = db.execute(select(route_events).order_by(route_events.c.id.desc()).limit(1)).first()
    return None if row is None else InForce(row.id, row.working, row.stable, row.pinned, row.reason)


def _version(db: Connection, number: int) -> Version:
    row = db.execute(select(versions).where(versions.c.id == number)).first()
    if row is None:
        raise StoreError(f"There is no version {number}; see `metaclaw route list`.")
    return Version(row.id, row.base_model, row.parent, row.state_path, row.sampler_path, row.expires_at, row.status)


def _has_state(db: Connection, base_model: str, path: str) -> bool:
    found = select(func.count()).select_from(versions).where(versions.c.base_model == base_model, versions.c.state_path == path)
    return bool(db.scalar(found))


# --- a step ---------------------------------------------------------------------------------------


def claim(store: Store, ids: Sequence[int], *, base_version: int, algorithm: str, unjudged: bool = False) -> int:
    """Set `ids` aside for a new step; its number. Raises StoreError, and nothing is claimed, if one is not in state scored.

    `unjudged`: no judge is there to wait for, so turns may come from state captured as well. They count as scored from then
    on, without a score.
    """
    now = time.time()
    with store.transaction() as db:
        if unjudged:
            _pass_judge(store, db, ids)
        store.move_in(db, ids, State.SCORED, State.BATCHED)
        row = {"state": StepState.CLAIMED, "base_version": base_version, "algorithm": algorithm, "started_at": now, "updated_at": now}
        step = int(db.execute(insert(steps).values(row).returning(steps.c.id)).scalar_one())
        if ids:
            db.execute(insert(step_turns), [{"step": step, "turn": turn} for turn in ids])
        return step


def abandon(store: Store, step: int, error: str) -> None:
    """Undo a claim: its turns may be taken again."""
    with store.transaction() as db:
        _step(db, step, StepState.CLAIMED)
        store.move_in(db, _batched(db, step), State.BATCHED, State.SCORED)
        _set(db, step, StepState.ABANDONED, error=error)


def saved(
    store: Store,
    step: int,
    state_path: str,
    trained: Sequence[Trained],
    metrics: Mapping[str, Json],
    carried: Mapping[str, Json],
) -> int:
    """The step is in the weights at `state_path`: its version's number. `carried` is kept as `trainer_state`."""
    with store.transaction() as db:
        row = _step(db, step, StepState.CLAIMED)
        base = _version(db, row.base_version)
        _end_turns(store, db, step, trained)
        new = {"base_model": base.base_model, "parent": base.id, "step": step, "state_path": state_path, "status": "candidate"}
        number = int(db.execute(insert(versions).values(created_at=time.time(), **new).returning(versions.c.id)).scalar_one())
        _keep(db, carried)
        _set(db, step, StepState.SAVED, state_path=state_path, metrics=dict(metrics), version=number)
        return number


def discarded(
    store: Store, step: int, turns_: Sequence[Trained], metrics: Mapping[str, Json], carried: Mapping[str, Json], error: str
) -> None:
    """No step is made of a claim, for a reason that lies in its turns: each is skipped with it. Raises StoreError for a
    turn without one."""
    with store.transaction() as db:
        _step(db, step, StepState.CLAIMED)
        if any(one.reason is None for one in turns_):
            raise StoreError(f"Step {step} is discarded, so each of its turns needs a reason.")
        _end_turns(store, db, step, turns_)
        _keep(db, carried)
        _set(db, step, StepState.ABANDONED, metrics=dict(metrics), error=error)


def _end_turns(store: Store, db: Connection, step: int, trained: Sequence[Trained]) -> None:
    """The step's turns are trained, or skipped with their reason; all of them have to be spoken of."""
    here = set(_batched(db, step))
    if unnamed := here - {one.turn for one in trained}:
        raise StoreError(f"Step {step} claimed turns that nothing is said of: {sorted(unnamed)[:5]}.")
    for one in trained:
        values = {"reason": one.reason, "reward": one.reward, "advantage": one.advantage, "mean_ratio": one.mean_ratio, "staleness": one.staleness}
        db.execute(update(step_turns).where(step_turns.c.step == step, step_turns.c.turn == one.turn).values(**values))
    store.move_in(db, [one.turn for one in trained if one.turn in here and one.reason is None], State.BATCHED, State.TRAINED)
    for one in trained:
        if one.turn in here and one.reason is not None:
            store.move_in(db, [one.turn], State.BATCHED, State.SKIPPED, f"training: {one.reason}")


def published(store: Store, step: int, sampler_path: str, expires_at: float | None) -> None:
    """The step's version can be sampled from at `sampler_path` until `expires_at` (unix seconds; None: for good)."""
    with store.transaction() as db:
        row = _step(db, step, StepState.SAVED)
        db.execute(update(versions).where(versions.c.id == row.version).values(sampler_path=sampler_path, expires_at=expires_at))
        _set(db, step, StepState.PUBLISHED)


def routed(store: Store, step: int, checks: Mapping[str, Json], reason: str) -> InForce:
    """The step's version serves as the working one, unless the route is pinned by hand. Where the route has left the
    version's line meanwhile (a roll-back), it is rejected instead."""
    with store.transaction() as db:
        row = _step(db, step, StepState.PUBLISHED)
        current = _in_force(db)
        if current is None:
            raise StoreError("There is no route that could be moved; `metaclaw train` begins one.")
        if _version(db, row.base_version).status in _LEFT:
            _reject(db, row, checks, f"the route went back behind version {row.base_version} meanwhile")
            return current
        db.execute(update(versions).where(versions.c.id == row.version).values(checks=dict(checks)))
        _set(db, step, StepState.ROUTED)
        return current if current.pinned else _route(db, row.version, current.stable, pinned=False, reason=reason)


def rejected(store: Store, step: int, checks: Mapping[str, Json], reason: str) -> None:
    """The step's version must not serve, and nothing is trained on it: the next step begins at the version before."""
    with store.transaction() as db:
        _reject(db, _step(db, step, StepState.SAVED, StepState.PUBLISHED), checks, reason)


def _reject(db: Connection, row: Row[Any], checks: Mapping[str, Json], reason: str) -> None:
    db.execute(update(versions).where(versions.c.id == row.version).values(status="rejected", reason=reason, checks=dict(checks)))
    _set(db, row.id, StepState.REJECTED, error=reason)


def expires(store: Store, number: int, sampler_path: str, at: float | None) -> None:
    """The weights of a version are at `sampler_path` and live until `at`, unix seconds (None: for good)."""
    with store.transaction() as db:
        db.execute(update(versions).where(versions.c.id == number).values(sampler_path=sampler_path, expires_at=at))


def open_steps(store: Store) -> list[dict[str, Any]]:
    """Steps that were cut off, the oldest first: whoever starts has to end each."""
    with store.reading() as db:
        rows = db.execute(select(steps).where(steps.c.state.in_([str(s) for s in OPEN])).order_by(steps.c.id))
        return [dict(row._mapping) for row in rows]


def set_aside(store: Store, reasons: Mapping[int, str], *, unjudged: bool = False) -> None:
    """Scored turns that can never be trained on leave the queue, each with its reason. `unjudged`: as for `claim`."""
    with store.transaction() as db:
        if unjudged:
            _pass_judge(store, db, list(reasons))
        for turn, reason in reasons.items():
            store.move_in(db, [turn], State.SCORED, State.SKIPPED, f"training: {reason}")


def carried(store: Store, name: str) -> Json:
    """What the trainer kept under `name`; None: nothing yet."""
    with store.reading() as db:
        return db.scalar(select(trainer_state.c.value).where(trainer_state.c.name == name))


def carry(store: Store, values: Mapping[str, Json]) -> None:
    """Keep values outside of a step (the gate's)."""
    with store.transaction() as db:
        _keep(db, values)


def _keep(db: Connection, values: Mapping[str, Json]) -> None:
    for name, value in values.items():
        row = {"name": name, "value": value, "updated_at": time.time()}
        insert_ = upsert(db.dialect.name, trainer_state).values(row)
        db.execute(insert_.on_conflict_do_update(index_elements=["name"], set_={"value": value, "updated_at": row["updated_at"]}))


def _batched(db: Connection, step: int) -> list[int]:
    """The step's turns that are still there and set aside for it."""
    query = select(turns.c.id).join(step_turns, step_turns.c.turn == turns.c.id)
    return list(db.scalars(query.where(step_turns.c.step == step, turns.c.state == str(State.BATCHED)).order_by(turns.c.id)))


def _pass_judge(store: Store, db: Connection, ids: Sequence[int]) -> None:
    captured = select(turns.c.id).where(turns.c.id.in_(ids), turns.c.state == str(State.CAPTURED))
    store.move_in(db, list(db.scalars(captured)), State.CAPTURED, State.SCORED)


def _step(db: Connection, step: int, *states: StepState) -> Row[Any]:
    row = db.execute(select(steps).where(steps.c.id == step)).first()
    if row is None or row.state not in states:
        raise StoreError(f"Step {step} is {row.state if row else 'not there'}, not {' or '.join(states)}.")
    return row


def _set(db: Connection, step: int, state: StepState, **values: Any) -> None:
    db.execute(update(steps).where(steps.c.id == step).values(state=str(state), updated_at=time.time(), **values))
