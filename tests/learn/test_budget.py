"""The day's tokens: what is reserved, what is recorded, what is estimated."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaclaw_core.learn.budget import Budget, BudgetExhausted, estimate_tokens, spent
from metaclaw_core.store.db import open_store

NOON = 1_795_608_000.0  # 2026-11-25, 12:00 UTC


def test_counts_are_kept_by_day_purpose_and_model(tmp_path: Path) -> None:
    async def spend() -> None:
        for purpose, model in (("judge", "m"), ("judge", "m"), ("judge", "n"), ("evolve", "m")):
            room = await budget.reserve(purpose, model, 100, 50)
            await budget.record(room, 90, 10)
            budget.release(room)

    with open_store(tmp_path / "store.db") as store:
        budget = Budget(store, None, clock=lambda: NOON)
        asyncio.run(spend())
        assert spent(store) == [
            {
                "day": "2026-11-25",
                "purpose": purpose,
                "model": model,
                "requests": requests,
                "input_tokens": 90 * requests,
                "output_tokens": 10 * requests,
                "estimated_tokens": 0,
            }
            for purpose, model, requests in (("evolve", "m", 1), ("judge", "m", 2), ("judge", "n", 1))
        ]
        assert len(spent(store, purpose="evolve")) == 1
        assert spent(store, day="2026-11-24") == []


@pytest.mark.parametrize(
    ("counted", "answer", "expected"),
    [
        ((90, 10), "Yes.", (90, 10, 0)),
        ((None, 10), "Yes.", (100, 10, 100)),
        ((90, None), "Yes.", (90, 2, 2)),
        ((90, None), None, (90, 50, 50)),
        ((None, None), None, (100, 50, 150)),
        ((0, 0), "", (0, 0, 0)),
    ],
)
def test_what_the_provider_did_not_count_is_estimated_and_marked(
    tmp_path: Path, counted: tuple[int | None, int | None], answer: str | None, expected: tuple[int, int, int]
) -> None:
    async def spend() -> None:
        await budget.record(await budget.reserve("judge", "m", 100, 50), *counted, answer)

    with open_store(tmp_path / "store.db") as store:
        budget = Budget(store, None)
        asyncio.run(spend())
        [row] = spent(store)
        assert (row["input_tokens"], row["output_tokens"], row["estimated_tokens"]) == expected


def test_many_at_once_cannot_overshoot_together(tmp_path: Path) -> None:
    async def reserve_ten() -> list[object]:
        return await asyncio.gather(*(budget.reserve("judge", "m", 100, 50) for _ in range(10)), return_exceptions=True)

    with open_store(tmp_path / "store.db") as store:
        budget = Budget(store, 600, clock=lambda: NOON)
        got = asyncio.run(reserve_ten())
    refused = [r for r in got if isinstance(r, BudgetExhausted)]
    assert (len(got) - len(refused), len(refused)) == (4, 6)
    assert str(refused[0]) == (
        "0 of today's 600 tokens are spent (llm.daily_token_budget); work goes on at 00:00 UTC."
    )


def test_a_released_reservation_is_room_again_and_recorded_tokens_are_not(tmp_path: Path) -> None:
    async def run() -> None:
        room = await budget.reserve("judge", "m", 100, 50)
        budget.release(room)
        room = await budget.reserve("judge", "m", 100, 50)
        await budget.record(room, 80, 20)
        budget.release(room)
        with pytest.raises(BudgetExhausted, match="100 of today's 200 tokens"):
            await budget.reserve("judge", "m", 100, 50)
        await budget.reserve("judge", "m", 50, 50)

    with open_store(tmp_path / "store.db") as store:
        budget = Budget(store, 200)
        asyncio.run(run())


def test_the_next_day_has_its_own_tokens_and_a_restart_has_not(tmp_path: Path) -> None:
    async def run() -> None:
        now = NOON
        budget = Budget(store, 200, clock=lambda: now)
        await budget.record(await budget.reserve("judge", "m", 100, 50), 150, 50)
        with pytest.raises(BudgetExhausted):
            await Budget(store, 200, clock=lambda: now).reserve("evolve", "m", 1, 1)
        now += 86_400
        await Budget(store, 200, clock=lambda: now).reserve("evolve", "m", 100, 100)

    with open_store(tmp_path / "store.db") as store:
        asyncio.run(run())


def test_a_budget_of_nothing_allows_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        with pytest.raises(BudgetExhausted):
            await Budget(store, 0).reserve("judge", "m", 1, 0)

    with open_store(tmp_path / "store.db") as store:
        asyncio.run(run())


@pytest.mark.parametrize(("text", "tokens"), [("", 0), ("a", 1), ("abc", 1), ("abcd", 2), ("求求", 2), ("\ud800", 1)])
def test_three_bytes_are_estimated_as_a_token(text: str, tokens: int) -> None:
    assert estimate_tokens(text) == tokens


@given(st.text(), st.text())
def test_an_estimate_grows_with_the_text(a: str, b: str) -> None:
    assert max(estimate_tokens(a), estimate_tokens(b)) <= estimate_tokens(a + b) <= estimate_tokens(a) + estimate_tokens(b)
