"""A clock that was ahead for a while must not hold up work until the day it said."""

from __future__ import annotations

from pathlib import Path

import pytest

from metaclaw_core.store.db import open_engine
from metaclaw_core.store.rollouts import Store

DAY = 86_400.0


def test_a_lease_that_was_taken_while_the_clock_was_a_day_ahead_holds_up_nobody(tmp_path: Path) -> None:
    now = [1_000_000.0]
    store = Store(open_engine(tmp_path / "store.db"), clock=lambda: now[0])
    now[0] += DAY
    assert store.acquire_lease("ingest", "killed", 60)
    assert not store.acquire_lease("ingest", "other", 60)
    now[0] -= DAY
    assert store.acquire_lease("ingest", "other", 60)
    assert not store.acquire_lease("ingest", "third", 60)
    store.close()


def test_clocks_of_two_machines_that_are_seconds_apart_change_nothing(tmp_path: Path) -> None:
    now = [1_000_000.0]
    store = Store(open_engine(tmp_path / "store.db"), clock=lambda: now[0])
    now[0] += 30
    assert store.acquire_lease("ingest", "ahead", 60)
    now[0] -= 30
    assert not store.acquire_lease("ingest", "behind", 60)
    store.close()


def test_a_long_lease_is_not_taken_for_a_clock_that_was_ahead(tmp_path: Path) -> None:
    """`metaclaw purge` asks for ten minutes, a drain for one."""
    store = Store(open_engine(tmp_path / "store.db"), clock=lambda: 1_000_000.0)
    assert store.acquire_lease("ingest", "purge", 600)
    assert not store.acquire_lease("ingest", "drain", 60)
    with pytest.raises(ValueError, match="too long"):
        store.acquire_lease("ingest", "purge", 3600)
    store.close()
