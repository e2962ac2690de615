"""A forgotten session is gone from every table and every file; what others need stays whole."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import func, insert, select

from metaclaw_core.errors import StoreError
from metaclaw_core.proxy.sessions import SessionFile
from metaclaw_core.store import purge
from metaclaw_core.store.db import open_store
from metaclaw_core.store.purge import Selection, find
from metaclaw_core.store.sessions import session_row_id
from metaclaw_core.store.spool import SpoolReader, SpoolWriter
from metaclaw_core.store.tables import health, job_runs, metadata, notices, segments, skill_uses, turns, votes

CANARY = "canary-7f3a-Grüße"
PRINCIPAL = "0123456789abcdef0123456789abcdef"
RUNTIME = "\n\nRuntime: agent=main | session=agent:main:main | sessionId={}"


def openclaw(chat, session, text, *, answer="Hello.", **fields):
    """A turn of OpenClaw in a session that it names."""
    system = {"role": "system", "content": "You are a personal assistant running inside OpenClaw.\n## Runtime\nbe kind"}
    user = {"role": "user", "content": f"[Mon 2026-11-23 20:38 UTC] {text}{RUNTIME.format(session)}"}
    return chat(system, user, answer=answer, **fields)


def files_with(folder: Path, *needles: str) -> list[str]:
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and any(needle.encode() in path.read_bytes() or json.dumps(needle)[1:-1].encode() in path.read_bytes() for needle in needles):
            found.append(path.name)
    return sorted(found)


def count(store, table) -> int:
    with store.reading() as connection:
        return connection.scalar(select(func.count()).select_from(table))


def test_every_table_has_its_way_of_forgetting():
    assert set(purge.HOLDS) == set(metadata.tables)


def test_a_session_takes_only_what_nobody_else_needs(store, chat):
    shared = "The same first question"
    gone = chat(shared, answer="One.")
    store.ingest([gone])
    key = next(iter(store.sessions()))["session_id"]
    other = chat(shared, answer="Two.", principal="f" * 32)
    store.ingest([other])
    before = store.verify()
    found = find(store, Selection(session=key))
    report = purge.purge(store, found)
    after = store.verify()
    assert (report.turns, report.sessions, report.problems) == (1, 1, ())
    assert report.messages == 1  # the answer; the question is the other session's too
    assert after.problems == ()
    assert (before.turns - after.turns, before.messages - after.messages) == (1, 1)


def test_an_unknown_session_is_one_sentence(store):
    with pytest.raises(StoreError, match="There is no session nobody: `metaclaw sessions` lists them"):
        find(store, Selection(session="nobody"))


def test_before_a_date_only_what_is_older_goes(store, chat):
    store.ingest([chat("old", started_at=100.0), chat("new", started_at=200.0)])
    report = purge.purge(store, find(store, Selection(before=150.0)))
    assert report.turns == 1
    assert [row["user_text"] for row in store.turns()] == ["new"]
    assert store.verify().problems == ()


def test_everything_leaves_empty_tables(store, chat):
    store.ingest([chat("a"), chat("b", answer="c")])
    with store.transaction() as connection:
        connection.execute(insert(notices).values(name="n", at=1.0, text="x"))
    purge.purge(store, find(store, Selection()))
    kept = {"leases", "counters", "spend", "caller_spend"}
    assert {name: count(store, table) for name, table in metadata.tables.items() if name not in kept and count(store, table)} == {}


def test_what_hangs_on_a_turn_goes_with_it(store, chat):
    store.ingest([chat("a"), chat("b", principal="f" * 32)])
    rows = list(store.turns())
    with store.transaction() as connection:
        for row in rows:
            vote = {"turn": row["id"], "number": 0, "model": "m", "prompt": "p", "started_at": 1.0, "latency_ms": 1.0, "reason": CANARY}
            connection.execute(insert(votes).values(**vote))
            connection.execute(insert(skill_uses).values(skill="s", turn_id=row["turn_id"], session=row["session"], at=1.0))
            segment = {
                "id": row["session"], "session": row["session"], "principal": PRINCIPAL, "first_turn": row["id"], "last_turn": row["id"], "turns": 1,
                "started_at": 1.0, "ended_at": 1.0, "end_reason": "idle", "state": "done", "attempts": 0, "next_try_at": 0.0, "updated_at": 0.0,
            }  # fmt: skip
            connection.execute(insert(segments).values(**segment))
        name = rows[0]["session_id"]
        connection.execute(insert(job_runs).values(name="evolve", started_at=1.0, error=f"session {name} failed"))
        connection.execute(insert(job_runs).values(name="evolve", started_at=1.0, error="the disk is full"))
        connection.execute(insert(health).values(name="x", ok=True, checked_at=1.0, detail={"sessions": [name]}))
    purge.purge(store, find(store, Selection(session=name)))
    assert {table.name: count(store, table) for table in (votes, skill_uses, segments, job_runs, health)} == {
        "votes": 1,
        "skill_uses": 1,
        "segments": 1,
        "job_runs": 1,
        "health": 0,
    }


def test_no_byte_of_it_is_left_in_any_file(tmp_path, chat):
    """Everything that writes into a home has seen the canary; a reader and a writer have the files open meanwhile."""
    spool_path = tmp_path / "spool" / "1-1.db"
    session, other = "5f0e2a10-1111-4222-8333-444455556666", "5f0e2a10-7777-4222-8333-444455556666"
    long = f"{CANARY} " * 2000  # more than one page, so that it lies in overflow pages too
    with open_store(tmp_path / "store.db") as store, SpoolWriter(spool_path) as writer:
        exchanges = [
            openclaw(chat, session, f"{CANARY} first", answer=long),
            openclaw(chat, other, "something else", answer="fine"),
            openclaw(chat, session, f"{CANARY} second {long}", answer="ok"),
        ]
        writer.append(exchanges)
        with SpoolReader(spool_path) as reader:
            batch = reader.batch(10)
            store.ingest([exchange for _, exchange in batch], redacted=True)
            reader.delete([row_id for row_id, _ in batch])
        writer.append([openclaw(chat, session, f"{CANARY} set aside")])
        with SpoolReader(spool_path) as reader:
            reader.set_aside(reader.batch(1)[0][0], "can't be taken in")
        key = session_row_id(PRINCIPAL, session)
        (tmp_path / "run").mkdir()
        file = SessionFile(tmp_path / "run" / "sessions.db")
        file.write([(key, json.dumps({"session_id": session, "texts": [CANARY]}).encode(), 1.0)])
        file.write([("k", json.dumps({"session_id": other, "texts": ["mine"]}).encode(), 1.0)])
        (tmp_path / "run" / "sessions.db.damaged").write_text(CANARY)
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "worker.log").write_text(f"a {session}: {CANARY}\nb {other}: fine\nc\n")
        assert {row["session_id"] for row in store.sessions()} == {session, other}
        assert files_with(tmp_path, CANARY, session) != []

        found = find(store, Selection(session=session))
        report = purge.purge(store, found)
        problems = [
            *report.problems,
            *purge.purge_spools(tmp_path / "spool", found),
            *purge.purge_session_file(tmp_path / "run" / "sessions.db", found),
            *purge.purge_logs(tmp_path / "logs", found),
        ]
        assert problems == []
        assert files_with(tmp_path, CANARY, "canary-7f3a", session, key) == []
        assert [row["session_id"] for row in store.turns()] == [other]
        assert store.verify().problems == ()
        assert (tmp_path / "logs" / "worker.log").read_text() == f"b {other}: fine\nc\n"
        with closing(sqlite3.connect(tmp_path / "run" / "sessions.db")) as database:
            assert database.execute("SELECT key FROM sessions").fetchall() == [("k",)]
        file.close()
        writer.append([openclaw(chat, other, "it goes on")])  # the writer's file is still its own
        with SpoolReader(spool_path) as reader:
            assert reader.counts() == (1, 0)


def test_a_client_that_names_no_session_is_forgotten_by_the_proxy_too(tmp_path, chat):
    with open_store(tmp_path / "store.db") as store:
        store.ingest([chat(CANARY)])
        name = next(iter(store.sessions()))["session_id"]
        (tmp_path / "run").mkdir()
        file = SessionFile(tmp_path / "run" / "sessions.db")
        file.write([("unknown", json.dumps({"session_id": None, "texts": [CANARY]}).encode(), 1.0)])
        file.close()
        found = find(store, Selection(session=name))
        purge.purge(store, found)
        assert purge.purge_session_file(tmp_path / "run" / "sessions.db", found) == []
    assert files_with(tmp_path, CANARY) == []


def test_older_texts_of_a_session_that_goes_on_are_taken_out_of_the_proxys_file(tmp_path, chat):
    with open_store(tmp_path / "store.db") as store:
        session = "5f0e2a10-1111-4222-8333-444455556666"
        store.ingest([openclaw(chat, session, CANARY, started_at=100.0), openclaw(chat, session, "new", started_at=200.0)])
        found = find(store, Selection(before=150.0))
        key = session_row_id(PRINCIPAL, session)
        assert (found.keys, found.touched) == (frozenset(), frozenset({key}))
        (tmp_path / "run").mkdir()
        file = SessionFile(tmp_path / "run" / "sessions.db")
        file.write([(key, json.dumps({"session_id": session, "block": "kept", "texts": [CANARY]}).encode(), 200.0)])
        file.close()
        purge.purge(store, found)
        assert purge.purge_session_file(tmp_path / "run" / "sessions.db", found) == []
    assert files_with(tmp_path, CANARY) == []
    with closing(sqlite3.connect(tmp_path / "run" / "sessions.db")) as database:
        assert json.loads(database.execute("SELECT value FROM sessions").fetchone()[0]) == {"session_id": session, "block": "kept", "texts": []}


def test_subagents_that_worked_for_it_are_named(store, chat):
    first, second = "5f0e2a10-1111-4222-8333-444455556666", "5f0e2a10-7777-4222-8333-444455556666"
    trace = replace(openclaw(chat, first, "a").hints, trace_id="a" * 32)
    store.ingest([openclaw(chat, first, "a", hints=trace), openclaw(chat, second, "b", hints=trace)])
    assert find(store, Selection(session=first)).related == (second,)


def test_a_file_that_can_not_be_read_is_named(tmp_path, store):
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "9-9.db").write_bytes(b"no database at all, but long enough to be one" * 50)
    problems = purge.purge_spools(tmp_path / "spool", find(store, Selection()))
    assert len(problems) == 1
    assert problems[0].startswith(f"{tmp_path / 'spool' / '9-9.db'} can't be read (file is not a database)")


def test_turn_rows_are_chosen_by_either_name_of_a_session(store, chat):
    store.ingest([chat("a")])
    row = next(iter(store.sessions()))
    assert find(store, Selection(session=row["id"])).keys == find(store, Selection(session=row["session_id"])).keys == {row["id"]}
    assert count(store, turns) == 1
