"""The proxy, its worker, the spools and the store, as values and with a damaged database."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from metaclaw_core import __version__
from metaclaw_core.doctor import runtime
from metaclaw_core.doctor.runtime import Probe, SpoolCounts
from metaclaw_core.proxy.control import RunningProxy
from metaclaw_core.proxy.detach import Live
from metaclaw_core.store.db import open_store

WORKER = {"name": "worker", "pid": 5, "restarts": 0, "last_exit": None}


def live(**status) -> Live:
    known = {"listen": ["127.0.0.1:30000"], "version": __version__, "children": [WORKER], "spool": {"dropped": 0, "last_error": None}}
    return Live(RunningProxy(4, Path("/x.sock"), Path("/x.json")), {**known, **status})


@pytest.mark.parametrize(
    ("proxies", "taken", "wired", "status", "begins"),
    [
        ([], False, False, "warn", "No proxy runs."),
        ([], False, True, "fail", "No proxy runs, and a wired agent has no network"),
        ([], True, False, "fail", "Port 30000 is another program's"),
        ([live()], False, True, "ok", "The proxy runs on 127.0.0.1:30000"),
        ([live(listen=["127.0.0.1:30001"])], False, False, "ok", "The proxy runs"),
        ([live(listen=["127.0.0.1:30001"])], False, True, "fail", "The proxy runs on 127.0.0.1:30001 (pid 4), but agents are wired to port 30000"),
        ([live(version="0.0.1")], False, False, "warn", "The proxy on 127.0.0.1:30000 (pid 4) is of version 0.0.1"),
        ([live(bypass=True)], False, False, "warn", "The proxy on 127.0.0.1:30000 (pid 4) lets everything pass"),
        ([live(listen=[])], False, False, "warn", "The proxy (pid 4) listens nowhere"),
        ([Live(RunningProxy(4, Path("/x"), Path("/y")), None)], False, False, "fail", "The proxy (pid 4) does not answer"),
    ],
)
def test_the_proxy(proxies, taken, wired, status, begins):
    check = runtime.check_proxy(proxies, 30000, taken, wired)
    assert (check.status, check.what[: len(begins)]) == (status, begins)
    assert bool(check.remedy) == (status != "ok")


def test_the_worker():
    assert runtime.check_worker([]).status == "ok"
    assert runtime.check_worker([live()]).what == "worker runs (pid 5)"
    assert runtime.check_worker([live(children=[])]).status == "warn"
    assert runtime.check_worker([live(children=[WORKER | {"pid": None, "last_exit": 1, "restarts": 2}])]).what == (
        "The worker does not run (last exit 1, 2 restarts)."
    )
    assert runtime.check_worker([live(children=[WORKER | {"restarts": 9}])]).status == "warn"


def test_the_spool():
    assert runtime.check_spool(SpoolCounts(3, 0), [live()]).what == "3 exchanges wait to be taken in"
    assert runtime.check_spool(SpoolCounts(5000, 0), []).status == "warn"
    assert runtime.check_spool(SpoolCounts(0, 2), []).status == "warn"
    assert runtime.check_spool(SpoolCounts(0, 0, ("The spool x can't be read: y.",)), []).status == "fail"
    assert runtime.check_spool(SpoolCounts(0, 0), [live(spool={"dropped": 4, "last_error": "disk full"})]).what == (
        "4 exchanges were lost because they could not be written (disk full)."
    )
    assert runtime.check_spool(SpoolCounts(0, 0), [live(spool={"dropped": 0, "last_error": "disk full"})]).status == "fail"


def test_the_probe():
    ca = Path("/ca.pem")
    assert runtime.check_probe(None, None, ca).status == "ok"
    assert runtime.check_probe(Probe(ok=True), 1, ca).what == "TLS through 127.0.0.1:1 works with /ca.pem"
    assert runtime.check_probe(Probe(ok=False, problem="self-signed", untrusted=True), 1, ca).what == (
        "The proxy on port 1 does not use the CA in /ca.pem (self-signed)."
    )
    assert runtime.check_probe(Probe(ok=False, problem="refused"), 1, ca).status == "fail"


def test_a_proxy_that_is_not_there_and_a_ca_that_is_not_there(tmp_path):
    assert runtime.handshake("http://127.0.0.1:9", tmp_path / "none.pem").problem.endswith("can't be used: No such file or directory")


def test_a_store_that_is_not_there_is_not_made(tmp_path):
    assert runtime.check_store(tmp_path / "store.db").what == "Nothing has been recorded yet"
    assert not (tmp_path / "store.db").exists()


def test_a_whole_store_and_one_that_somebody_has_changed(tmp_path, exchange):
    path = tmp_path / "store.db"
    with open_store(path) as store:
        store.ingest([exchange])
    assert runtime.check_store(path).what == "The store opens, and its newest 1 messages are what they were"
    assert runtime.check_store(f"sqlite:///{path}").status == "ok"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE messages SET content = ? WHERE role = 'assistant'", (b'{"parts": []}',))
    check = runtime.check_store(path)
    assert (check.status, check.what.startswith("The store is damaged: message v1:")) == ("fail", True)


def test_a_file_that_is_no_store(tmp_path):
    (tmp_path / "store.db").write_bytes(b"x" * 4096)
    check = runtime.check_store(tmp_path / "store.db")
    assert check.what == f"{tmp_path / 'store.db'} can't be read (file is not a database)."


def test_a_store_of_another_version_is_left_as_it_is(tmp_path):
    path = tmp_path / "store.db"
    with open_store(path):
        pass
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM metaclaw_migrations WHERE name = 'm0003_evolve'")
    before = path.read_bytes()
    assert runtime.check_store(path).what == f"{path} is of an older version; the next start brings it up to date"
    assert path.read_bytes() == before
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT INTO metaclaw_migrations VALUES ('m9999_later', 0)")
    assert runtime.check_store(path).status == "fail"
