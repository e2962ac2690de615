"""What our processes offer and leave: they listen on loopback only, and other users read nothing of ours.

Not repeated here: no key reaches another host (tests/e2e/test_canary.py, tests/learn/test_llm.py), the page's token
(tests/view/test_view_open.py), the engine's key (tests/engine/test_engine_oai.py), the policy server's token and where it listens
(tests/policy/test_policy_server.py, tests/policy/test_policy_listens.py).
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from e2e_tools import environment, free_port
from live_tools import GIT, chat, descendants, eventually

from metaclaw_core.proxy.control import call, running_proxies
from metaclaw_core.testing import Script, ScriptedLLM

pytestmark = pytest.mark.slow
TOOL = str(Path(sys.executable).with_name("metaclaw"))
NOBODY = 65534


@contextmanager
def running(home: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """``metaclaw …`` under an umask that forbids nothing, so that every mode is our own doing."""
    line = f'umask 0; exec "{TOOL}" "$@"'
    process = subprocess.Popen(["sh", "-c", line, "sh", *words], env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def sockets(home: Path) -> list[tuple[str, int]]:
    """Where the processes of `home` listen."""
    found = []
    for pid in descendants(home):
        with contextlib.suppress(psutil.Error):
            for connection in psutil.Process(pid).net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN or (connection.type == 2 and not connection.raddr):
                    found.append((connection.laddr.ip, connection.laddr.port))
    return found


def metaclaw(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TOOL, *words], env=environment(home), capture_output=True, text=True, timeout=120, umask=0)


def ask(port: int, url: str, text: str) -> int:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    client.request("POST", f"{url}/v1/chat/completions", chat(text), {"authorization": "Bearer sk-test-0123456789abcdef", "content-type": "application/json"})
    response = client.getresponse()
    response.read()
    client.close()
    return response.status


@pytest.fixture(scope="module")
def used() -> Iterator[Path]:
    """A home that everybody may look for: below a folder that is open to all, made by processes with umask 0, with the traces
    of all that a user does. The proxy and the page still run."""
    open_to_all = Path(tempfile.mkdtemp(prefix="metaclaw-security-"))
    open_to_all.chmod(0o755)
    home = open_to_all / "metaclaw"
    try:
        with ScriptedLLM(lambda _: Script(text="Good.\nScore: 1")) as llm:
            port = free_port()
            llm_flags = ("--provider", "custom", "--api-base", f"{llm.url}/v1", "--model", "m", "--api-key", "sk-test-0123456789abcdef")
            made = metaclaw(home, "setup", "--non-interactive", *llm_flags)
            assert made.returncode == 0, made.stderr
            assert metaclaw(home, "config", "judge.patience", "0").returncode == 0
            with running(home, "start", "--no-lean", "--port", str(port), "--set", f"save_stream_file={home / 'flows.mitm'}"):
                proxy = eventually(lambda: next(running_proxies(home), None), 30)
                eventually(lambda: call(proxy, "status")["skills"], 30)
                for n in range(3):
                    assert ask(port, llm.url, f"{GIT} {n}") == 200
                eventually(lambda: metaclaw(home, "turns", "--state", "scored", "--json").stdout, 40)
                for words in (("env",), ("run", "--", "true"), ("skills", "list"), ("doctor",), ("status",), ("sessions",), ("import", str(home / "flows.mitm"))):
                    metaclaw(home, *words)
                with running(home, "open", "--no-browser") as page:
                    assert page.stdout is not None
                    assert page.stdout.readline().startswith("http://127.0.0.1:")
                    yield home
    finally:
        shutil.rmtree(open_to_all)


def test_every_process_of_ours_listens_on_loopback_only(used):
    found = sockets(used)
    assert len(found) == 2, found  # the proxy and the page; the worker listens nowhere
    assert {address for address, _ in found} == {"127.0.0.1"}


def test_the_control_socket_is_ours_alone(used):
    (socket_file,) = (used / "run").glob("*.sock")
    assert stat.S_IMODE(socket_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(socket_file.parent.stat().st_mode) == 0o700


def test_no_file_of_a_used_home_gives_anything_to_others(used):
    entries = {str(path.relative_to(used)): path.lstat().st_mode for path in [used, *used.rglob("*")]}
    names = set(entries)
    # What a user's doings leave is really there, else this test says nothing.
    assert {"config.yaml", "store.db", "skills.index", "run", "logs", "spool", "mitmproxy/mitmproxy-ca.pem", "flows.mitm"} <= names
    assert {name: oct(mode) for name, mode in entries.items() if mode & 0o077} == {}


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root can be somebody else")
@pytest.mark.parametrize("what", ["ls", "cat", "write", "connect"])
def test_another_user_gets_nowhere(used, what):
    commands = {
        "ls": 'ls "$1"',
        "cat": 'cat "$1/config.yaml" "$1/store.db" "$1/mitmproxy/mitmproxy-ca.pem" "$1/logs/proxy.log"',
        "write": 'echo x > "$1/skills/evil" || echo x >> "$1/config.yaml"',
        "connect": f'{sys.executable} -c "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])" "$2"',
    }
    (control,) = (used / "run").glob("*.sock")
    as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "sh", "-c", commands[what], "sh", str(used), str(control)]
    tried = subprocess.run(as_nobody, capture_output=True, text=True, timeout=30, check=False)
    assert tried.returncode != 0
    assert tried.stdout == ""
    assert "ermission" in tried.stderr  # Permission denied, PermissionError


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root can be somebody else")
def test_another_user_may_look_at_the_folder_above(used):
    """Else the test above would pass for a home that nobody can reach for other reasons."""
    as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "ls", str(used.parent)]
    assert subprocess.run(as_nobody, capture_output=True, text=True, check=True).stdout == "metaclaw\n"
