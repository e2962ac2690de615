"""The route file: what the proxy and the policy server may use now, derived from the store.

Design: pure reading and one atomic write. Beside the versions in force the file lists those that were in force lately, because a
tool loop or a session may still be pinned to one. Two things turn routing off without touching the versions: the warm-up, in
which answers come from the upstream for the first ``rl.warmup_turns`` human turns, and a budget that is spent with
``rl.on_budget: upstream``; with ``base`` the base model answers meanwhile.

Limits: a human turn is counted once its first request is in the store, some seconds after it was made.
"""

from __future__ import annotations

import time
from pathlib import Path

from sqlalchemy import func, select

from metaclaw_core.learn import journal
from metaclaw_core.learn.money import over_budget
from metaclaw_core.learn.prices import Prices
from metaclaw_core.routes import Route, Served, read_route, write_route
from metaclaw_core.settings import Settings
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import route_events, turns, versions

_LATELY = 24 * 3600.0  # a session that slept longer moves on to the version in force


def route_of(store: Store, settings: Settings, prices: Prices, now: float) -> Route | None:
    """The route as it should be published; None: training has not begun."""
    current = journal.in_force(store)
    if current is None:
        return None
    working, stable = current.working, current.stable
    enabled, reason = True, None
    with store.reading() as db:
        first = db.scalar(select(func.min(route_events.c.at)))
        human = select(func.count(turns.c.turn_id.distinct())).where(turns.c.kind == "main", turns.c.live, turns.c.started_at >= first)
        seen = int(db.scalar(human) or 0) if settings.rl.warmup_turns else 0
        base = db.scalar(select(func.min(versions.c.id)).where(versions.c.base_model == settings.rl.model, versions.c.sampler_path.is_(None), versions.c.state_path.is_(None)))
        lately = {n for row in db.execute(select(route_events.c.working, route_events.c.stable).where(route_events.c.at >= now - _LATELY)) for n in row}
    if seen < settings.rl.warmup_turns:
        enabled, reason = False, f"warm-up: {seen} of {settings.rl.warmup_turns} turns seen (rl.warmup_turns)"
    elif (spent := over_budget(store, settings, prices, now)) is not None:
        if settings.rl.on_budget == "upstream":
            enabled, reason = False, spent
        elif base is not None:
            working = stable = int(base)
    served = []
    for number in sorted({working, stable, current.working, current.stable, *lately}):
        version = journal.version(store, number)
        alive = version.expires_at is None or version.expires_at > now
        if version.base_model == settings.rl.model and alive and (version.sampler_path is not None or version.state_path is None):
            served.append(Served(number, version.sampler_path))
    return Route(current.generation, settings.rl.model, working, stable, tuple(served), enabled, reason)


def publish(store: Store, settings: Settings, prices: Prices, home: Path, now: float | None = None) -> Route | None:
    """Write the route file if it does not say so already; the route."""
    route = route_of(store, settings, prices, time.time() if now is None else now)
    if route is not None and route != read_route(home):
        write_route(home, route)
    return route
