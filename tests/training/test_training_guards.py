"""What keeps training from a step, or breaks one off: windows, money, a pinned route; and weights that live on meanwhile.

All through `Trainer.run_once`, with the real SDK on the real engine. Whatever happens, the turns may be taken again or are trained
once, and the sentence says what to do.
"""

from __future__ import annotations

import asyncio
import json
import time
from datetime import datetime, timedelta

import numpy as np
import pytest
from between_help import Lane
from guard_help import PROMPT, asking
from policy_help import RunningEngine

from metaclaw_core.learn import journal
from metaclaw_core.learn.prices import Prices
from metaclaw_core.routes import read_route

pytestmark = [pytest.mark.local, pytest.mark.slow]


# --- windows ------------------------------------------------------------------------------------------------------------


def hours(begin: int, end: int) -> str:
    """From so many hours after now to so many after it."""
    now = datetime.now()
    return "-".join((now + timedelta(hours=h)).strftime("%H:%M") for h in (begin, end))


async def test_training_waits_until_no_request_came_for_the_idle_minutes(lab, proxy: Lane):
    one = lab(schedule="windows", sleep_hours=hours(2, 3), idle_minutes=15)
    one.request(minutes_ago=14)
    report = await one.trainer.run_once()
    assert (report.made, report.problems) == (False, ())
    assert report.waits == f"it trains in rl.sleep_hours ({one.settings.rl.sleep_hours}), or after 15 minutes without a request (rl.idle_minutes)"
    assert proxy.asked == []  # nothing was so much as opened
    one.request(minutes_ago=16)
    assert (await one.trainer.run_once()).made
    await one.trainer.aclose()


async def test_within_the_hours_of_sleep_it_trains_unless_somebody_is_awake(lab):
    one = lab(schedule="windows", sleep_hours=hours(-1, 1), idle_minutes=0)
    one.request(minutes_ago=0)
    assert (await one.trainer.run_once()).waits == "a request came within the last minute (rl.schedule: windows)"
    one.request(minutes_ago=2)
    assert (await one.trainer.run_once()).made
    other = lab(schedule="windows", sleep_hours=hours(1, 2), idle_minutes=0)
    other.request(minutes_ago=600)
    assert (await other.trainer.run_once()).waits == f"it trains in rl.sleep_hours only ({other.settings.rl.sleep_hours})"
    await one.trainer.aclose()


# Where the user comes back; the calls that are made yet; what becomes of the step.
BACK = [
    ("claimed", ["forward_backward"], "abandoned", "scored"),
    ("forward", [], "abandoned", "scored"),
    ("taught", [], "abandoned", "scored"),
    ("before step", ["forward_backward", "optim_step", "save_weights", "save_weights_for_sampler"], "published", "trained"),
    ("saved", ["save_weights_for_sampler"], "published", "trained"),
    ("published", [], "published", "trained"),
]


@pytest.mark.parametrize(("point", "calls", "state", "turn"), BACK, ids=[one[0] for one in BACK])
async def test_when_the_user_comes_back_nothing_new_is_begun_and_nothing_is_lost(lab, proxy: Lane, point: str, calls: list[str], state: str, turn: str):
    """A step that has begun to change the weights is saved, since it could not be undone; it serves once they are gone again."""
    one = lab(schedule="windows", sleep_hours=hours(2, 3), idle_minutes=15)
    one.request(minutes_ago=60)

    def back() -> None:
        one.request(minutes_ago=0)
        proxy.asked.clear()

    one.hooks[point] = back
    report = await one.trainer.run_once()
    assert "or after 15 minutes without a request" in (report.waits or "")
    assert proxy.paths("forward_backward", "optim_step", "save_weights", "asample") == calls
    assert (one.steps(), one.states()) == ([state], {turn})
    assert read_route(one.home).working == 1
    while_here = await one.trainer.run_once()
    assert (while_here.made, one.steps()[-1]) == (False, state)
    one.request(minutes_ago=16)
    await one.trainer.run_once()
    assert one.steps()[-1] == "routed"
    assert (one.trained(), one.states()) == ([1, 2, 3, 4], {"trained"})
    assert read_route(one.home).working == 2
    await one.trainer.aclose()


# --- money --------------------------------------------------------------------------------------------------------------


def bill(engine: RunningEngine, **rates: float) -> Prices:
    """USD per million tokens."""
    return Prices.model_validate({"training": {"tinker": {"models": {engine.model: {"prefill": 0, "sample": 0, "train": 0} | rates}}}})


CLOUD = ""  # the settings name Tinker's cloud, which sends a bill; the SDK asks the engine all the same


@pytest.mark.parametrize("on_budget", ["base", "upstream"])
async def test_a_budget_that_the_first_call_exceeds_stops_the_step_after_it_and_traffic_goes_on(lab, engine: RunningEngine, proxy: Lane, on_budget: str):
    one = lab(url=CLOUD, prices=bill(engine, prefill=1e6), daily_budget_usd=20.0, on_budget=on_budget)
    report = await one.trainer.run_once()  # 4 answers of 7 places: $28
    assert report.waits == "$28.00 of today's $20.00 are spent (rl.daily_budget_usd); it goes on at midnight UTC."
    assert proxy.paths("forward_backward", "optim_step", "asample") == ["forward_backward"]
    assert (one.steps(), one.states()) == (["abandoned"], {"scored"})
    again = await one.trainer.run_once()
    assert (again.waits, len(proxy.paths("forward_backward"))) == (report.waits, 1)
    route = read_route(one.home)
    assert (route.enabled, route.working) == ((True, 1) if on_budget == "base" else (False, 1))
    assert route.reason == (None if on_budget == "base" else report.waits)
    await one.trainer.aclose()


