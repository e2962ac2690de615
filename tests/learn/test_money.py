from __future__ import annotations

import time
from pathlib import Path

import pytest
from sqlalchemy import insert

from metaclaw_core.learn.budget import Budget
from metaclaw_core.learn.money import DaySpend, book_training, day_spend, over_budget
from metaclaw_core.learn.prices import Prices
from metaclaw_core.settings import OPD, Settings
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import samples

PRICES = Prices.model_validate(
    {
        "training": {"tinker": {"models": {"m": {"prefill": 1, "sample": 4, "train": 3}}}},
        "providers": {"judges": {"models": {"j": {"input": 10, "output": 20}}}},
    }
)


def settings(limit: float | None = None, url: str = "") -> Settings:
    return Settings.model_validate({"rl": {"daily_budget_usd": limit, "tinker_base_url": url, "model": "m"}})


def sampled(store: Store, at: float, model: str = "m", n: int = 1) -> None:
    row = {
        "created_at": at, "base_model": model, "tokenizer": "t", "version": 1, "klass": "A", "sampling": {}, "prompt_length": 100_000,
        "length": 10_000, "reused": 0, "segments": 1, "stop_reason": "stop", "malformed": False, "redacted": False,
    }  # fmt: skip
    with store.transaction() as db:
        db.execute(insert(samples), [{**row, "flow_id": f"{at}-{model}-{i}"} for i in range(n)])


@pytest.fixture
def store(tmp_path: Path):
    with open_store(tmp_path / "store.db") as opened:
        yield opened


async def test_a_day_is_sampling_training_siblings_and_the_judge(store: Store):
    now = time.time()
    sampled(store, now, n=2)
    sampled(store, now - 200_000)  # another day
    book_training(store, "train", "m", 1_000_000)
    book_training(store, "forward", "m", 500_000)
    book_training(store, "sibling", "m", 100_000, 10_000)
    budget = Budget(store, 60_000)  # training leaves the budget of tokens alone
    await budget.record(await budget.reserve("judge", "j", 100, 100), 50_000, 1_000)
    await budget.record(await budget.reserve("evolve", "e", 1, 1), 0, 0)
    # 2 x (.1 + .04) + 3 + .5 + (.1 + .04) + (.5 + .02)
    found = day_spend(store, settings(), PRICES)
    assert (round(found.usd, 6), found.unpriced) == (4.44, ())


def test_at_the_limit_nothing_more_may_be_spent(store: Store):
    assert over_budget(store, settings(1.0), PRICES) is None
    book_training(store, "train", "m", 333_000)
    assert over_budget(store, settings(1.0), PRICES) is None
    book_training(store, "train", "m", 1_000)
    assert over_budget(store, settings(1.0), PRICES) == "$1.00 of today's $1.00 are spent (rl.daily_budget_usd); it goes on at midnight UTC."
    assert over_budget(store, settings(None), PRICES) is None
    assert "$0.00 of today's $0.00" in (over_budget(store, settings(0.0, "http://127.0.0.1:1"), PRICES) or "")


def test_what_can_not_be_added_up_stops_training_and_says_what_to_do(store: Store):
    sampled(store, time.time(), "secret-model")
    assert day_spend(store, settings(), PRICES) == DaySpend(0.0, ("secret-model",))
    said = over_budget(store, settings(5.0), PRICES)
    assert said == "rl.daily_budget_usd is set, and the price of secret-model is not known: add it to prices.yaml in METACLAW_HOME."


def test_an_engine_on_this_machine_sends_no_bill(store: Store):
    sampled(store, time.time(), "tiny")
    book_training(store, "train", "tiny", 10**9)
    assert day_spend(store, settings(5.0, "http://127.0.0.1:8300"), PRICES) == DaySpend(0.0, ())


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/v1", "http://localhost:8000/v1", "http://[::1]:8000/v1", "http://127.8.0.1/v1"])
def test_a_teacher_on_this_machine_costs_nothing(store: Store, url: str):
    book_training(store, "teacher", "my-teacher", 10**9)
    own = settings(5.0).model_copy(update={"opd": OPD(teacher_url=url, teacher_model="my-teacher")})
    assert day_spend(store, own, PRICES) == DaySpend(0.0, ())
    assert over_budget(store, own, PRICES) is None


@pytest.mark.parametrize("url", ["https://teacher.example/v1", "http://10.0.0.7:8000/v1", "http://[broken/v1", "", "http://127.0.0.1.example/v1"])
def test_a_teacher_elsewhere_costs_what_its_model_does_or_is_unknown(store: Store, url: str):
    book_training(store, "teacher", "j", 100_000)
    book_training(store, "teacher", "my-teacher", 100_000)
    elsewhere = settings(5.0).model_copy(update={"opd": OPD(teacher_url=url, teacher_model="my-teacher")})
    found = day_spend(store, elsewhere, PRICES)
    assert (round(found.usd, 6), found.unpriced) == (1.0, ("my-teacher",))


def test_what_another_teacher_read_earlier_in_the_day_keeps_its_price(store: Store):
    book_training(store, "teacher", "j", 100_000)
    own = settings(5.0).model_copy(update={"opd": OPD(teacher_url="http://127.0.0.1:8000/v1", teacher_model="my-teacher")})
    assert round(day_spend(store, own, PRICES).usd, 6) == 1.0


def test_only_training_is_booked_as_such(store: Store):
    with pytest.raises(ValueError, match="'judge' is no purpose of training"):
        book_training(store, "judge", "m", 1)
