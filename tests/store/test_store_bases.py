"""Request bodies that are written as differences come back whole, whatever happens to their bases."""

from __future__ import annotations

import logging
import random
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaclaw_core.model import Injection
from metaclaw_core.redact import redact
from metaclaw_core.store.bases import FROM_BYTES, Bases, Delta
from metaclaw_core.store.purge import Found, Selection, purge_spools
from metaclaw_core.store.spool import SpoolReader, SpoolWriter, make_whole

KEY = b"sk-proj-" + b"a1B2" * 8
NOISE = random.Random(1).randbytes(3 * FROM_BYTES).hex().encode()[: 3 * FROM_BYTES]


def body(*texts: str, system: bytes = NOISE) -> bytes:
    """A system prompt, some history, and something behind it."""
    messages = b",".join(b'{"role":"user","content":"%s"}' % text.encode() for text in texts)
    return b'{"model":"m","messages":[{"role":"system","content":"%s"},%s],"tools":["%s"]}' % (system, messages, NOISE[:4000])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool" / "1-1.db"


@pytest.fixture
def of(chat: Any) -> Any:
    """An exchange with a given request body."""
    return lambda data, **fields: replace(chat(), request_body=data, **fields)


def stored(path: Path) -> list[bytes]:
    with SpoolReader(path) as reader:
        return [exchange.request_body for _, exchange in reader.batch(100)]


def bases_of(path: Path) -> list[int]:
    with closing(sqlite3.connect(path)) as db:
        return [row[0] for row in db.execute("SELECT id FROM bases ORDER BY id")]


def test_a_history_is_written_once_and_each_request_comes_back_whole(path: Path, of: Any) -> None:
    bodies = [body(*(f"turn {i} ü" for i in range(n))) for n in range(1, 30)]
    with SpoolWriter(path) as writer:
        for data in bodies:
            writer.append([of(data)])
        assert bases_of(path) == [1]
        with closing(sqlite3.connect(path)) as db:
            written = [row[0] for row in db.execute("SELECT length(request_body) FROM exchanges")]
        assert written[0] == 0
        assert max(written) < 2000
        assert stored(path) == bodies


def test_the_block_that_all_have_is_written_once_and_another_one_with_its_row(path: Path, of: Any) -> None:
    blocks = [Injection("skills " * 100, ("a",), 1, (2.5,)), Injection("skills " * 100, ("a",), 1), Injection("others", ("b",), 2), None]
    with SpoolWriter(path) as writer:
        for n, injection in enumerate(blocks):
            writer.append([of(body("a" * n), injection=injection)])
        with closing(sqlite3.connect(path)) as db:
            heads = [row[0] for row in db.execute("SELECT head FROM exchanges")]
        assert ["skills skills" in head for head in heads] == [False, False, False, False]
        with SpoolReader(path) as reader:
            assert [exchange.injection for _, exchange in reader.batch(9)] == blocks


def test_a_small_body_another_caller_and_an_encoded_body_stand_for_themselves(path: Path, of: Any) -> None:
    exchanges = [of(body("a")), of(body("b"), principal="q" * 32), of(b'{"a":1}'), of(body("c")[:50], request_encoding="")]
    with SpoolWriter(path) as writer:
        writer.append(exchanges)
        assert bases_of(path) == [1, 2]
        assert stored(path) == [e.request_body for e in exchanges]


def test_the_reader_takes_away_a_base_that_no_row_needs_and_the_writer_makes_a_new_one(path: Path, of: Any) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        writer.append([of(body("a")), of(body("a", "b"))])
        reader.delete([1])
        assert bases_of(path) == [1]
        reader.delete([2])
        assert bases_of(path) == []
        writer.append([of(body("a", "b", "c")), of(body("a", "b", "c", "d"))])
        assert bases_of(path) == [2]
        assert stored(path) == [body("a", "b", "c"), body("a", "b", "c", "d")]


def test_a_base_whose_transaction_failed_is_not_relied_on(path: Path, of: Any) -> None:
    with SpoolWriter(path) as writer:
        with closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TRIGGER full BEFORE INSERT ON exchanges BEGIN SELECT RAISE(ABORT, 'no room'); END")
            with pytest.raises(Exception, match="no room"):
                writer.append([of(body("a"))])
            db.execute("DROP TRIGGER full")
        assert bases_of(path) == []
        writer.append([of(body("a"))])
        writer.append([of(body("a", "b"))])
        assert stored(path) == [body("a"), body("a", "b")]
        assert len(bases_of(path)) == 1


def test_a_secret_is_in_no_base_and_in_no_row_and_what_follows_it_is_still_a_difference(path: Path, of: Any) -> None:
    bodies = [body("a"), body("a", KEY.decode()), body("a", KEY.decode(), "b"), body("a", KEY.decode(), "b", "c " + KEY.decode())]
    with SpoolWriter(path) as writer:
        for data in bodies:
            writer.append([of(data)])
        assert bases_of(path) == [1]
        assert KEY not in b"".join(p.read_bytes() for p in path.parent.iterdir())
        assert stored(path) == [redact(data)[0] for data in bodies]
    with SpoolWriter(path.with_name("2.db")) as writer:  # a session that begins with one
        writer.append([of(body(KEY.decode())), of(body(KEY.decode(), "b"))])
        assert stored(path.with_name("2.db")) == [redact(body(KEY.decode()))[0], redact(body(KEY.decode(), "b"))[0]]
        assert bases_of(path.with_name("2.db")) == [1]


