"""metaclaw doctor, purge and uninstall beside a real proxy: what they notice, and what is left afterwards."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from e2e_tools import environment, free_port

from metaclaw_core.doctor.runtime import handshake
from metaclaw_core.store.db import open_store

TOOL = str(Path(sys.executable).with_name("metaclaw"))
CANARY = "canary-51ab"


def metaclaw(home: Path, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    known = environment(home) | {"PATH": "/usr/bin:/bin"} | extra
    return subprocess.run([TOOL, *words], env=known, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "user" / ".metaclaw"
    folder.mkdir(parents=True, mode=0o700)
    return folder


@pytest.fixture
def proxy(home: Path) -> Iterator[int]:
    """The port of a proxy of this home."""
    port = free_port()
    (home / "config.yaml").write_text(f"proxy:\n  port: {port}\n")
    (home / "config.yaml").chmod(0o600)
    started = metaclaw(home, "start", "--detach")
    assert started.returncode == 0, started.stderr
    try:
        yield port
    finally:
        metaclaw(home, "stop", "--grace", "0")


@contextmanager
def openclaw(home: Path, **variables: str) -> Iterator[int]:
    """A process that is called openclaw-gateway; its pid."""
    tool = home.parent / "openclaw-gateway"
    if not tool.exists():
        shutil.copy(shutil.which("sleep") or "/bin/sleep", tool)
    process = subprocess.Popen([str(tool), "60"], env={"HOME": str(home.parent), **variables})
    try:
        time.sleep(0.2)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def checks(home: Path) -> dict[str, list[dict[str, str]]]:
    ran = metaclaw(home, "doctor", "--json")
    assert ran.stderr == ""
    found = json.loads(ran.stdout)
    assert ran.returncode == ("ok", "warn", "fail").index(found["status"])
    out: dict[str, list[dict[str, str]]] = {}
    for check in found["checks"]:
        out.setdefault(check["name"], []).append(check)
        assert check["status"] == "ok" or check["remedy"], check
    return out


def test_on_an_empty_home_only_the_proxy_is_missing(home):
    ran = metaclaw(home, "doctor", METACLAW_PROXY_PORT=str(free_port()))  # the default may be taken on this machine
    assert ran.returncode == 1
    assert "warn  proxy       No proxy runs." in ran.stdout
    assert "16 checks: 15 ok, 1 warn, 0 fail" in ran.stdout
    assert [path.name for path in home.iterdir()] == []


def test_a_broken_configuration_does_not_stop_the_other_checks(home):
    (home / "config.yaml").write_text("proxy: [1\n")
    ran = metaclaw(home, "doctor")
    assert ran.returncode == 2
    assert "fail  config" in ran.stdout
    assert "skills" in ran.stdout
    assert "Traceback" not in ran.stderr


@pytest.mark.slow
def test_beside_a_real_proxy_all_is_well_and_what_goes_past_it_is_noticed(home, proxy, exchange):
    ca = home / "mitmproxy" / "mitmproxy-ca-cert.pem"
    found = checks(home)
    assert {name: some[0]["status"] for name, some in found.items()} == dict.fromkeys(found, "ok")
    assert found["tls"][0]["what"] == f"TLS through 127.0.0.1:{proxy} works with {ca}"
    assert "agent" not in found

    url = f"http://127.0.0.1:{proxy}"
    with openclaw(home, HTTPS_PROXY=url, NODE_EXTRA_CA_CERTS=str(ca)) as pid:
        assert checks(home)["agent"][0]["what"] == f"openclaw-gatewa (pid {pid}) uses the proxy and trusts its CA"
    with openclaw(home) as pid:
        check = checks(home)["agent"][0]
        assert (check["status"], check["what"]) == ("fail", f"openclaw-gatewa (pid {pid}) goes past the proxy: it has no proxy variable.")
    other = home.parent / "other.pem"
    other.write_bytes(_foreign_ca(home.parent))
    with openclaw(home, HTTPS_PROXY=url, NODE_EXTRA_CA_CERTS=str(other)):
        check = checks(home)["agent"][0]
        assert check["status"] == "fail"
        assert f"can't talk through the proxy with {other}" in check["what"]

    # OpenClaw's own record names a session that we have nothing of.
    record = home.parent / ".openclaw" / "agents" / "main" / "agent" / "openclaw-agent.sqlite"
    record.parent.mkdir(parents=True)
    os.utime(home / "principal.key", (1.0, 1.0))  # the home was first used long ago
    with closing(sqlite3.connect(record)) as database, database:
        database.execute("CREATE TABLE session_windows (session_id TEXT, session_key TEXT, transcript_updated_at INTEGER)")
        database.execute("INSERT INTO session_windows VALUES ('s-1', 'agent:main:main', ?)", ((time.time() - 15) * 1000,))
    assert checks(home)["sessions"][0]["what"].startswith("A session goes past the proxy: OpenClaw worked on agent:main:main (s-1)")


def _foreign_ca(folder: Path) -> bytes:
    from metaclaw_core.proxy.ca import ensure_ca

    made = folder / "foreign"
    made.mkdir(mode=0o700)
    return ensure_ca(made).read_bytes()


@pytest.mark.slow
def test_the_probe_ends_at_the_proxy(home, proxy):
    """No name is resolved and nothing is connected to, and a CA that is not the proxy's is not trusted."""
    url = f"http://127.0.0.1:{proxy}"
    assert handshake(url, home / "mitmproxy" / "mitmproxy-ca-cert.pem").ok
    foreign = home.parent / "foreign.pem"
    foreign.write_bytes(_foreign_ca(home.parent))
    probe = handshake(url, foreign)
    assert (probe.ok, probe.untrusted) == (False, True)
    assert "doctor.metaclaw" not in (home / "logs" / "proxy.log").read_text()


