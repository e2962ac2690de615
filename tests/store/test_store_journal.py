"""The trainer's journal on both databases: what each move does, what it refuses, and what a kill in between leaves."""

from __future__ import annotations

import pytest
from sqlalchemy import func, insert, select

from metaclaw_core.errors import StoreError
from metaclaw_core.learn import journal
from metaclaw_core.learn.journal import Trained
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import route_events, step_turns, steps, turns, versions

ROW = {
    "principal": "p", "kind": "main", "dialect": "openai_chat", "scheme": "http", "host": "h", "port": 80, "path": "/",
    "redacted": False, "retry": False, "attempts": 0, "live": True,
}  # fmt: skip


@pytest.fixture
def scored(store: Store) -> list[int]:
    """Six turns that the judge has seen."""
    with store.transaction() as db:
        for n in range(6):
            row = {**ROW, "flow_id": f"f{n}", "content_key": f"k{n}", "state": "scored", "started_at": float(n), "reward": 1.0}
            db.execute(insert(turns).values(row))
        return list(db.scalars(select(turns.c.id).order_by(turns.c.id)))


def states(store: Store) -> dict[int, tuple[str, str | None]]:
    with store.reading() as db:
        return {row.id: (row.state, row.reason) for row in db.execute(select(turns.c.id, turns.c.state, turns.c.reason))}


def count(store: Store, table) -> int:
    with store.reading() as db:
        return int(db.scalar(select(func.count()).select_from(table)))


def statuses(store: Store) -> dict[int, str]:
    with store.reading() as db:
        return dict(tuple(row) for row in db.execute(select(versions.c.id, versions.c.status)))


def test_training_begins_once_with_a_route_to_the_base_model(store: Store):
    first = journal.begin(store, "tiny")
    assert (first.id, first.sampler_path, first.status) == (1, None, "stable")
    assert journal.begin(store, "tiny") == first
    route = journal.in_force(store)
    assert (route.generation, route.working, route.stable, route.reason) == (1, 1, 1, "training begins")


def test_another_base_model_or_another_checkpoint_begins_anew(store: Store):
    journal.begin(store, "tiny")
    other = journal.begin(store, "other")
    assert (other.id, journal.in_force(store).working, statuses(store)) == (2, 2, {1: "retired", 2: "stable"})
    resumed = journal.begin(store, "other", "tinker://r/weights/s", "tinker://r/sampler_weights/s")
    assert (resumed.id, resumed.state_path, journal.in_force(store).reason) == (3, "tinker://r/weights/s", "training goes on from tinker://r/weights/s")
    assert journal.begin(store, "other", "tinker://r/weights/s").id == 3


def test_a_step_goes_from_claim_to_route(store: Store, scored: list[int]):
    journal.begin(store, "tiny")
    step = journal.claim(store, scored[:4], base_version=1, algorithm="single")
    assert [states(store)[turn][0] for turn in scored] == ["batched"] * 4 + ["scored"] * 2
    done = [Trained(turn, None, 1.0, 0.5, 1.0, 0) for turn in scored[:3]] + [Trained(scored[3], "no signal")]
    number = journal.saved(store, step, "tinker://r/weights/1", done, {"kl": 0.001}, {"tracker": {"a": 1}})
    assert number == 2
    assert [states(store)[turn] for turn in scored[:4]] == [("trained", None)] * 3 + [("skipped", "training: no signal")]
    assert journal.carried(store, "tracker") == {"a": 1}
    assert journal.latest_trained(store, "tiny").id == 2
    assert journal.in_force(store).working == 1
    journal.published(store, step, "tinker://r/sampler_weights/1", 99.0)
    route = journal.routed(store, step, {"smoke": 8}, "step 1")
    assert (route.generation, route.working, route.stable) == (2, 2, 1)
    assert statuses(store) == {1: "stable", 2: "working"}
    version = journal.version(store, 2)
    assert (version.parent, version.state_path, version.sampler_path, version.expires_at) == (1, "tinker://r/weights/1", "tinker://r/sampler_weights/1", 99.0)
    assert journal.open_steps(store) == []


def test_an_abandoned_claim_gives_its_turns_back_and_they_can_be_claimed_again(store: Store, scored: list[int]):
    journal.begin(store, "tiny")
    step = journal.claim(store, scored, base_version=1, algorithm="single")
    with pytest.raises(StoreError, match="6 of 6 turns are no longer in state scored"):
        journal.claim(store, scored, base_version=1, algorithm="single")
    assert count(store, steps) == 1
    journal.abandon(store, step, "the server went away")
    assert set(states(store).values()) == {("scored", None)}
    assert journal.latest_trained(store, "tiny").id == 1
    assert journal.claim(store, scored, base_version=1, algorithm="single") == step + 1