def test_a_writer_that_opens_the_file_again_gives_no_base_the_number_of_another(path: Path, of: Any) -> None:
    with SpoolWriter(path) as writer:
        writer.append([of(body("a"))])
    with SpoolWriter(path) as writer:
        writer.append([of(body("a", "b"))])
        assert bases_of(path) == [1, 2]
    assert stored(path) == [body("a"), body("a", "b")]


def test_rows_of_the_format_before_are_read_and_written_on(path: Path, of: Any) -> None:
    with SpoolWriter(path) as writer:
        writer.append([of(b'{"old":1}')])
    with closing(sqlite3.connect(path)) as db:
        db.executescript("ALTER TABLE exchanges DROP COLUMN base; DROP TABLE bases; UPDATE meta SET value = '1' WHERE key = 'format'")
    assert stored(path) == [b'{"old":1}']
    with SpoolReader(path) as reader:
        reader.delete([])
    with closing(sqlite3.connect(path)) as db:
        make_whole(db)
    with SpoolWriter(path) as writer:
        writer.append([of(body("a"))])
    assert stored(path) == [b'{"old":1}', body("a")]


def test_a_row_without_its_base_is_set_aside_and_the_others_are_read(path: Path, of: Any, caplog: pytest.LogCaptureFixture) -> None:
    with SpoolWriter(path) as writer:
        writer.append([of(body("a")), of(b'{"b":1}')])
    with closing(sqlite3.connect(path)) as db:
        db.execute("DELETE FROM bases")
        db.commit()
    with caplog.at_level(logging.CRITICAL), SpoolReader(path) as reader:
        assert [row_id for row_id, _ in reader.batch(9)] == [2]
        assert reader.counts() == (1, 1)


def test_a_purge_leaves_no_base_and_the_rows_that_stay_are_whole(path: Path, of: Any) -> None:
    found = Found(Selection(before=150.0), 1, frozenset(), frozenset(), frozenset(), frozenset(), False, ())
    later = of(body("other"), started_at=200.0, injection=Injection("x", ("a",), 1))
    with SpoolWriter(path) as writer:
        writer.append([of(body("forget me"), started_at=100.0), later])
        assert purge_spools(path.parent, found) == []
        assert bases_of(path) == []
        assert b"forget me" not in b"".join(p.read_bytes() for p in path.parent.iterdir())
        with SpoolReader(path) as reader:
            assert [exchange for _, exchange in reader.batch(9)] == [later]
        writer.append([of(body("other", "more"))])
        assert stored(path) == [body("other"), body("other", "more")]


def test_the_memory_is_bounded_and_what_left_it_becomes_a_new_base() -> None:
    bases = Bases()
    large = b"x" * (3 << 20)
    first = bases.delta(large + b"1", "p", None)[1]
    assert first is not None
    bases.delta(large[::-1] + b"y" * 4000 + b"2", "q", None)
    again = bases.delta(large + b"1", "p", None)[1]
    assert again is not None
    assert again.base.id != first.base.id


PIECES = st.sampled_from([b"x", b"milk", b'","', KEY, b"sk-", b"proj-" + b"a1B2" * 8, b"\\n", b"-----BEGIN RSA PRIVATE KEY-----", b"A" * 300, b""])
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), PIECES), max_size=3)


def whole(delta: Delta, bodies: dict[int, bytes]) -> bytes:
    base = bodies[delta.base.id]
    return base[: delta.prefix] + delta.between + base[len(base) - delta.suffix :]


@settings(max_examples=150, deadline=None)
@given(st.lists(CHANGES, min_size=1, max_size=6))
def test_whatever_changes_the_difference_gives_the_body_that_all_of_it_searched_gives(rounds: list[list[tuple[float, int, bytes]]]) -> None:
    bases, data, bodies = Bases(), body("a", "b"), {}
    for changes in rounds:
        for where, cut, piece in changes:
            at = int(where * len(data))
            data = data[:at] + piece + data[at + cut :]
        clean, delta = bases.delta(data, "p", None)
        bodies |= {base_id: made for base_id, made, _ in bases.unwritten}
        assert clean == redact(data)[0]
        assert delta is not None
        assert whole(delta, bodies) == clean


def test_sessions_that_take_turns_have_a_base_each(path: Path, of: Any) -> None:
    rng = random.Random(2)
    histories = [[rng.randbytes(9000).hex()] for _ in range(8)]
    bodies: list[bytes] = []
    with SpoolWriter(path) as writer:
        for _ in range(5):
            for history in histories:
                history.append(rng.randbytes(400).hex())
                bodies.append(body(*history))
                writer.append([of(bodies[-1])])
        assert bases_of(path) == [1, 2, 3, 4, 5, 6, 7, 8]
        assert stored(path) == bodies
