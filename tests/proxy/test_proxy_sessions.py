import json
import sqlite3
import time
from contextlib import closing

from metaclaw_core.agents.base import Prior
from metaclaw_core.model import Kind
from metaclaw_core.proxy.sessions import MAX_SESSIONS, SessionFile, Sessions, SessionState, row_of, session_key


class Sink:
    def __init__(self):
        self.rows = {}

    def put_session(self, snapshot):
        self.rows[snapshot.key] = row_of(snapshot)


def state(**more):
    return SessionState("s", "k", **more)


def test_the_same_id_under_another_credential_is_another_session():
    assert session_key("p", "s") == session_key("p", "s")
    assert len({session_key("p", "s"), session_key("q", "s"), session_key("p", "t")}) == 3


def test_what_was_written_is_there_after_a_restart(tmp_path):
    sink, sessions = Sink(), Sessions()
    sessions.put("a", state(block="text \ud800", skills=["x"], appends=1, texts=["hello"], turn="t", used_at=5.0), sink)
    file = SessionFile(tmp_path / "sessions.db")
    file.write(list(sink.rows.values()))
    file.close()
    again = Sessions.load(tmp_path / "sessions.db")
    assert again.get("a") == sessions.get("a")
    assert len(again) == 1


def test_a_snapshot_is_the_state_of_its_moment():
    taken, sessions = [], Sessions()

    class Snapshots:
        def put_session(self, snapshot):
            taken.append(snapshot)

    changing = state(block="one", used_at=5.0)
    sessions.put("a", changing, Snapshots())
    changing.block, changing.used_at = "two", 6.0
    key, value, used_at = row_of(taken[0])
    assert (key, json.loads(value)["block"], json.loads(value)["used_at"], used_at) == ("a", "one", 5.0, 5.0)


def test_the_oldest_go_first_in_memory_and_on_disk(tmp_path):
    sink, sessions = Sink(), Sessions()
    for n in range(MAX_SESSIONS + 10):
        sessions.put(f"k{n}", state(used_at=float(n)), sink)
        if n == 5:
            sessions.get("k0")  # used again
    assert len(sessions) == MAX_SESSIONS
    assert sessions.get("k0") is None  # by now it is old again
    assert sessions.get("k10") is not None
    file = SessionFile(tmp_path / "sessions.db")
    file.write(list(sink.rows.values()))
    file.close()
    assert len(Sessions.load(tmp_path / "sessions.db")) == MAX_SESSIONS
    assert Sessions.load(tmp_path / "sessions.db").get("k9") is None


def test_a_missing_or_damaged_file_or_row_gives_no_session_and_no_error(tmp_path):
    assert len(Sessions.load(tmp_path / "nothing.db")) == 0
    path = tmp_path / "sessions.db"
    path.write_bytes(b"junk" * 1000)
    assert len(Sessions.load(path)) == 0
    path.unlink()
    file = SessionFile(path)
    file.write([("a", b"not json", 1.0), ("b", b'{"session_id": 1, "unknown": 2}', 2.0), ("c", b'{"session_id": "s", "session_key": null}', 3.0)])
    file.close()
    sessions = Sessions.load(path)
    assert len(sessions) == 1
    assert sessions.get("c") == SessionState("s", None)


def test_a_damaged_file_is_put_aside_and_one_that_is_locked_is_not(tmp_path):
    path = tmp_path / "sessions.db"
    path.write_bytes(b"junk" * 1000)
    file = SessionFile(path)
    file.write([("a", b"{}", 1.0)])
    file.close()
    assert (tmp_path / "sessions.db.damaged").read_bytes() == b"junk" * 1000
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM sessions").fetchone() == (1,)


def test_a_response_is_remembered_for_its_principal_only():
    sessions, prior = Sessions(), Prior("s", None, Kind.MAIN, "hello", None)
    sessions.remember_response("p", "resp_1", prior)
    assert sessions.prior("p", "resp_1") is prior
    assert sessions.prior("q", "resp_1") is None
    assert sessions.prior("p", None) is None


def test_active_counts_by_last_use():
    sink, sessions = Sink(), Sessions()
    sessions.put("a", state(used_at=time.time()), sink)
    sessions.put("b", state(used_at=time.time() - 1000), sink)
    assert sessions.active(600) == 1
