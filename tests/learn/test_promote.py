"""The gate on a store: which sessions count for what, and what moves."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from metaclaw_core.learn import journal
from metaclaw_core.learn.journal import Trained
from metaclaw_core.learn.promote import GateReport, line_of, look
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import samples, sessions, turns

TURN = {
    "principal": "p", "kind": "main", "dialect": "openai_chat", "scheme": "http", "host": "h", "port": 80, "path": "/",
    "redacted": False, "retry": False, "attempts": 0, "live": True, "state": "scored",
}  # fmt: skip
SAMPLE = {
    "created_at": 1.0, "base_model": "m", "tokenizer": "t", "klass": "A", "sampling": {}, "prompt_length": 1, "length": 1,
    "reused": 0, "segments": 1, "stop_reason": "stop", "redacted": False,
}  # fmt: skip


class Traffic:
    def __init__(self, store: Store) -> None:
        self.store, self.n = store, 0

    def answer(self, session: str, version: int, reward: float | None, *, at: float | None = None, malformed: bool = False) -> int:
        self.n += 1
        at = time.time() if at is None else at
        with self.store.transaction() as db:
            if db.scalar(select(sessions.c.id).where(sessions.c.id == session)) is None:
                row = {"id": session, "principal": "p", "session_id": session, "generated": False, "agent": "openclaw", "first_at": at, "last_at": at}
                db.execute(insert(sessions).values(row))
            row = TURN | {"flow_id": f"f{self.n}", "content_key": f"k{self.n}", "session": session, "version": version, "reward": reward, "started_at": at}
            turn = int(db.execute(insert(turns).values(row).returning(turns.c.id)).scalar_one())
            db.execute(insert(samples).values(SAMPLE | {"flow_id": f"f{self.n}", "version": version, "malformed": malformed}))
        return turn

    def step(self, base: int) -> int:
        turn = self.answer("training", base, None)
        step = journal.claim(self.store, [turn], base_version=base, algorithm="single")
        version = journal.saved(self.store, step, f"s{step}", [Trained(turn, None)], {}, {})
        journal.published(self.store, step, f"w{step}", None)
        journal.routed(self.store, step, {}, f"step {step}")
        return version


@pytest.fixture
def traffic(tmp_path: Path):
    with open_store(tmp_path / "store.db") as store:
        journal.begin(store, "m")
        yield Traffic(store)


def test_sessions_count_once_for_the_version_that_answered_most(traffic: Traffic):
    store = traffic.store
    traffic.answer("old", 1, 1.0)
    traffic.answer("old", 1, 0.0)
    assert traffic.step(1) == 2
    traffic.answer("control", 1, 1.0)
    traffic.answer("a", 2, 1.0)
    traffic.answer("b", 2, 0.0)
    traffic.answer("b", 2, None)  # not scored says nothing
    assert traffic.step(2) == 3
    traffic.answer("a", 3, 0.0)
    traffic.answer("a", 3, 0.5)
    traffic.answer("c", 3, 1.0, malformed=True)  # worth nothing, whatever the judge said
    line = line_of(store, journal.in_force(store), 1)
    assert (line.history, line.control, line.working) == ((0.5,), (1.0,), ((2, (0.0,)), (3, (0.5, 0.0))))


def test_where_working_and_stable_are_one_nothing_is_judged(traffic: Traffic):
    assert look(traffic.store) == GateReport("none")


def test_a_drop_from_eight_tenths_to_two_is_taken_back_within_thirty_sessions(traffic: Traffic):
    store, luck = traffic.store, random.Random(5)
    for n in range(60):
        traffic.answer(f"before-{n}", 1, float(luck.random() < 0.8))
    traffic.step(1)
    for n in range(30):
        control = n % 10 == 9
        traffic.answer(f"s{n}", 1 if control else 2, float(luck.random() < (0.8 if control else 0.2)))
        if look(store).verdict == "rollback":
            break
    else:
        pytest.fail("it was not taken back")
    route = journal.in_force(store)
    assert (route.working, route.stable) == (1, 1)
    assert route.reason.startswith("rolled back: the scores fell")
    assert journal.carried(store, "gate")["candidate"] == 2
    assert look(store) == GateReport("none")
    assert journal.latest_trained(store, "m").id == 1


def test_better_weights_become_stable_and_the_count_begins_anew(traffic: Traffic):
    store = traffic.store
    traffic.step(1)
    journal.carry(store, {"gate": {"candidate": 3}})
    for n in range(400):
        traffic.answer(f"s{n}", 1 if n % 3 == 0 else 2, 0.1 if n % 3 == 0 else 0.9)
        if n % 20 == 0 and look(store).verdict == "promote":
            break
    route = journal.in_force(store)
    assert (route.working, route.stable) == (2, 2)
    assert journal.carried(store, "gate")["candidate"] == 1


def test_a_route_that_was_pinned_by_hand_is_left_alone(traffic: Traffic):
    store = traffic.store
    traffic.step(1)
    journal.move_route(store, working=2, stable=1, reason="by hand", pinned=True)
    for n in range(60):
        traffic.answer(f"s{n}", 1 if n % 2 else 2, 1.0 if n % 2 else 0.0)
    assert look(store) == GateReport("none")


def test_the_last_verdict_is_kept_for_the_report(traffic: Traffic):
    store = traffic.store
    traffic.step(1)
    traffic.answer("a", 2, 1.0)
    assert look(store).verdict == "undecided"
    kept = journal.carried(store, "gate")
    assert (kept["verdict"], kept["sessions"], kept["control"], kept["detectable_drop"]) == ("undecided", 1, 0, None)
