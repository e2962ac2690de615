"""What today's traffic and our own calls cost, as one value each for ``metaclaw status``.

Design: a turn is priced by itself, because a long prompt may have another price. A sum names what it lacks: the models
without a known price, and the answers whose provider reported no tokens. Where nothing could be priced it is None.

Limits: a day is a UTC day, as for the token budget. Answers of our own weights are not the upstream's and not in here.
Of our own calls the store knows the model and not who billed it, so they are priced by the model's name alone.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import func, select

from metaclaw_core.learn.budget import spent
from metaclaw_core.learn.prices import Prices
from metaclaw_core.model import Usage
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import turns


def today(now: float) -> datetime:
    """The beginning of the UTC day."""
    return datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def traffic_cost(store: Store, prices: Prices, now: float) -> dict[str, Any]:
    """Of today's requests: `requests` with reported tokens, their `input` (`cached` of it from a cache) and `output`;
    `usd`, which is of `priced` of them (None: of none), `unpriced` model → requests, and `unreported` answers."""
    since = today(now).timestamp()
    columns = (turns.c.host, turns.c.model, turns.c.response_model, turns.c.input_tokens, turns.c.output_tokens)
    query = select(*columns, turns.c.cached_tokens, turns.c.cache_write_tokens).where(
        turns.c.started_at >= since, turns.c.version.is_(None), turns.c.output_tokens.is_not(None)
    )
    silent = select(func.count()).where(
        turns.c.started_at >= since, turns.c.version.is_(None), turns.c.output_tokens.is_(None), turns.c.response_tip.is_not(None)
    )
    sums: Counter[str] = Counter()
    unpriced: Counter[str] = Counter()
    usd = 0.0
    with store.reading() as db:
        for row in db.execute(query):
            sums["requests"] += 1
            sums["input"] += row.input_tokens or 0
            sums["cached"] += row.cached_tokens or 0
            sums["output"] += row.output_tokens
            usage = Usage(row.input_tokens, row.output_tokens, row.cached_tokens, row.cache_write_tokens)
            costs = (prices.cost(name, usage, host=row.host) for name in (row.response_model, row.model) if name)
            cost = next((cost for cost in costs if cost is not None), None)
            if cost is None:
                unpriced[row.response_model or row.model or "?"] += 1
            else:
                usd += cost
        unreported = int(db.scalar(silent) or 0)
    priced = sums["requests"] - unpriced.total()
    return {
        **{name: sums[name] for name in ("requests", "input", "cached", "output")},
        "usd": usd if priced else None,
        "priced": priced,
        "unpriced": dict(unpriced.most_common()),
        "unreported": unreported,
    }


def own_cost(store: Store, prices: Prices, now: float) -> dict[str, Any]:
    """Of today's calls of our own (judge, evolver): `requests`, `usd` of `priced` of them (None: of none), `unpriced`
    model → requests, and `estimated`: tokens that no provider counted."""
    sums: Counter[str] = Counter()
    unpriced: Counter[str] = Counter()
    usd = 0.0
    for row in spent(store, day=today(now).date().isoformat()):
        sums["requests"] += row["requests"]
        sums["estimated"] += row["estimated_tokens"]
        usage = Usage(row["input_tokens"], row["output_tokens"])
        cost = prices.cost(row["model"], usage, requests=max(row["requests"], 1))
        if cost is None:
            unpriced[row["model"]] += row["requests"]
        else:
            sums["priced"] += row["requests"]
            usd += cost
    return {
        "requests": sums["requests"],
        "usd": usd if sums["priced"] else None,
        "priced": sums["priced"],
        "unpriced": dict(unpriced.most_common()),
        "estimated": sums["estimated"],
    }


def cost_text(cost: dict[str, Any]) -> str:
    """``$0.12``, ``$0.12 for 3 of 5 requests (price unknown: m)`` or ``price unknown (m)``."""
    missing = ", ".join(cost["unpriced"])
    if cost["usd"] is None:
        return f"price unknown ({missing})"
    text = f"${cost['usd']:,.2f}" if cost["usd"] >= 0.01 else f"${cost['usd']:.4f}"
    return f"{text} for {cost['priced']:,} of {cost['requests']:,} requests (price unknown: {missing})" if missing else text
