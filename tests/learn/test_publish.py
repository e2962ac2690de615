from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import insert

from metaclaw_core.learn import journal
from metaclaw_core.learn.journal import Trained
from metaclaw_core.learn.money import book_training
from metaclaw_core.learn.prices import Prices
from metaclaw_core.learn.publish import publish, route_of
from metaclaw_core.routes import Served, read_route
from metaclaw_core.settings import Settings
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import turns

PRICES = Prices.model_validate({"training": {"tinker": {"models": {"m": {"prefill": 1, "sample": 4, "train": 3}}}}})
ROW = {
    "principal": "p", "dialect": "openai_chat", "scheme": "http", "host": "h", "port": 80, "path": "/", "redacted": False,
    "retry": False, "attempts": 0, "live": True, "state": "scored",
}  # fmt: skip
LATER = 4_000_000_000.0


def settings(**rl) -> Settings:
    return Settings.model_validate({"mode": "rl", "rl": {"model": "m", "warmup_turns": 0, **rl}})


def turn(store: Store, number: int, **fields) -> int:
    row = {**ROW, "kind": "main", "turn_id": f"t{number}", "flow_id": f"f{number}", "content_key": f"k{number}", "started_at": LATER - 100}
    with store.transaction() as db:
        return int(db.execute(insert(turns).values(row | fields).returning(turns.c.id)).scalar_one())


def step(store: Store, number: int, base: int) -> int:
    claimed = journal.claim(store, [turn(store, number)], base_version=base, algorithm="single")
    version = journal.saved(store, claimed, f"s{number}", [Trained(store_turn, None) for store_turn in _turns(store, claimed)], {}, {})
    journal.published(store, claimed, f"w{number}", LATER + 3600)
    journal.routed(store, claimed, {}, f"step {claimed}")
    return version


def _turns(store: Store, claimed: int) -> list[int]:
    from sqlalchemy import select

    from metaclaw_core.store.tables import step_turns

    with store.reading() as db:
        return list(db.scalars(select(step_turns.c.turn).where(step_turns.c.step == claimed)))


@pytest.fixture
def store(tmp_path: Path):
    with open_store(tmp_path / "store.db") as opened:
        yield opened


def test_before_training_begins_there_is_no_route(store: Store, tmp_path: Path):
    assert publish(store, settings(), PRICES, tmp_path) is None
    assert read_route(tmp_path) is None


def test_the_file_follows_the_store_and_is_written_only_when_it_changes(store: Store, tmp_path: Path):
    journal.begin(store, "m")
    first = publish(store, settings(), PRICES, tmp_path)
    assert first == read_route(tmp_path)
    assert (first.working, first.stable, first.served, first.enabled) == (1, 1, (Served(1, None),), True)
    file = tmp_path / "run/route.json"
    before = file.stat().st_ino
    publish(store, settings(), PRICES, tmp_path)
    assert file.stat().st_ino == before
    assert file.stat().st_mode & 0o777 == 0o600
    step(store, 1, 1)
    step(store, 2, 2)
    route = publish(store, settings(), PRICES, tmp_path)
    assert (route.working, route.stable, route.generation) == (3, 1, 3)
    assert route.served == (Served(1, None), Served(2, "w1"), Served(3, "w2"))  # 2 may still be pinned by a session


def test_a_version_that_expired_or_was_long_ago_is_not_offered(store: Store):
    journal.begin(store, "m")
    step(store, 1, 1)
    step(store, 2, 2)
    assert route_of(store, settings(), PRICES, LATER).served == (Served(1, None), Served(3, "w2"))
    assert route_of(store, settings(), PRICES, LATER + 4000).served == (Served(1, None),)


def test_the_first_turns_go_to_the_upstream(store: Store):
    journal.begin(store, "m")
    warm = settings(warmup_turns=2)
    assert route_of(store, warm, PRICES, LATER).enabled is False
    turn(store, 1)
    turn(store, 2, turn_id="t1", kind="main")  # the same human turn
    turn(store, 3, kind="heartbeat")
    turn(store, 4, live=False)
    turn(store, 5, started_at=1.0)  # before training began
    route = route_of(store, warm, PRICES, LATER)
    assert (route.enabled, route.reason) == (False, "warm-up: 1 of 2 turns seen (rl.warmup_turns)")
    turn(store, 6)
    assert route_of(store, warm, PRICES, LATER).enabled is True


def test_a_spent_budget_gives_the_traffic_to_the_base_model_or_to_the_upstream(store: Store):
    import time

    journal.begin(store, "m")
    step(store, 1, 1)
    book_training(store, "train", "m", 10**6)
    base = route_of(store, settings(daily_budget_usd=2.0), PRICES, time.time())
    assert (base.enabled, base.working, base.stable) == (True, 1, 1)
    assert base.served == (Served(1, None), Served(2, "w1"))  # a tool loop on 2 goes on
    upstream = route_of(store, settings(daily_budget_usd=2.0, on_budget="upstream"), PRICES, time.time())
    assert (upstream.enabled, upstream.working) == (False, 2)
    assert "$3.00 of today's $2.00 are spent" in upstream.reason
    assert route_of(store, settings(daily_budget_usd=5.0), PRICES, time.time()).working == 2
