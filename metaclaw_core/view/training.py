"""What training has done, as values: for the page, the report and ``metaclaw train status``.

Design: the journal of steps is the one source; its metrics are shown by the names that the trainer wrote them under, and
what a step did not record is unknown. The newest 500 steps are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from sqlalchemy import Connection, func, select

from metaclaw_core.model import Json
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import (
    health,
    route_events,
    samples,
    spend,
    step_turns,
    steps,
    trainer_state,
    turns,
    versions,
)
from metaclaw_core.view.charts import Series, line_chart

STEPS = 500
# What a chart shows of a step: its title, and the metrics in it.
CHARTS: tuple[tuple[str, tuple[tuple[str, str], ...], float | None], ...] = (
    ("Reward of the batch", (("reward_mean", "mean reward"),), None),
    ("Size of the advantages", (("advantage_abs_mean", "mean |advantage|"),), None),
    ("KL between sampling and training", (("kl", "mean difference"), ("kl_v2", "half mean square")), 0.01),
    ("Importance ratio", (("ratio_mean", "mean weight"), ("ess", "effective share of samples")), None),
    ("Versions behind", (("staleness_mean", "mean staleness"),), None),
    ("Samples of a step", (("turns", "turns"), ("skipped", "left out")), None),
)


@dataclass(frozen=True, slots=True)
class Training:
    steps: tuple[dict[str, Any], ...]  # oldest first
    versions: tuple[dict[str, Any], ...]  # newest first
    routes: tuple[dict[str, Any], ...]  # newest first; the first is in force
    skipped: Mapping[str, int]  # reason → turns that a step left out
    classes: Mapping[str, int]  # class of the samples → how many
    waiting: int  # scored turns of our own model that no step has taken yet
    spend: tuple[dict[str, Any], ...]  # of training, newest day first
    gate: Json  # the last verdict, as the trainer keeps it; None: none yet
    health: tuple[dict[str, Any], ...]  # checks that may pause training


def training(store: Store) -> Training:
    with store.reading() as db:
        last = db.execute(select(steps).order_by(steps.c.id.desc()).limit(STEPS)).all()
        gate = db.scalar(select(trainer_state.c.value).where(trainer_state.c.name == "gate"))
        return Training(
            steps=tuple(dict(row._mapping) for row in reversed(last)),
            versions=_rows(db, select(versions).order_by(versions.c.id.desc()).limit(100)),
            routes=_rows(db, select(route_events).order_by(route_events.c.id.desc()).limit(100)),
            skipped=dict(_pairs(db, step_turns.c.reason, step_turns.c.reason.is_not(None))),
            classes=dict(sorted(_pairs(db, samples.c.klass))),
            waiting=int(db.scalar(select(func.count()).select_from(turns).where(turns.c.state == "scored", turns.c.version.is_not(None))) or 0),
            spend=_rows(db, select(spend).where(spend.c.purpose.in_(PURPOSES)).order_by(spend.c.day.desc()).limit(60)),
            gate=gate,
            health=_rows(db, select(health).order_by(health.c.name)),
        )


PURPOSES = ("train", "sample", "sibling", "teacher", "judge")  # what rl.daily_budget_usd pays for


def charts(steps_: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """One chart for each group of metrics; new versions are marked."""
    marks = [(float(step["id"]), f"version {step['version']}") for step in steps_ if step["version"] is not None]
    return [
        line_chart(
            title,
            [Series(name, [(float(step["id"]), _metric(step, key)) for step in steps_]) for key, name in metrics],
            marks=marks,
            limit=limit,
        )
        for title, metrics, limit in CHARTS
    ]


def _metric(step: Mapping[str, Any], key: str) -> float | None:
    value = (step["metrics"] or {}).get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _rows(db: Connection, query: Any) -> tuple[dict[str, Any], ...]:
    return tuple(dict(row._mapping) for row in db.execute(query))


def _pairs(db: Connection, column: Any, *where: Any) -> list[tuple[str, int]]:
    return [(row[0], int(row[1])) for row in db.execute(select(column, func.count()).where(*where).group_by(column))]
