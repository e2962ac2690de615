"""What the learner has done, what it waits for and what it costs, as one value for ``metaclaw status``.

Design: read from the store alone, so that it is right whichever process does the work, and also where none
runs. What was never measured is None.

Limits: the limits and the judge are those of the settings that the asker sees; a proxy may have been given
others with ``--set``.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import func, select

from metaclaw_core.errors import ConfigError
from metaclaw_core.learn.budget import spent
from metaclaw_core.learn.credentials import DAY
from metaclaw_core.learn.endpoint import judge_endpoint
from metaclaw_core.learn.evolve import segment_counts
from metaclaw_core.learn.health import health_of, rl_pause_reason
from metaclaw_core.learn.runs import all_notices, last_runs
from metaclaw_core.settings import Settings
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import caller_spend, turns


def overview(store: Store, settings: Settings, now: float | None = None) -> dict[str, Any]:
    """Raises StoreError."""
    now = time.time() if now is None else now
    today = spent(store, day=datetime.fromtimestamp(now, UTC).date().isoformat())
    by_purpose: dict[str, int] = {}
    for row in today:
        by_purpose[row["purpose"]] = by_purpose.get(row["purpose"], 0) + row["input_tokens"] + row["output_tokens"]
    with store.reading() as db:
        counted = db.execute(select(turns.c.state, func.count().label("n")).group_by(turns.c.state)).all()
        borrowed = db.scalar(select(func.sum(caller_spend.c.tokens)).where(caller_spend.c.at > now - DAY))
    return {
        "turns": {row.state: row.n for row in sorted(counted)},
        "segments": segment_counts(store),
        "judge": _judge(store, settings),
        "tokens": {
            "today": sum(by_purpose.values()),
            "budget": settings.llm.daily_token_budget,
            "by_purpose": by_purpose,
            "callers_24h": int(borrowed or 0),  # of those, with a caller's own key
        },
        "runs": last_runs(store),
        "notices": all_notices(store),
    }


def _judge(store: Store, settings: Settings) -> dict[str, Any]:
    """`ok` None: not examined, or not as it is now; `problem`: why nothing is scored, or why RL does not use it."""
    try:
        endpoint = judge_endpoint(settings)
    except ConfigError as e:
        return {"model": None, "ok": None, "checked_at": None, "problem": str(e)}
    if endpoint is None:
        why = "judge.enabled is false" if not settings.judge.enabled else "no judge is configured (rl.prm_url or llm.*)"
        return {"model": None, "ok": None, "checked_at": None, "problem": f"{why}: scores stay unknown"}
    health, problem = health_of(store), rl_pause_reason(store, settings)
    current = health is not None and problem == health.reason  # else it was another judge that was examined
    return {
        "model": ", ".join(settings.judge.models or (endpoint.model,)),
        "ok": health.ok if health is not None and current else None,
        "checked_at": health.checked_at if health is not None else None,
        "problem": problem,
    }
