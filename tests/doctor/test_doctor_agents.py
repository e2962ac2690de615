"""Which agents go past the proxy: by their environment, and by OpenClaw's own record."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from metaclaw_core.doctor import agents
from metaclaw_core.doctor.agents import Activity, Process, check_activity, check_process, is_openclaw
from metaclaw_core.doctor.runtime import Probe

URL = "http://127.0.0.1:30000"
CA = {"NODE_EXTRA_CA_CERTS": "/x/ca.pem"}


@pytest.mark.parametrize(
    ("environment", "config", "probe", "status", "part"),
    [
        ({"HTTPS_PROXY": URL, **CA}, None, Probe(ok=True), "ok", "uses the proxy and trusts its CA"),
        ({"OPENCLAW_PROXY_URL": URL, **CA}, None, None, "ok", "uses the proxy"),
        (CA, URL, Probe(ok=True), "ok", "uses the proxy and trusts its CA"),
        ({"HTTPS_PROXY": URL, "NODE_USE_SYSTEM_CA": "1"}, None, None, "ok", "the system's CAs"),
        (CA, None, None, "fail", "goes past the proxy: it has no proxy variable"),
        ({"HTTPS_PROXY": "http://me:secret@corp:3128", **CA}, None, None, "fail", "uses another proxy (http://***@corp:3128)"),
        ({"HTTPS_PROXY": "http://127.0.0.1:1", **CA}, None, None, "fail", "uses another proxy (http://127.0.0.1:1)"),
        ({"HTTPS_PROXY": URL}, None, None, "fail", "does not trust its CA (no NODE_EXTRA_CA_CERTS)"),
        ({"HTTPS_PROXY": URL, **CA}, None, Probe(ok=False, problem="self-signed", untrusted=True), "fail", "with /x/ca.pem: self-signed"),
    ],
)
def test_what_the_environment_of_a_process_says(environment, config, probe, status, part):
    check = check_process(Process(7, "openclaw-gateway", environment), [30000], config, probe)
    assert check.status == status
    assert check.what.startswith("openclaw-gateway (pid 7) ")
    assert part in check.what
    assert "secret" not in check.what
    assert bool(check.remedy) == (status != "ok")


@pytest.mark.parametrize(
    ("comm", "words", "expected"),
    [
        ("openclaw-gatewa", ["openclaw-gateway"], True),
        ("openclaw", ["openclaw"], True),
        ("node", ["node", "/opt/node_modules/openclaw/openclaw.mjs", "gateway"], True),
        ("node", ["node", "/home/me/.npm/bin/openclaw", "agent"], True),
        ("node", ["node", "/opt/node_modules/openclaw/dist/entry.js"], True),
        ("vim", ["vim", "openclaw.json"], False),
        ("grep", ["grep", "-r", "openclaw"], False),
        ("node", ["node", "/srv/openclaw-notes.js"], False),
        ("kworker", [""], False),
    ],
)
def test_which_processes_are_openclaw(comm, words, expected):
    assert is_openclaw(comm, words) is expected


def test_processes_of_another_home_are_not_ours_to_judge(tmp_path):
    for pid, home in (("11", "/home/me"), ("12", "/home/you")):
        folder = tmp_path / pid
        folder.mkdir()
        (folder / "cmdline").write_bytes(b"openclaw-gateway\0")
        (folder / "comm").write_text("openclaw-gatewa\n")
        (folder / "environ").write_bytes(f"HOME={home}\0HTTPS_PROXY={URL}\0".encode())
    found = agents.openclaw_processes("/home/me", tmp_path)
    assert [(process.pid, process.name, process.proxy) for process in found] == [(11, "openclaw-gateway", URL)]


def test_a_session_that_was_not_recorded_went_past_the_proxy():
    activity = [Activity("s1", "agent:main:main", 1000.0), Activity("s2", "agent:main:x", 900.0)]
    check = check_activity(activity, {"s2": 890.0}, now=1100.0)
    assert check.status == "warn"
    assert check.what == "A session goes past the proxy: OpenClaw worked on agent:main:main (s1), but nothing of it was recorded."


def test_a_session_whose_later_turns_are_missing_is_noticed_too():
    check = check_activity([Activity("s1", "k", 1000.0)], {"s1": 500.0}, now=1100.0)
    assert check.what.endswith("but its last turn was not recorded.")


def test_a_session_that_is_just_being_recorded_is_left_alone():
    assert check_activity([Activity("s1", "k", 1000.0)], {}, now=1005.0).status == "ok"
    assert check_activity([Activity("s1", "k", 1000.0)], {"s1": 890.0}, now=1100.0).status == "ok"
    assert check_activity([], {}, now=1.0).what == "OpenClaw had no session lately"


def record(path: Path, rows: list[tuple[str, str, int | None]]) -> None:
    path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE session_windows (session_id TEXT, session_key TEXT, transcript_updated_at INTEGER)")
        database.executemany("INSERT INTO session_windows VALUES (?, ?, ?)", rows)


def test_openclaws_own_record_is_read_without_a_trace(tmp_path):
    folder = tmp_path / "agents" / "main" / "agent"
    record(folder / "openclaw-agent.sqlite", [("s1", "k1", 1_795_595_141_722), ("old", "k", 5), ("never", "k", None)])
    record(tmp_path / "agents" / "b" / "agent" / "openclaw-agent.sqlite", [])
    (tmp_path / "agents" / "c" / "agent").mkdir(parents=True)
    (tmp_path / "agents" / "c" / "agent" / "openclaw-agent.sqlite").write_bytes(b"of another version")
    assert agents.openclaw_activity(tmp_path, 1000.0) == [Activity("s1", "k1", 1_795_595_141.722)]
    assert [path.name for path in folder.iterdir()] == ["openclaw-agent.sqlite"]
