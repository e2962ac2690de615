from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from evolve_tools import LATER, START, Model, Talk, add, edits
from judge_tools import client_of

from metaclaw_core.cli.status import _learning_lines, _skills
from metaclaw_core.learn.budget import Budget
from metaclaw_core.learn.credentials import Callers
from metaclaw_core.learn.evolve import Evolver
from metaclaw_core.learn.health import judge_health
from metaclaw_core.learn.overview import overview
from metaclaw_core.settings import load_settings
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.testing import Script, ScriptedLLM


@pytest.fixture
def store(metaclaw_home: Path) -> Iterator[Store]:
    with open_store(metaclaw_home / "store.db") as opened:
        yield opened


def lines(value: dict[str, object]) -> list[str]:
    """Without the times."""
    return [line for line in _learning_lines(value) if not line.startswith(("evolve ", "notice "))]


def test_with_nothing_done_nothing_is_made_up(store: Store) -> None:
    value = overview(store, load_settings())
    assert (value["turns"], value["segments"], value["runs"], value["notices"]) == ({}, {}, [], [])
    assert value["tokens"] == {"today": 0, "budget": 2_000_000, "by_purpose": {}, "callers_24h": 0}
    assert lines(value) == [
        "judge      no judge is configured (rl.prm_url or llm.*): scores stay unknown",
        "tokens     0 today, of 2,000,000",
    ]


async def test_what_waits_for_a_key_says_so(store: Store) -> None:
    Talk().say("In this repository use pnpm, not npm.").into(store)
    callers = Callers(store, (), enabled=True, clock=lambda: LATER)
    evolver = Evolver(store, load_settings(), callers=callers, clock=lambda: LATER)
    await evolver.run()
    value = overview(store, load_settings())
    assert value["turns"] == {"captured": 1}
    assert value["segments"] == {"waiting(credential)": 1}
    assert "segments   1 waiting(credential)" in lines(value)


async def test_tokens_and_a_callers_share_are_told_apart_and_a_run_with_problems_names_the_first(store: Store) -> None:
    budget = Budget(store, None, clock=lambda: START)
    for purpose, came_in in (("judge", 1000), ("evolve", 500)):
        reservation = await budget.reserve(purpose, "m", 2000, 100)
        await budget.record(reservation, came_in, 20)
        budget.release(reservation)
    with store.transaction() as db:
        db.exec_driver_sql(f"INSERT INTO caller_spend (principal, at, tokens, status) VALUES ('p', {START - 60}, 520, 200)")
        db.exec_driver_sql(f"INSERT INTO caller_spend (principal, at, tokens, status) VALUES ('p', {START - 90_000}, 9, 200)")
    value = overview(store, load_settings({"llm": {"daily_token_budget": None}}), now=START)
    assert value["tokens"] == {"today": 1540, "budget": None, "by_purpose": {"evolve": 520, "judge": 1020}, "callers_24h": 520}
    assert lines(value)[-1] == "tokens     1,540 today, no limit (evolve 520, judge 1,020); 520 in 24 h with your agent's own key"
    run = {"name": "score", "started_at": None, "ok": True, "error": None, "report": {"problems": ["the judge is down", "x"]}}
    assert _learning_lines({**value, "runs": [run]})[-1] == "score      -, ok; the judge is down"


async def test_the_judges_health_is_that_of_the_judge_that_is_configured(store: Store) -> None:
    with ScriptedLLM(lambda _: Script(text="The first one.\nBetter: A")) as llm:
        settings = load_settings({"llm": {"api_base": f"{llm.url}/v1", "model_id": "judge-1", "api_key": "k-0123456789"}})
        value = overview(store, settings)["judge"]
        assert value == {"model": "judge-1", "ok": None, "checked_at": None, "problem": "the judge has not been examined yet"}
        async with client_of(llm, store) as client:
            found = await judge_health(store, client, settings.judge, clock=lambda: START)
    assert not found.ok
    value = overview(store, settings)
    assert value["judge"] == {"model": "judge-1", "ok": False, "checked_at": START, "problem": found.reason}
    assert any(line.startswith("judge      judge-1, examined ") for line in lines(value))
    other = load_settings({"llm": {"api_base": f"{llm.url}/v1", "model_id": "judge-2", "api_key": "k-0123456789"}})
    changed = "the judge was changed and has not been examined since"
    assert overview(store, other)["judge"] == {"model": "judge-2", "ok": None, "checked_at": START, "problem": changed}


async def test_a_finished_run_shows(store: Store) -> None:
    Talk().say("In this repository use pnpm, not npm.").into(store)
    evolver = Evolver(store, load_settings(), llm=Model(edits(add("use-pnpm", "use pnpm, not npm"))), clock=lambda: LATER)
    await evolver.run()
    value = overview(store, load_settings())
    assert value["segments"] == {"done": 1}
    assert [(run["name"], run["ok"]) for run in value["runs"]] == [("evolve", True)]
    assert any(line.startswith("evolve ") and line.endswith(", ok") for line in _learning_lines(value))


def test_before_there_is_an_index_no_generation_is_claimed() -> None:
    assert _skills(None) == "no index yet"
    assert _skills({"count": 83, "generation": None}) == "83 as read at the start; the worker's index is not there yet"
    assert _skills({"count": 84, "generation": 2}) == "84 in generation 2"
