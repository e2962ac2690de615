import sqlite3
import threading
import time
from contextlib import closing
from dataclasses import replace

import pytest

from metaclaw_core.model import Exchange, Hints
from metaclaw_core.proxy.sessions import Sessions, SessionState
from metaclaw_core.proxy.spool import Spool
from metaclaw_core.store.spool import SpoolReader, SpoolWriter

EXCHANGE = Exchange(
    flow_id="f",
    dialect="openai_chat",
    method="POST",
    scheme="http",
    host="llm.test",
    port=80,
    path="/v1/chat/completions",
    started_at=1.0,
    duration_ms=2.0,
    principal="p",
    hints=Hints(),
    request_body=b"{}",
    request_encoding="",
    status_code=200,
    response_body=b"{}",
    response_encoding="",
    response_type="application/json",
    complete=True,
    error=None,
    live=True,
)


@pytest.fixture
def spool(tmp_path):
    opened = Spool(tmp_path / "spool" / "1.db", tmp_path / "sessions.db")
    yield opened
    opened.close()


def ids(path) -> list[str]:
    with SpoolReader(path) as reader:
        return [exchange.flow_id for _, exchange in reader.batch(1000)]


def test_what_was_put_is_on_disk_after_a_flush_in_order(spool):
    for n in range(300):  # more than a group
        spool.put(replace(EXCHANGE, flow_id=f"f{n}"))
    assert spool.flush()
    assert ids(spool.path) == [f"f{n}" for n in range(300)]
    assert (spool.queued, spool.written, spool.dropped, spool.last_error) == (0, 300, 0, None)


def test_an_exchange_is_on_disk_within_100_ms_without_a_flush(spool):
    assert spool.flush()
    spool.put(EXCHANGE)
    deadline = time.monotonic() + 5
    while spool.written == 0 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert ids(spool.path) == ["f"]


def test_close_writes_the_rest_and_gives_the_file_up(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    spool = Spool(folder / "1.db", folder / "sessions.db")
    spool.put(EXCHANGE)
    Sessions().put("k", SessionState("s", None), spool)
    spool.close()
    assert ids(spool.path) == ["f"]
    SpoolWriter(spool.path).close()  # nobody holds it any more
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o600"}


def test_the_last_state_of_a_session_counts(spool, tmp_path):
    for n in range(100):
        Sessions().put("k", SessionState("s", None, messages=n), spool)
    assert spool.flush()
    with closing(sqlite3.connect(tmp_path / "sessions.db")) as db:
        assert db.execute("SELECT key, json_extract(value, '$.messages') FROM sessions").fetchall() == [("k", 99)]


def test_sessions_that_can_not_be_written_hold_up_no_exchange_and_bring_none_twice(tmp_path):
    (tmp_path / "sessions.db").mkdir()
    spool = Spool(tmp_path / "1.db", tmp_path / "sessions.db")
    Sessions().put("k", SessionState("s", None), spool)
    for n in range(3):
        spool.put(replace(EXCHANGE, flow_id=f"f{n}"))
        spool.flush(0.3)
    assert ids(spool.path) == ["f0", "f1", "f2"]
    assert "sessions.db can't be written" in (spool.last_error or "")
    (tmp_path / "sessions.db").rmdir()
    assert spool.flush(10)
    assert spool.last_error is None
    spool.close()


def test_a_session_that_can_not_be_written_down_is_given_up_alone(spool, tmp_path, caplog):
    Sessions().put("bad", SessionState("s", None, scores=[object()]), spool)
    Sessions().put("good", SessionState("s", None), spool)
    assert spool.flush()
    with closing(sqlite3.connect(tmp_path / "sessions.db")) as db:
        assert db.execute("SELECT key FROM sessions").fetchall() == [("good",)]
    assert caplog.text.count("the state of a session can't be kept (Object of type object is not JSON serializable)") == 1
    spool.put(EXCHANGE)
    assert spool.flush()
    assert ids(spool.path) == ["f"]


def test_memory_is_bounded_while_the_disk_refuses_and_the_newest_are_dropped(tmp_path, caplog):
    (tmp_path / "spool").touch()
    spool = Spool(tmp_path / "spool" / "1.db", tmp_path / "sessions.db", max_bytes=100_000)
    for n in range(40):
        spool.put(replace(EXCHANGE, flow_id=f"f{n}", request_body=b"x" * 8000))
    assert spool.dropped == 31
    assert caplog.text.count("are being dropped") == 1
    (tmp_path / "spool").unlink()
    assert spool.flush(10)
    assert ids(spool.path) == [f"f{n}" for n in range(9)]
    spool.close()


def test_one_exchange_is_kept_however_large_it_is(tmp_path):
    spool = Spool(tmp_path / "1.db", tmp_path / "sessions.db", max_bytes=10)
    spool.put(EXCHANGE)
    assert spool.flush()
    assert spool.dropped == 0
    spool.close()


def test_a_row_that_sqlite_refuses_is_dropped_alone(spool, caplog):
    bad = replace(EXCHANGE, flow_id="bad", request_body="no bytes at all")  # type: ignore[arg-type]
    for exchange in (EXCHANGE, bad, replace(EXCHANGE, flow_id="g")):
        spool.put(exchange)
    assert spool.flush()
    assert [i for i in ids(spool.path) if i != "bad"] == ["f", "g"]
    assert spool.queued == 0


def test_closing_while_the_disk_refuses_does_not_hang_and_says_what_is_lost(tmp_path, caplog):
    (tmp_path / "spool").touch()
    spool = Spool(tmp_path / "spool" / "1.db", tmp_path / "sessions.db")
    spool.put(EXCHANGE)
    began = time.monotonic()
    spool.close()
    assert time.monotonic() - began < 3
    assert "1 exchanges could not be written" in caplog.text


def test_many_threads_may_put(spool):
    def work(who: int) -> None:
        for n in range(50):
            spool.put(replace(EXCHANGE, flow_id=f"{who}-{n}"))

    threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert spool.flush()
    assert len(set(ids(spool.path))) == 200


def test_a_spool_that_was_removed_is_made_anew(spool):
    spool.put(EXCHANGE)
    assert spool.flush()
    for file in spool.path.parent.iterdir():
        file.unlink()
    spool.put(replace(EXCHANGE, flow_id="g"))
    assert spool.flush()
    assert ids(spool.path) == ["g"]
