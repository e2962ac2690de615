"""From spool to store: exactly once, whatever is interrupted."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from metaclaw_core.errors import StoreError
from metaclaw_core.store.drain import drain_spool, drain_spools
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.spool import SpoolReader, SpoolWriter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def test_all_spools_are_taken_in_and_dead_ones_removed(store: Store, folder: Path, chat: Any) -> None:
    with SpoolWriter(folder / "1.db") as dead:
        dead.append([chat("one"), chat("two")])
    with SpoolWriter(folder / "2.db") as living:
        living.append([chat("three", status_code=500)])
        report = drain_spools(store, folder)
        assert (report.stored, report.skipped, report.duplicates, report.removed, report.problems) == (3, 1, 0, 1, ())
        assert [row["user_text"] for row in store.turns()] == ["one", "two", "three"]
        assert sorted(p.name for p in folder.glob("*.db")) == ["2.db"]
        living.append([chat("four")])
        assert drain_spools(store, folder).stored == 1


def test_a_folder_that_does_not_exist_holds_nothing(store: Store, folder: Path) -> None:
    assert drain_spools(store, folder).stored == 0


def test_a_crash_between_commit_and_deletion_adds_nothing_twice(store: Store, folder: Path, chat: Any) -> None:
    with SpoolWriter(folder / "1.db") as writer:
        writer.append([chat("one"), chat("two")])
        with SpoolReader(folder / "1.db") as reader:
            store.ingest([exchange for _, exchange in reader.batch(1)], redacted=True)  # and here the worker dies
        report = drain_spool(store, folder / "1.db")
    assert (report.stored, report.duplicates) == (1, 1)
    assert len(list(store.turns())) == 2


def test_a_store_that_fails_leaves_the_spool_as_it_was(store: Store, folder: Path, chat: Any) -> None:
    with SpoolWriter(folder / "1.db") as writer:
        writer.append([chat("one")])
    with store.transaction() as connection:
        connection.execute(text("ALTER TABLE messages RENAME TO gone"))
    with pytest.raises(StoreError):
        drain_spools(store, folder)
    with SpoolReader(folder / "1.db") as reader:
        assert reader.counts() == (1, 0)


def test_a_row_that_cannot_be_taken_in_is_set_aside_and_reported(store: Store, folder: Path, chat: Any) -> None:
    with SpoolWriter(folder / "1.db") as writer:
        writer.append([chat("one"), chat("two", port=10**30), chat("three")])
    report = drain_spools(store, folder)
    assert report.stored == 2
    assert report.problems == (f"1 rows of {folder / '1.db'} can't be taken in; they stay there.",)
    assert (folder / "1.db").exists()
    assert drain_spools(store, folder).stored == 0


def test_a_damaged_spool_does_not_hold_up_the_others(store: Store, folder: Path, chat: Any) -> None:
    folder.mkdir()
    (folder / "0.db").write_bytes(b"garbage " * 1000)
    with SpoolWriter(folder / "1.db") as writer:
        writer.append([chat("one")])
    report = drain_spools(store, folder)
    assert report.stored == 1
    assert len(report.problems) == 1
    assert "0.db can't be opened: file is not a database" in report.problems[0]


def test_many_exchanges_and_large_ones_go_through_in_batches(store: Store, folder: Path, chat: Any) -> None:
    with SpoolWriter(folder / "1.db") as writer:
        writer.append([chat(f"{i} " + "x" * 400_000) for i in range(70)])
        assert drain_spool(store, folder / "1.db").stored == 70
        with sqlite3.connect(folder / "1.db") as db:
            free = db.execute("PRAGMA freelist_count").fetchone()
        db.close()
    assert free == (0,)
