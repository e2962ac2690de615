"""From spool to store: exactly once, whatever is interrupted."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text

from metaclaw_core.errors import StoreError
from metaclaw_core.store import samplefile
from metaclaw_core.store.drain import DrainReport, drain_samples, drain_spool, drain_spools, drain_under_lease
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.samplefile import Sample, SampleFile
from metaclaw_core.store.spool import SpoolReader, SpoolWriter
from metaclaw_core.store.tables import samples


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


# --- samples --------------------------------------------------------------------------------------


def a_sample(flow_id: str) -> Sample:
    return Sample(
        flow_id=flow_id,
        created_at=1_790_000_000.5,
        base_model="tiny",
        tokenizer="f00d",
        version=3,
        checkpoint="tinker://w/3",
        klass="A",
        klass_reason=None,
        sampling={"temperature": 1.0},
        prompt_ids=(1, 2, 70_000),
        tokens=(7, 8),
        logprobs=(-0.5, -1.25),
        reused=2,
        segments=1,
        stop_reason="stop",
        malformed=False,
        redacted=False,
    )


def in_store(store: Store) -> list[Any]:
    with store.reading() as connection:
        return list(connection.execute(select(samples).order_by(samples.c.id)))


def test_samples_come_into_the_store_with_their_turns_and_leave_the_policys_file(store: Store, folder: Path, chat: Any) -> None:
    path = folder.parent / "run" / samplefile.FILE
    with SpoolWriter(folder / "1.db") as writer, SampleFile(path) as file:
        writer.append([replace(chat("one"), flow_id="f1", version=3), chat("two")])
        for number in range(70):
            file.keep("s", a_sample(f"f{number}"))
        report = drain_spools(store, folder)
        assert (report.stored, report.samples, report.problems) == (2, 70, ())
        assert samplefile.pending(path) == []
        file.keep("s", a_sample("f0"))  # the same flow again
        assert drain_spools(store, folder).samples == 0
        assert samplefile.pending(path) == []
    assert [turn["version"] for turn in store.turns()] == [3, None]
    rows = in_store(store)
    assert len(rows) == 70
    assert rows[1].flow_id == "f1"
    assert samplefile.unpack_ids(rows[1].prompt_ids).tolist() == [1, 2, 70_000]
    assert samplefile.unpack_logprobs(rows[1].logprobs).tolist() == [-0.5, -1.25]


def test_a_crash_before_samples_are_removed_adds_none_twice(store: Store, folder: Path) -> None:
    path = folder.parent / "run" / samplefile.FILE
    with SampleFile(path) as file:
        file.keep("s", a_sample("f1"))
        waiting = samplefile.pending(path)
        drain_samples(store, path)
        file.keep("s", a_sample("f1"))  # as if it had not been removed
        assert [row["flow_id"] for _, row in waiting] == ["f1"]
        assert drain_samples(store, path) == DrainReport()
    assert len(in_store(store)) == 1


def test_samples_without_a_spool_are_taken_in(store: Store, folder: Path) -> None:
    with SampleFile(folder.parent / "run" / samplefile.FILE) as file:
        file.keep("s", a_sample("f1"))
    assert drain_under_lease(store, folder).samples == 1


def test_a_damaged_file_of_samples_is_reported_and_holds_up_no_spool(store: Store, folder: Path, chat: Any) -> None:
    path = folder.parent / "run" / samplefile.FILE
    path.parent.mkdir()
    path.write_bytes(b"no database" * 100)
    with SpoolWriter(folder / "1.db") as writer:
        writer.append([chat("one")])
    report = drain_spools(store, folder)
    assert report.stored == 1
    assert "policy.db" in report.problems[0]