@pytest.mark.slow
def test_purge_beside_a_running_proxy_leaves_no_byte(home, proxy, exchange):
    from dataclasses import replace

    bodies = replace(exchange, request_body=exchange.request_body.replace(b'"Hi"', f'"{CANARY} {"long " * 3000}"'.encode()))
    with open_store(home / "store.db") as store:
        store.ingest([bodies, replace(exchange, flow_id="g", principal="1" * 32)])
        name = next(row["session_id"] for row in store.sessions(principal="0" * 32))
    log = home / "logs" / "worker.log"
    with log.open("a") as file:
        file.write(f"x {name} {CANARY}\n")

    asked = metaclaw(home, "purge", "--session", name)
    assert asked.returncode == 1
    assert asked.stderr == "metaclaw: Nobody can be asked here: add --yes to forget it for good.\n"
    assert CANARY in _all(home)

    ran = metaclaw(home, "purge", "--session", name, "--yes", "--json")
    assert (ran.returncode, ran.stderr) == (0, "")
    report = json.loads(ran.stdout)
    assert (report["turns"], report["sessions"], report["problems"]) == (1, 1, [])
    assert CANARY not in _all(home)
    assert name not in _all(home)
    assert len(json.loads(metaclaw(home, "sessions", "--json").stdout.splitlines()[0])["kinds"]) == 1

    assert metaclaw(home, "purge", "--all", "--yes").stdout.startswith("1 exchanges, all of p-")
    assert metaclaw(home, "sessions").stdout == "No session has been recorded yet.\n"


def _all(home: Path) -> str:
    return "".join(path.read_bytes().decode("latin-1") for path in home.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "Say what to forget: --session ID, --before DATE or --all, one of them."),
        (("--all", "--session", "x"), "Say what to forget: --session ID, --before DATE or --all, one of them."),
        (("--session", "x", "--yes"), "There is no session x: `metaclaw sessions` lists them."),
    ],
)
def test_purge_without_knowing_what_is_one_sentence(home, words, sentence):
    ran = metaclaw(home, "purge", *words)
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", f"metaclaw: {sentence}\n")


@pytest.mark.slow
def test_uninstalled_only_skills_and_what_others_put_there_stay(home, proxy):
    (home / "skills" / "mine").mkdir(parents=True)
    (home / "skills" / "mine" / "SKILL.md").write_text("---\nname: mine\ndescription: mine\n---\nx\n")
    (home / "notes.txt").write_text("mine")
    shown = metaclaw(home, "uninstall", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert f"remove {home / 'mitmproxy'}" in shown.stdout
    assert (home / "mitmproxy").exists()
    ran = metaclaw(home, "uninstall", "--yes", "--grace", "1")
    assert ran.returncode == 0, ran.stderr
    assert f"keep {home / 'skills'} (--skills removes it too)" in ran.stdout
    assert f"{home} still holds notes.txt, skills." in ran.stdout
    assert sorted(path.name for path in home.iterdir()) == ["notes.txt", "skills"]
    assert metaclaw(home, "status").returncode == 3
    (home / "notes.txt").unlink()
    shutil.rmtree(home / "run", ignore_errors=True)
    ran = metaclaw(home, "uninstall", "--yes", "--skills")
    assert f"{home} is gone." in ran.stdout
    assert not home.exists()
