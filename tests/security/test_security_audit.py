"""scripts/audit against an OSV database on loopback: what it finds, and that silence of the database is no good news."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

AUDIT = Path(__file__).resolve().parents[2] / "scripts" / "audit.py"
LOCK = """\
# Written by scripts/lock: don't edit.
aioquic==1.2.0 \\
    --hash=sha256:1de5
leaky_package[extra]==2.0.0 ; python_version >= "3.12" \\
    --hash=sha256:6371
"""
ADVISORY = {
    "id": "GHSA-xxxx",
    "aliases": ["CVE-2026-1"],
    "summary": "It leaks.",
    "affected": [{"package": {"name": "leaky-package"}, "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.0.1"}]}]}],
}


@pytest.fixture
def database() -> Iterator[tuple[str, list[object]]]:
    asked: list[object] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            queries = json.loads(self.rfile.read(int(self.headers["content-length"])))["queries"]
            asked.extend(queries)
            self.answer({"results": [{"vulns": [{"id": "GHSA-xxxx"}]} if q["package"]["name"] == "leaky-package" else {} for q in queries]})

        def do_GET(self) -> None:
            self.answer(ADVISORY)

        def answer(self, value: object) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def audit(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(AUDIT), *words], capture_output=True, text=True, timeout=60, check=False)


def test_an_advisory_is_named_with_the_version_that_fixes_it(tmp_path, database):
    url, asked = database
    lock = tmp_path / "a.lock"
    lock.write_text(LOCK)
    done = audit("--lock", str(lock), "--database", url)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == "leaky-package 2.0.0: GHSA-xxxx CVE-2026-1: It leaks.; fixed in 2.0.1\n2 pinned packages, 1 known advisories.\n"
    assert asked == [
        {"package": {"name": "aioquic", "ecosystem": "PyPI"}, "version": "1.2.0"},
        {"package": {"name": "leaky-package", "ecosystem": "PyPI"}, "version": "2.0.0"},
    ]


def test_a_database_that_can_not_be_reached_is_said_and_nothing_is_claimed(tmp_path):
    lock = tmp_path / "a.lock"
    lock.write_text(LOCK)
    done = audit("--lock", str(lock), "--database", "http://127.0.0.1:9", "--json")
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert (report["checked"], report["packages"], report["findings"]) == (False, 2, [])
    assert audit("--lock", str(lock), "--database", "http://127.0.0.1:9").stdout.startswith("not checked: http://127.0.0.1:9 can't be asked (")


def test_a_lock_file_that_is_not_there_is_named(tmp_path):
    done = audit("--lock", str(tmp_path / "none.lock"))
    assert (done.returncode, done.stderr) == (2, f"{tmp_path / 'none.lock'} can't be read: No such file or directory\n")


def test_the_auditor_is_no_dependency_of_ours():
    declared = (AUDIT.parents[1] / "pyproject.toml").read_text()
    assert "pip-audit" not in declared
