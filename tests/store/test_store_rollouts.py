"""Turns through the states, claims, leases, listings, verification."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import text

from metaclaw_core.errors import StoreError
from metaclaw_core.model import Hints
from metaclaw_core.store.db import open_engine
from metaclaw_core.store.rollouts import State, Store


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timed(database: str, clock: Clock, chat: Any) -> Iterator[Store]:
    """A store whose time stands still, with five turns of one session."""
    with Store(open_engine(database), clock) as store:
        texts = ["a"]
        for i in range(5):
            store.ingest([chat(*texts, answer=f"answer {i}")])
            texts += [f"answer {i}", f"ask {i}"]
        yield store


def ids(turns: Any) -> list[int]:
    return [turn["id"] for turn in turns]


# --- moves --------------------------------------------------------------------------------------


def test_a_turn_moves_through_the_states(timed: Store) -> None:
    first = ids(timed.turns(limit=1))
    for old, new in (("captured", "scored"), ("scored", "batched"), ("batched", "trained")):
        timed.move(first, old, new)
    [row] = timed.turns(state=State.TRAINED)
    assert (row["id"], row["state"], row["attempts"]) == (first[0], "trained", 0)


def test_a_move_is_all_or_nothing(timed: Store) -> None:
    everything = ids(timed.turns())
    timed.move(everything[:1], "captured", "scored")
    with pytest.raises(StoreError, match="1 of 5 turns are no longer in state captured; none was moved"):
        timed.move(everything, "captured", "scored")
    assert ids(timed.turns(state="scored")) == everything[:1]


def test_moves_that_make_no_sense_are_refused(timed: Store) -> None:
    first = ids(timed.turns(limit=1))
    for old, new in (("captured", "trained"), ("trained", "captured"), ("skipped", "captured"), ("scored", "captured")):
        with pytest.raises(StoreError, match=f"A turn can't move from {old} to {new}"):
            timed.move(first, old, new)
    with pytest.raises(StoreError, match="needs a reason"):
        timed.move(first, "captured", "failed")


def test_a_failure_keeps_its_reason_and_is_counted(timed: Store) -> None:
    first = ids(timed.turns(limit=1))
    timed.move(first, "captured", "failed", "judge: \ud800 time-out")
    timed.move(first, "failed", "captured")
    timed.move(first, "captured", "failed", "again")
    [row] = timed.turns(state="failed")
    assert (row["reason"], row["attempts"]) == ("again", 2)


def test_a_move_can_be_part_of_a_larger_transaction(timed: Store) -> None:
    first = ids(timed.turns(limit=1))
    with timed.transaction() as connection:
        timed.move_in(connection, first, "captured", "scored")
        connection.rollback()
    assert ids(timed.turns(state="scored")) == []
    with timed.transaction() as connection:
        timed.move_in(connection, first, "captured", "scored")
    assert ids(timed.turns(state="scored")) == first


# --- claims -------------------------------------------------------------------------------------


def test_a_claimed_turn_is_nobody_elses_until_the_claim_expires(timed: Store, clock: Clock) -> None:
    everything = ids(timed.turns())
    assert ids(timed.claim("captured", "one", 2, 60)) == everything[:2]
    assert ids(timed.claim("captured", "two", 9, 60)) == everything[2:]
    assert timed.claim("captured", "two", 9, 60) == []
    clock.now += 61
    assert ids(timed.claim("captured", "three", 1, 60)) == everything[:1]


def test_a_move_ends_the_claim_and_can_demand_it(timed: Store, clock: Clock) -> None:
    claimed = ids(timed.claim("captured", "one", 2, 60))
    clock.now += 61
    timed.claim("captured", "two", 1, 60)
    with pytest.raises(StoreError, match="none was moved"):
        timed.move(claimed, "captured", "scored", owner="one")
    timed.move(claimed[1:], "captured", "scored", owner="one")
    [row] = timed.turns(state="scored")
    assert (row["claimed_by"], row["claim_expires_at"]) == (None, None)


def test_a_released_turn_can_be_claimed_again(timed: Store) -> None:
    claimed = ids(timed.claim("captured", "one", 2, 60))
    assert timed.release(claimed, "two") == 0
    assert timed.release(claimed, "one") == 2
    assert ids(timed.claim("captured", "two", 2, 60)) == claimed


def test_workers_that_claim_at_once_share_nothing(timed: Store) -> None:
    claimed: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda name=str(n): claimed.append(ids(timed.claim("captured", name, 2, 60))))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    flat = [turn for some in claimed for turn in some]
    assert len(flat) == len(set(flat))
    assert set(flat) <= set(ids(timed.turns()))


# --- leases -------------------------------------------------------------------------------------


def test_a_lease_has_one_holder_until_it_expires(timed: Store, clock: Clock) -> None:
    assert timed.acquire_lease("worker", "one", 30)
    assert not timed.acquire_lease("worker", "two", 30)
    assert timed.acquire_lease("worker", "one", 30)
    clock.now += 20
    assert timed.renew_lease("worker", "one", 30)
    clock.now += 20
    assert not timed.acquire_lease("worker", "two", 30)
    clock.now += 11
    assert timed.acquire_lease("worker", "two", 30)
    assert not timed.renew_lease("worker", "one", 30)
    timed.release_lease("worker", "one")
    assert not timed.acquire_lease("worker", "three", 30)
    timed.release_lease("worker", "two")
    assert timed.acquire_lease("worker", "three", 30)


def test_an_expired_lease_cannot_be_renewed(timed: Store, clock: Clock) -> None:
    timed.acquire_lease("worker", "one", 30)
    clock.now += 31
    assert not timed.renew_lease("worker", "one", 30)


# --- listings -----------------------------------------------------------------------------------


def test_turns_come_oldest_first_and_a_limit_keeps_the_newest(timed: Store) -> None:
    assert [row["assistant_text"] for row in timed.turns()] == [f"answer {i}" for i in range(5)]
    assert [row["assistant_text"] for row in timed.turns(limit=2)] == ["answer 3", "answer 4"]


def test_turns_are_filtered(timed: Store, chat: Any) -> None:
    timed.ingest([chat("x", principal="other", status_code=500)])
    last = list(timed.turns())[-1]
    assert ids(timed.turns(principal="other")) == [last["id"]]
    assert ids(timed.turns(session=last["session_id"])) == [last["id"]]
    assert ids(timed.turns(session=last["session"])) == [last["id"]]
    assert ids(timed.turns(turn_id=last["turn_id"])) == [last["id"]]
    assert ids(timed.turns(state="skipped", kind="main", since=last["started_at"])) == [last["id"]]
    assert ids(timed.turns(session="nobody")) == []


def test_a_session_is_found_by_a_name_that_no_column_takes_as_it_is(store: Store, chat: Any) -> None:
    names = ["s" * 300, "nul \x00 and lone \ud800"]
    system = {"role": "system", "content": "<!-- openclaw:attempt:STABLE -->"}
    hi = {"role": "user", "content": "[Mon 2026-11-23 20:38 UTC] hi"}
    store.ingest([chat(system, hi, hints=Hints(session_id=name)) for name in names])
    assert [len(list(store.turns(session=name))) for name in (*names, "s" * 299)] == [1, 1, 0]


def test_more_turns_than_a_page_all_come(store: Store, chat: Any) -> None:
    store.ingest([chat(f"q{i}", started_at=1e9 + i // 7) for i in range(1203)])
    assert [row["user_text"] for row in store.turns()] == [f"q{i}" for i in range(1203)]
    assert len(list(store.turns(limit=600))) == 600


def test_the_store_can_be_changed_while_it_is_listed(timed: Store) -> None:
    for row in timed.turns():
        timed.move([row["id"]], "captured", "scored")
    assert len(ids(timed.turns(state="scored"))) == 5


def test_a_session_is_listed_with_its_times_and_kinds(timed: Store) -> None:
    [session] = timed.sessions()
    expected = {
        "generated": True,
        "session_key": None,
        "agent": "generic",
        "first_at": 1_795_466_304.25,
        "last_at": 1_795_466_308.25,
        "turns": 5,
        "kinds": {"main": 5},
    }
    assert {name: session[name] for name in expected} == expected
    assert list(timed.sessions(principal="nobody")) == []


# --- verification -------------------------------------------------------------------------------


def broken(store: Store, statement: str) -> tuple[str, ...]:
    with store.transaction() as connection:
        connection.execute(text(statement))
    return store.verify().problems


def test_a_sound_store_has_no_problems(timed: Store) -> None:
    report = timed.verify()
    assert (report.messages, report.turns, report.problems) == (10, 5, ())


def test_changed_content_is_found(timed: Store) -> None:
    [problem] = broken(timed, "UPDATE messages SET role = 'system' WHERE parent IS NULL")
    assert "has content that hashes to v1:" in problem


def test_a_missing_parent_is_found_and_the_conversation_says_so(timed: Store) -> None:
    row = list(timed.turns())[-1]
    problems = broken(timed, "DELETE FROM messages WHERE parent IS NULL")
    assert any("which is missing" in problem for problem in problems)
    assert any("its prompt_tip" in problem for problem in problems)
    with pytest.raises(StoreError, match="has a gap"):
        timed.conversation(row["prompt_tip"])


def test_damaged_content_is_named_and_does_not_stop_the_rest(timed: Store) -> None:
    value = "'\\x7b7b'" if timed.engine.dialect.name == "postgresql" else "x'7b7b'"
    problems = broken(timed, f"UPDATE messages SET content = {value} WHERE parent IS NULL")
    assert len(problems) == 1
    assert "can't be read" in problems[0]


def test_of_many_problems_a_hundred_are_told_and_all_are_counted(timed: Store) -> None:
    rows = [{"id": f"v1:{n:064x}", "parent": f"v1:{n + 1:064x}", "role": "user", "content": b"?"} for n in range(150)]
    with timed.transaction() as connection:
        connection.execute(text("INSERT INTO messages (id, parent, role, content) VALUES (:id, :parent, :role, :content)"), rows)
    report = timed.verify()
    assert len(report.problems) == 100
    assert report.found == 151  # each of them unreadable, and the last one's parent is missing


def test_a_missing_blob_is_found(store: Store, chat: Any) -> None:
    store.ingest([chat("hi", body={"tools": [{"type": "function", "function": {"name": "f"}}]})])
    [problem] = broken(store, "DELETE FROM blobs")
    assert "its tools" in problem


def test_a_store_that_is_gone_is_a_typed_error(timed: Store) -> None:
    with timed.transaction() as connection:
        connection.execute(text("ALTER TABLE turns RENAME TO gone"))
    calls: list[Callable[[], Any]] = [
        lambda: list(timed.turns()),
        lambda: timed.claim("captured", "a", 1, 1),
        timed.verify,
    ]
    for call in calls:
        with pytest.raises(StoreError, match="can't be used"):
            call()
