"""When the worker takes in what lies in the spools: at once where requests pause, every two seconds where they don't."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metaclaw_core.jobs import Intake
from metaclaw_core.store.db import open_store
from metaclaw_core.store.drain import DrainReport, last_written
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.spool import SpoolWriter


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "store.db") as opened:
        yield opened


def written(home: Path, seconds_ago: float) -> None:
    """Make the spools look as if the last request came so long ago."""
    at = time.time() - seconds_ago
    for path in (home / "spool").glob("*.db*"):
        os.utime(path, (at, at))


async def test_what_came_is_taken_in_once_no_more_comes(store: Store, tmp_path: Path, chat: Any) -> None:
    clock = Clock()
    intake = Intake(store, tmp_path, clock=clock)
    with SpoolWriter(tmp_path / "spool" / "1.db") as writer:
        writer.append([chat("one")])
        assert (await intake.look()).stored == 1
        clock.now += 0.5
        writer.append([chat("two")])
        assert await intake.look() == DrainReport()  # it has just come: more may follow
        written(tmp_path, 0.5)
        clock.now += 0.5
        assert (await intake.look()).stored == 1


async def test_however_much_comes_it_is_taken_in_every_two_seconds(store: Store, tmp_path: Path, chat: Any) -> None:
    clock = Clock()
    intake = Intake(store, tmp_path, clock=clock)
    stored = []
    with SpoolWriter(tmp_path / "spool" / "1.db") as writer:
        for number in range(9):
            writer.append([chat(f"message {number}")])
            stored.append((await intake.look()).stored)
            clock.now += 0.5
    assert stored == [1, 0, 0, 0, 4, 0, 0, 0, 4]


async def test_where_nothing_comes_the_store_is_left_alone_for_two_seconds(store: Store, tmp_path: Path, chat: Any) -> None:
    clock = Clock()
    intake = Intake(store, tmp_path, clock=clock)
    with SpoolWriter(tmp_path / "spool" / "1.db") as writer:
        writer.append([chat("one")])
        await intake.look()
        written(tmp_path, 60.0)
        await intake.take_in()
        seen = last_written(tmp_path / "spool")
        clock.now += 1.9
        assert await intake.look() == DrainReport()
        assert last_written(tmp_path / "spool") == seen


async def test_a_clock_that_was_set_back_holds_nothing_up(store: Store, tmp_path: Path, chat: Any) -> None:
    clock = Clock()
    intake = Intake(store, tmp_path, clock=clock)
    with SpoolWriter(tmp_path / "spool" / "1.db") as writer:
        writer.append([chat("one")])
        await intake.look()
        writer.append([chat("two")])
        written(tmp_path, -3600.0)
        clock.now += 0.5
        assert (await intake.look()).stored == 1


async def test_other_work_is_put_off_while_much_comes_and_for_a_minute_at_most(store: Store, tmp_path: Path, chat: Any) -> None:
    clock = Clock()
    intake = Intake(store, tmp_path, clock=clock)
    assert not intake.put_off()
    put_off = []
    with SpoolWriter(tmp_path / "spool" / "1.db") as writer:
        for second in range(0, 70, 10):
            writer.append([chat(f"message {second} {i}") for i in range(50)])
            await intake.take_in()
            put_off.append(intake.put_off())
            clock.now += 10.0
    assert put_off == [True, True, True, True, True, True, True]
    assert not intake.put_off()
    await intake.take_in()  # and nothing came
    assert not intake.put_off()
    assert last_written(tmp_path / "nowhere") is None
