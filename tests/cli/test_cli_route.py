"""`metaclaw route`: the versions, a pin, the way back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import insert, update

from metaclaw_core.cli.status import _route_lines
from metaclaw_core.learn import journal
from metaclaw_core.routes import read_route
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import versions


@pytest.fixture
def store(config: Path) -> Iterator[Store]:
    """Version 1 is the base model, 2 and 3 were trained; 3 works, 2 is stable."""
    config.write_text("mode: rl\nrl: {model: base, warmup_turns: 0}\n")
    with open_store(config.parent / "store.db") as store:
        journal.begin(store, "base")
        made = {"base_model": "base", "created_at": time.time(), "status": "candidate"}
        with store.transaction() as db:
            for number in (2, 3):
                db.execute(insert(versions).values(parent=number - 1, state_path=f"t://s/{number}", sampler_path=f"t://w/{number}", **made))
        journal.move_route(store, working=2, stable=2, reason="better")
        journal.move_route(store, working=3, stable=2, reason="step 2")
        yield store


def test_the_versions_are_listed(cli: Callable[..., object], store: Store) -> None:
    shown = cli("route", "list")
    assert "Version 3 answers, version 2 the control share since " in shown.out
    assert ": step 2\n" in shown.out
    found = json.loads(cli("route", "list", "--json").out)
    assert [(version["id"], version["status"]) for version in found["versions"]] == [(3, "working"), (2, "stable"), (1, "retired")]
    assert found["route"]["working"] == 3


def test_a_pin_is_in_the_store_and_in_the_file_that_proxies_read(cli: Callable[..., object], store: Store, config: Path) -> None:
    assert cli("route", "pin", "1").out == "Version 1 answers, version 2 the control share (pinned).\n"
    route = read_route(config.parent)
    assert route is not None
    assert (route.working, route.stable, route.enabled) == (1, 2, True)
    assert {served.version for served in route.served} == {1, 2, 3}  # what began with 3 ends with it
    now = journal.in_force(store)
    assert now is not None
    assert (now.working, now.pinned) == (1, True)
    assert cli("route", "unpin").out == "Version 1 answers, version 2 the control share.\n"


def test_a_rollback_goes_to_the_stable_version_and_then_to_the_one_before(cli: Callable[..., object], store: Store) -> None:
    assert cli("route", "rollback").out == "Version 2 answers.\n"
    assert journal.version(store, 3).status == "retired"
    assert cli("route", "rollback").out == "Version 1 answers.\n"
    now = journal.in_force(store)
    assert now is not None
    assert (now.working, now.stable, now.pinned, now.reason) == (1, 1, False, "rolled back by hand from version 2")


def test_what_cannot_serve_is_refused_with_the_reason(cli: Callable[..., object], store: Store) -> None:
    unknown = cli("route", "pin", "9")
    assert (unknown.code, unknown.err) == (1, "metaclaw: There is no version 9; see `metaclaw route list`.\n")
    with store.transaction() as db:
        db.execute(update(versions).where(versions.c.id == 3).values(expires_at=time.time() - 1))
        db.execute(update(versions).where(versions.c.id == 2).values(sampler_path=None))
    assert "have expired" in cli("route", "pin", "3").err
    assert "never published" in cli("route", "rollback").err


def test_without_a_route_there_is_nothing_to_move(cli: Callable[..., object], config: Path) -> None:
    assert "There is no version yet" in cli("route", "list").out
    assert cli("route", "rollback").err == "metaclaw: There is no route yet: training begins in mode rl, see `metaclaw train status`.\n"


def test_status_says_who_answers_and_why() -> None:
    route = {
        "working": 3, "stable": 2, "generation": 7, "enabled": True, "reason": None, "ready": True,
        "problem": None, "heartbeat_age_s": 0.2, "versions": [2, 3], "breaker": "closed",
    }  # fmt: skip
    counters = {"to the policy server": 12, "the policy server failed: timeout": 2}
    line = "route      version 3, control share on 2 (generation 7); 12 requests sent there, 2 of them not answered"
    assert _route_lines(route, counters) == [line]
    assert _route_lines({**route, "enabled": False, "reason": "warm-up"}, counters)[1] == "           requests go to their own LLM, off: warm-up"
    loading = _route_lines({**route, "ready": False, "problem": "Loading."}, counters)
    assert loading[1] == "           requests go to their own LLM, the policy server is not ready: Loading."
    assert "silent for 9.1 s" in _route_lines({**route, "ready": False, "heartbeat_age_s": 9.1}, counters)[1]
    assert "the breaker is open" in _route_lines({**route, "breaker": "open"}, counters)[1]
    assert _route_lines({**route, "working": None}, {}) == ["route      none yet: requests go to their own LLM"]