@pytest.mark.parametrize("on_budget", ["base", "upstream"])
async def test_a_budget_that_a_step_exceeds_leaves_it_saved_and_checks_it_another_day(lab, engine: RunningEngine, proxy: Lane, on_budget: str):
    one = lab(url=CLOUD, prices=bill(engine, train=1e6), daily_budget_usd=20.0, on_budget=on_budget)
    report = await one.trainer.run_once()
    assert (report.made, report.waits) == (True, "$28.00 of today's $20.00 are spent (rl.daily_budget_usd); it goes on at midnight UTC.")
    assert proxy.paths("forward_backward", "optim_step", "asample") == ["forward_backward", "forward_backward", "optim_step"]
    assert (one.steps(), one.states()) == (["published"], {"trained"})
    await one.trainer.run_once()
    route = read_route(one.home)
    assert (route.enabled, route.working, route.stable) == (on_budget == "base", 1, 1)
    assert proxy.paths("asample") == []  # the checks would be paid for
    # Another day.
    with one.store.transaction() as db:
        db.exec_driver_sql("UPDATE spend SET day = '2000-01-01'")
    await one.trainer.run_once()
    assert one.steps() == ["routed"]
    route = read_route(one.home)
    assert (route.enabled, route.working, route.stable) == (True, 2, 1)
    await one.trainer.aclose()


async def test_a_model_without_a_price_is_not_trained_where_a_budget_is_set(lab, engine: RunningEngine, proxy: Lane):
    one = lab(url=CLOUD, daily_budget_usd=20.0)
    report = await one.trainer.run_once()
    assert report.waits == f"rl.daily_budget_usd is set, and the price of {engine.model} is not known: add it to prices.yaml in METACLAW_HOME."
    assert proxy.paths("optim_step") == []
    assert one.states() == {"scored"}
    await one.trainer.aclose()


# --- a pinned route, and weights that must not expire -------------------------------------------------------------------


async def test_while_the_route_is_pinned_nothing_is_trained_and_its_weights_stay_alive(lab, proxy: Lane):
    one = lab(batch_size=2, min_sessions=1)
    assert (await one.trainer.run_once()).made
    journal.move_route(one.store, working=2, stable=1, reason="pinned by hand", pinned=True)
    one.soon()
    proxy.asked.clear()
    report = await one.trainer.run_once()
    assert report.waits == "the route is pinned to version 2; `metaclaw route unpin` lets training go on"
    assert proxy.paths("forward_backward", "optim_step", "save_weights", "asample") == []
    assert [json.loads(asked.body) for asked in proxy.asked if "/ttl" in asked.path] == [{"ttl_seconds": 168 * 3600}]
    assert one.states() == {"trained", "scored"}
    current = journal.in_force(one.store)
    journal.move_route(one.store, working=current.working, stable=current.stable, reason="unpinned by hand")
    assert (await one.trainer.run_once()).made
    assert journal.in_force(one.store).working == 3
    await one.trainer.aclose()


async def test_a_route_that_is_pinned_in_the_middle_of_a_step_stays_where_it_is(lab):
    one = lab()
    one.hooks["published"] = lambda: journal.move_route(one.store, working=1, stable=1, reason="pinned by hand", pinned=True)
    assert (await one.trainer.run_once()).made
    current = journal.in_force(one.store)
    assert (current.working, current.pinned, one.states()) == (1, True, {"trained"})
    assert read_route(one.home).working == 1
    await one.trainer.aclose()


async def test_weights_that_serve_live_on_while_nothing_is_trained(lab, proxy: Lane):
    one = lab()
    assert (await one.trainer.run_once()).made
    before = journal.version(one.store, 2)
    assert before.expires_at == pytest.approx(time.time() + 168 * 3600, abs=60)
    proxy.asked.clear()
    await one.trainer.run_once()
    assert proxy.paths("/ttl") == []  # there is time
    one.soon()
    await one.trainer.run_once()
    assert [json.loads(asked.body) for asked in proxy.asked if "/ttl" in asked.path] == [{"ttl_seconds": 168 * 3600}]
    after = journal.version(one.store, 2)
    assert (after.sampler_path, after.expires_at) == (before.sampler_path, pytest.approx(time.time() + 168 * 3600, abs=60))
    await one.trainer.aclose()


async def test_weights_that_the_server_has_lost_are_saved_once_more_from_their_state(lab, engine: RunningEngine, proxy: Lane):
    from tinker import RestClient

    one = lab()
    assert (await one.trainer.run_once()).made
    before = journal.version(one.store, 2)
    where = asking(engine, proxy)
    logprobs = await where.logprobs(before.sampler_path, [*PROMPT, 20, 21], 2)
    await asyncio.to_thread(RestClient(base_url=proxy.url, api_key=engine.key).delete_checkpoint_from_tinker_path(before.sampler_path).result)
    one.soon()
    report = await one.trainer.run_once()
    assert report.problems == ()
    after = journal.version(one.store, 2)
    assert after.sampler_path not in (None, before.sampler_path)
    assert journal.in_force(one.store).working == 2
    await one.trainer.run_once()
    assert [served.sampler_path for served in read_route(one.home).served if served.version == 2] == [after.sampler_path]
    again = await where.logprobs(after.sampler_path, [*PROMPT, 20, 21], 2)
    assert np.abs(again - logprobs).max() < 1e-6
    await where.aclose()
    await one.trainer.aclose()