def test_a_rejected_version_is_neither_served_nor_trained_on(store: Store, scored: list[int]):
    journal.begin(store, "tiny")
    step = journal.claim(store, scored[:1], base_version=1, algorithm="single")
    journal.saved(store, step, "s", [Trained(scored[0], None)], {}, {})
    journal.published(store, step, "w", None)
    journal.rejected(store, step, {"malformed": 0.9}, "malformed tool calls")
    assert (journal.in_force(store).working, journal.latest_trained(store, "tiny").id) == (1, 1)
    assert statuses(store)[2] == "rejected"


def test_a_route_that_is_pinned_by_hand_is_not_moved_by_a_step(store: Store, scored: list[int]):
    journal.begin(store, "tiny")
    journal.move_route(store, working=1, stable=1, reason="by hand", pinned=True)
    step = journal.claim(store, scored[:1], base_version=1, algorithm="single")
    journal.saved(store, step, "s", [Trained(scored[0], None)], {}, {})
    journal.published(store, step, "w", None)
    assert journal.routed(store, step, {}, "step").working == 1
    assert (statuses(store)[2], journal.latest_trained(store, "tiny").id) == ("candidate", 2)


def test_a_roll_back_lets_training_go_on_from_the_stable_version(store: Store, scored: list[int]):
    journal.begin(store, "tiny")
    for n in range(2):
        step = journal.claim(store, [scored[n]], base_version=n + 1, algorithm="single")
        journal.saved(store, step, f"s{n}", [Trained(scored[n], None)], {}, {})
        journal.published(store, step, f"w{n}", None)
        journal.routed(store, step, {}, f"step {n}")
    assert (journal.in_force(store).working, statuses(store)) == (3, {1: "stable", 2: "retired", 3: "working"})
    journal.move_route(store, working=1, stable=1, reason="harm")
    assert (journal.latest_trained(store, "tiny").id, statuses(store)) == (1, {1: "stable", 2: "retired", 3: "retired"})
    with pytest.raises(StoreError, match="There is no version 9"):
        journal.move_route(store, working=9, stable=1, reason="x")


def test_no_move_can_be_made_twice_or_out_of_turn(store: Store, scored: list[int]):
    journal.begin(store, "tiny")
    step = journal.claim(store, scored[:1], base_version=1, algorithm="single")
    with pytest.raises(StoreError, match="is claimed, not saved"):
        journal.published(store, step, "w", None)
    with pytest.raises(StoreError, match="nothing is said of"):
        journal.saved(store, step, "s", [], {}, {})
    journal.saved(store, step, "s", [Trained(scored[0], None)], {}, {})
    with pytest.raises(StoreError, match="is saved, not claimed"):
        journal.saved(store, step, "s", [Trained(scored[0], None)], {}, {})
    with pytest.raises(StoreError, match="is saved, not claimed"):
        journal.abandon(store, step, "x")
    assert count(store, versions) == 2
    assert [row["state"] for row in journal.open_steps(store)] == ["saved"]


def test_turns_that_were_purged_meanwhile_hold_up_nothing(store: Store, scored: list[int]):
    journal.begin(store, "tiny")
    step = journal.claim(store, scored[:3], base_version=1, algorithm="single")
    with store.transaction() as db:
        db.execute(step_turns.delete().where(step_turns.c.turn == scored[0]))
        db.execute(turns.delete().where(turns.c.id == scored[0]))
    journal.saved(store, step, "s", [Trained(turn, None) for turn in scored[:3]], {}, {})
    assert [states(store)[turn][0] for turn in scored[1:3]] == ["trained"] * 2


def test_what_can_never_be_trained_on_leaves_the_queue_with_its_reason(store: Store, scored: list[int]):
    journal.set_aside(store, {scored[0]: "not class A", scored[1]: "support session"})
    assert states(store)[scored[0]] == ("skipped", "training: not class A")
    assert states(store)[scored[2]] == ("scored", None)


def test_the_route_in_force_is_always_one_row(store: Store):
    journal.begin(store, "tiny")
    for n in range(5):
        journal.move_route(store, working=1, stable=1, reason=str(n))
    with store.reading() as db:
        newest = db.execute(select(route_events).order_by(route_events.c.id.desc()).limit(1)).one()
    assert journal.in_force(store).generation == newest.id == 6
