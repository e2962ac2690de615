"""What a day of training costs, against ``rl.daily_budget_usd``.

Design: everything that rl mode makes us pay for is added up from what the store knows: answers sampled from our own versions
(`samples`), steps, siblings and the teacher (`spend`), and the judge. Where a limit is set, a price that is unknown stops
training as a spent budget does, for what can't be added up can't be kept. An engine and a teacher on this machine send no bill.

Limits: list prices and a UTC day. What is in flight when the limit is reached is paid for: one call at a time. Who billed is
told by the settings of now: what another teacher read earlier in the day is looked up under its model's name.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import urlsplit

from sqlalchemy import func, select

from metaclaw_core.addresses import parse_ip
from metaclaw_core.learn.budget import TRAINING, book, spent
from metaclaw_core.learn.prices import Prices
from metaclaw_core.model import Usage
from metaclaw_core.settings import Settings
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import samples


@dataclass(frozen=True, slots=True)
class DaySpend:
    usd: float  # of all that has a price
    unpriced: tuple[str, ...]  # models without one that were used today


def book_training(store: Store, purpose: str, model: str, came_in: int, went_out: int = 0) -> None:
    """Write down what a call of the training server took, in tokens. `purpose` is one of `TRAINING`."""
    if purpose not in TRAINING:
        raise ValueError(f"{purpose!r} is no purpose of training")
    with store.transaction() as connection:
        book(connection, datetime.now(UTC).date().isoformat(), purpose, model, came_in, went_out)


def book_readings(store: Store, purpose: str, model: str, came_in: Sequence[int]) -> None:
    """The same for several calls that generate nothing, of so many tokens each, in one transaction."""
    if purpose not in TRAINING:
        raise ValueError(f"{purpose!r} is no purpose of training")
    day = datetime.now(UTC).date().isoformat()
    with store.transaction() as connection:
        for tokens in came_in:
            book(connection, day, purpose, model, tokens, 0)


def day_spend(store: Store, settings: Settings, prices: Prices, now: float | None = None) -> DaySpend:
    """What rl mode has cost in the UTC day of `now` (unix seconds; None: the present one)."""
    day = datetime.fromtimestamp(time.time() if now is None else now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    free = sends_no_bill(settings)
    costs: list[tuple[str, float | None]] = []
    query = select(samples.c.base_model, func.sum(samples.c.prompt_length), func.sum(samples.c.length)).group_by(samples.c.base_model)
    with store.reading() as db:
        for model, prompt, answer in db.execute(query.where(samples.c.created_at >= day.timestamp(), samples.c.created_at < day.timestamp() + 86_400)):
            costs.append((model, 0.0 if free else prices.training_cost(model, prefill=int(prompt), sample=int(answer))))
    for row in spent(store, day=day.date().isoformat()):
        model, came_in, went_out = row["model"], row["input_tokens"], row["output_tokens"]
        if row["purpose"] == "train":
            costs.append((model, 0.0 if free else prices.training_cost(model, train=came_in)))
        elif row["purpose"] in ("forward", "sibling"):
            costs.append((model, 0.0 if free else prices.training_cost(model, prefill=came_in, sample=went_out)))
        elif row["purpose"] == "teacher" and model == settings.opd.teacher_model and is_own(settings.opd.teacher_url):
            costs.append((model, 0.0))
        elif row["purpose"] in ("teacher", "judge"):
            costs.append((model, prices.cost(model, Usage(came_in, went_out), requests=row["requests"])))
    return DaySpend(sum(usd for _, usd in costs if usd is not None), tuple(sorted({model for model, usd in costs if usd is None})))


def over_budget(store: Store, settings: Settings, prices: Prices, now: float | None = None) -> str | None:
    """Why nothing more may be spent today, as a sentence; None: it may."""
    limit = settings.rl.daily_budget_usd
    if limit is None:
        return None
    today = day_spend(store, settings, prices, now)
    if today.usd >= limit:
        return f"${today.usd:.2f} of today's ${limit:.2f} are spent (rl.daily_budget_usd); it goes on at midnight UTC."
    if today.unpriced:
        return (
            f"rl.daily_budget_usd is set, and the price of {', '.join(today.unpriced)} is not known: "
            "add it to prices.yaml in METACLAW_HOME."
        )
    return None


def sends_no_bill(settings: Settings) -> bool:
    """Whether sampling and training run on an engine of the user's own."""
    return is_own(settings.rl.tinker_base_url)


def is_own(url: str) -> bool:
    """Whether `url` leads to this machine itself, by its spelling; what is no URL does not."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or parse_ip(host).is_loopback
    except ValueError:  # no URL, or a name
        return False
