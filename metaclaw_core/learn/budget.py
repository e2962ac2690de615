"""What our own calls of LLMs may cost, and what they did.

Design: one limit of tokens a day for everything the worker asks an LLM (``llm.daily_token_budget``). A
call first reserves what it could take at most, so that many at once can't overshoot together, and
afterwards records what the provider counted. Where it counted nothing (a time-out, a server that
reports no usage) the reservation itself is recorded, marked as estimated: too much rather than too
little. Records are rows of the store by day, purpose and model, so they survive a restart and other
processes see them.

Limits: a day is a UTC day. Two processes don't see each other's reservations, only what was recorded;
their overshoot is what both have in flight. Tokens, not money: prices are not known here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, func, select

from metaclaw_core.errors import MetaClawError
from metaclaw_core.store.queries import upsert
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import spend
from metaclaw_core.store.types import plain

TRAINING = ("train", "forward", "sibling", "teacher")  # purposes with a budget of their own, in money: rl.daily_budget_usd
_FRESH_SECONDS = 5.0  # how long the day's total is believed without asking the store: others spend, too


class BudgetExhausted(MetaClawError):
    """The day's tokens are spent; nothing was sent. Work waits for the next UTC day."""


def estimate_tokens(text: str) -> int:
    """At least as many tokens as `text` is likely to have: one for three bytes of UTF-8.

    Prose has fewer; code, numbers and Chinese about as many.
    """
    return -(-len(text.encode("utf-8", "surrogatepass")) // 3)


@dataclass(frozen=True, slots=True)
class Reservation:
    purpose: str
    model: str
    input_tokens: int  # at most, both
    output_tokens: int

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens


class Budget:
    """The day's tokens. One per process and store; `daily_tokens` None: no limit, but recorded all the same."""

    def __init__(self, store: Store, daily_tokens: int | None, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._limit = daily_tokens
        self._clock = clock
        self._reserved = 0
        self._known: tuple[str, int, float] = ("", 0, float("-inf"))  # day, its total, when that was read

    async def reserve(self, purpose: str, model: str, input_tokens: int, output_tokens: int) -> Reservation:
        """Room for one request; give it back with `release`. Raises BudgetExhausted, StoreError."""
        wanted = Reservation(purpose, model, input_tokens, output_tokens)
        if self._limit is not None:
            spent = await self._total()
            if spent + self._reserved + wanted.tokens > self._limit:
                raise BudgetExhausted(
                    f"{spent:,} of today's {self._limit:,} tokens are spent (llm.daily_token_budget); "
                    f"work goes on at {self._midnight():%H:%M} UTC."
                )
        self._reserved += wanted.tokens
        return wanted

    def release(self, reservation: Reservation) -> None:
        self._reserved -= reservation.tokens

    async def record(
        self, reservation: Reservation, input_tokens: int | None, output_tokens: int | None, answer: str | None = None
    ) -> None:
        """One request was made. Counts that the provider did not give (None) are estimated and marked: the prompt as
        reserved, the answer from its text, or as reserved where there is none. Raises StoreError."""
        came_in = reservation.input_tokens if input_tokens is None else input_tokens
        went_out = output_tokens
        if went_out is None:
            went_out = reservation.output_tokens if answer is None else estimate_tokens(answer)
        guessed = (came_in if input_tokens is None else 0) + (went_out if output_tokens is None else 0)
        total = await asyncio.to_thread(self._record, reservation, came_in, went_out, guessed)
        self._known = (self._day(), total, time.monotonic())

    async def _total(self) -> int:
        day, total, read_at = self._known
        if day != self._day() or time.monotonic() - read_at > _FRESH_SECONDS:
            total = await asyncio.to_thread(self._read)
            self._known = (self._day(), total, time.monotonic())
        return total

    def _read(self) -> int:
        with self._store.reading() as connection:
            return _total_of(connection, self._day())

    def _record(self, reservation: Reservation, came_in: int, went_out: int, guessed: int) -> int:
        with self._store.transaction() as connection:
            book(connection, self._day(), reservation.purpose, reservation.model, came_in, went_out, estimated=guessed)
            return _total_of(connection, self._day())

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)

    def _day(self) -> str:
        return self._now().date().isoformat()

    def _midnight(self) -> datetime:
        return (self._now() + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)


def book(connection: Connection, day: str, purpose: str, model: str, came_in: int, went_out: int, *, estimated: int = 0) -> None:
    """Add one request to the day's sums, within the caller's transaction."""
    row: dict[str, Any] = {
        "day": day,
        "purpose": purpose,
        "model": plain(model),
        "requests": 1,
        "input_tokens": came_in,
        "output_tokens": went_out,
        "estimated_tokens": estimated,
    }
    insert = upsert(connection.dialect.name, spend)
    names = ("requests", "input_tokens", "output_tokens", "estimated_tokens")
    sums = {name: spend.c[name] + insert.excluded[name] for name in names}
    connection.execute(insert.on_conflict_do_update(index_elements=["day", "purpose", "model"], set_=sums), row)


def _total_of(connection: Connection, day: str) -> int:
    tokens = func.coalesce(func.sum(spend.c.input_tokens + spend.c.output_tokens), 0)
    return int(connection.scalar(select(tokens).where(spend.c.day == day, spend.c.purpose.not_in(TRAINING))) or 0)


def spent(store: Store, *, day: str | None = None, purpose: str | None = None) -> list[dict[str, Any]]:
    """The rows of `spend`, newest day first, for `status`."""
    query = select(spend).order_by(spend.c.day.desc(), spend.c.purpose, spend.c.model)
    if day is not None:
        query = query.where(spend.c.day == day)
    if purpose is not None:
        query = query.where(spend.c.purpose == purpose)
    with store.reading() as connection:
        return [dict(row._mapping) for row in connection.execute(query)]
