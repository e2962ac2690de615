"""Real processes: a proxy started, used, restarted and stopped by the commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme
from e2e_tools import environment, free_port

from metaclaw_core.proxy.control import call, running_proxies
from metaclaw_core.proxy.detach import live_proxies
from metaclaw_core.proxy.startoptions import StartOptions, read_back, written_down
from metaclaw_core.testing import Script, ScriptedLLM

TOOL = str(Path(sys.executable).with_name("metaclaw"))
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "How do I resolve a rebase conflict?"}]})
ASK = f"""
import sys, urllib.request
request = urllib.request.Request(sys.argv[1] + "/v1/chat/completions", {BODY.encode()!r}, {{"content-type": "application/json"}})
print(urllib.request.urlopen(request, timeout=30).read().decode())
"""


class Commands:
    def __init__(self, home: Path) -> None:
        self.home = home
        self.env = environment(home)

    def __call__(self, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([TOOL, *words], env=self.env | extra, capture_output=True, text=True, timeout=90)

    def begin(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen([TOOL, *words], env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def status(self) -> dict:
        return json.loads(self("status", "--json").stdout)


@pytest.fixture
def metaclaw(metaclaw_home: Path) -> Iterator[Commands]:
    yield Commands(metaclaw_home)
    for proxy in running_proxies(metaclaw_home):
        os.kill(proxy.pid, signal.SIGKILL)


@pytest.mark.slow
def test_the_path_of_a_person_setup_start_use_look_restart_stop(metaclaw):
    port = free_port()
    assert metaclaw("setup", "--non-interactive", "--port", str(port)).returncode == 0
    started = metaclaw("start", "--detach")
    assert started.returncode == 0, started.stderr
    assert f"The proxy runs on 127.0.0.1:{port} (pid " in started.stdout
    pid = metaclaw.status()["pid"]
    assert metaclaw.status()["skills"]["count"] > 50  # before the first request

    with ScriptedLLM() as llm:
        ran = metaclaw("run", "--", sys.executable, "-c", ASK, llm.url)
        assert ran.returncode == 0, ran.stderr
        assert ran.stderr == ""
        assert json.loads(ran.stdout)["choices"][0]["message"]["content"] == "ok"
        assert "git-rebase-conflicts" in llm.received[0].body.decode()
    status = metaclaw.status()
    assert 0 < status["added_ms"]["p50"] <= status["added_ms"]["p95"] < 2000
    assert status["last_error"] is None
    assert " ms to a request (median; 95 % under " in metaclaw("status").stdout
    (turn,) = [json.loads(line) for line in metaclaw("turns", "--json").stdout.splitlines()]
    assert turn["user_text"] == "How do I resolve a rebase conflict?"

    traffic = metaclaw.status()["learning"]["traffic_today"]
    assert traffic["requests"] == 1
    assert traffic["output"] > 0
    assert (traffic["usd"], list(traffic["unpriced"].values())) == (None, [1])  # nobody knows what the scripted LLM costs
    assert f"{traffic['output']:,} out today (UTC), price unknown (" in metaclaw("status").stdout
    models = {next(iter(traffic["unpriced"])): {"input": 1, "cached_input": 0, "output": 2}}
    mine = json.dumps({"providers": {"mine": {"hosts": ["127.0.0.1"], "models": models}}})
    (metaclaw.home / "prices.yaml").write_text(mine)
    traffic = metaclaw.status()["learning"]["traffic_today"]
    assert (traffic["usd"], traffic["unpriced"]) == (pytest.approx((traffic["input"] - traffic["cached"] + 2 * traffic["output"]) / 1e6), {})
    (metaclaw.home / "prices.yaml").write_text("providers: {mine: {model: {}}}\n")
    broken = metaclaw("status")
    assert broken.returncode == 1
    assert "prices.yaml is no price table: providers.mine.model: Extra inputs are not permitted." in broken.stderr
    (metaclaw.home / "prices.yaml").unlink()

    again = metaclaw("start")
    assert again.returncode == 1
    assert f"The proxy runs already, on 127.0.0.1:{port} (pid {pid})." in again.stderr

    changed = metaclaw("config", "skills.top_k", "1")
    assert f"The running proxy (pid {pid}) has read it." in changed.stdout
    assert metaclaw("config", "proxy.websocket", "pass").returncode == 0
    assert "after `metaclaw restart`" in metaclaw("config", "proxy.intercept", "llm").stdout

    broken = metaclaw("restart", METACLAW_PROXY_PORT="x")
    assert broken.returncode == 1
    assert metaclaw.status()["pid"] == pid  # not stopped for a start that can't succeed
    restarted = metaclaw("restart")
    assert restarted.returncode == 0, restarted.stderr
    status = metaclaw.status()
    assert status["pid"] != pid
    assert status["listen"] == [f"127.0.0.1:{port}"]

    stopped = metaclaw("stop")
    assert (stopped.returncode, stopped.stdout) == (0, f"The proxy on 127.0.0.1:{port} (pid {status['pid']}) has ended.\n")
    assert list((metaclaw.home / "run").glob("*.start")) == []
    nothing = metaclaw("stop")
    assert nothing.returncode == 3
    assert nothing.stderr == f"metaclaw: no proxy runs in {metaclaw.home}, so there is nothing to stop.\n"
    for file in metaclaw.home.rglob("*"):
        assert file.stat().st_mode & 0o077 == 0, file


@pytest.mark.slow
def test_run_brings_its_own_proxy_trusts_over_tls_and_leaves_nothing_behind(metaclaw, tmp_path):
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "upstream.pem"))
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    metaclaw.home.mkdir()
    (metaclaw.home / "config.yaml").write_text(f"proxy:\n  port: {free_port()}\n  hosts: [localhost]\n")
    with ScriptedLLM(tls=context) as llm:
        url = f"https://localhost:{llm.port}"
        blind = metaclaw("run", "--", sys.executable, "-c", ASK, url)  # our proxy does not trust this upstream: 502
        assert blind.returncode == 1
        assert "502" in blind.stderr
        assert "a proxy of its own" in blind.stderr or "one of its own" in blind.stderr
        assert live_proxies(metaclaw.home) == []

        assert metaclaw("start", "-d", "--set", f"ssl_verify_upstream_trusted_ca={tmp_path / 'upstream.pem'}").returncode == 0
        seen = metaclaw("run", "--", sys.executable, "-c", ASK, url)
        assert seen.returncode == 0, seen.stderr
        if curl := shutil.which("curl"):
            got = metaclaw("run", "--", curl, "-sS", "-d", BODY, "-H", "content-type: application/json", f"{url}/v1/chat/completions")
            assert "choices" in got.stdout, got.stderr
    assert len([line for line in metaclaw("turns", "--json").stdout.splitlines() if '"assistant_text":"ok"' in line]) >= 1
    assert sorted(p.name for p in tmp_path.joinpath("home").iterdir()) == []


@pytest.mark.slow
def test_run_ends_as_its_command_ends_and_passes_signals_on(metaclaw):
    metaclaw.env["METACLAW_PROXY_PORT"] = str(free_port())
    assert metaclaw("start", "-d").returncode == 0
    assert metaclaw("run", "--", "sh", "-c", "exit 7").returncode == 7
    assert metaclaw("run", "--", "sh", "-c", "kill -9 $$").returncode == 137
    child = metaclaw.begin("run", "--", "sh", "-c", "trap 'echo told; exit 5' TERM; echo up; while :; do sleep 0.05; done")
    assert child.stdout.readline() == "up\n"
    child.send_signal(signal.SIGTERM)
    assert child.communicate(timeout=20)[0] == "told\n"
    assert child.returncode == 5
    assert len(live_proxies(metaclaw.home)) == 1  # it was there before, so it stays


def test_run_says_what_cannot_be_run_before_it_starts_anything(cli, metaclaw_home, tmp_path):
    ran = cli("run", "--", "no-such-command-here")
    assert (ran.code, ran.err) == (127, "metaclaw: no-such-command-here is no command that can be found.\n")
    file = tmp_path / "data"
    file.touch()
    assert cli("run", str(file)).code == 126
    assert not metaclaw_home.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("grace", "whole"), [("20", True), ("0.3", False)])
def test_stop_lets_an_open_stream_end_and_says_so_where_it_could_not(metaclaw, grace, whole):
    port = free_port()
    assert metaclaw("start", "-d", "--port", str(port)).returncode == 0
    with ScriptedLLM(lambda _: Script(text="x" * (24 if whole else 400), pieces=400, every=0.25)) as llm:
        got: list[bytes] = []
        body = json.dumps(json.loads(BODY) | {"stream": True}).encode()
        head = f"POST {llm.url}/v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{llm.port}\r\nContent-Type: application/json\r\n"

        def stream() -> None:
            with socket.create_connection(("127.0.0.1", port)) as s:
                s.sendall(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
                while piece := s.recv(65536):
                    got.append(piece)

        thread = threading.Thread(target=stream)
        thread.start()
        deadline = time.monotonic() + 10
        while not got and time.monotonic() < deadline:
            time.sleep(0.02)
        stopped = metaclaw("stop", "--grace", grace)
        thread.join(20)
    assert stopped.returncode == 0
    assert f"Waiting up to {grace} s for 1 open answer …" in stopped.stderr
    assert (b"[DONE]" in b"".join(got)) is whole
    assert stopped.stdout.endswith(" has ended.\n" if whole else " has ended: 1 open answer was cut.\n")
    assert live_proxies(metaclaw.home) == []


@pytest.mark.slow
def test_a_restart_keeps_the_options_and_asks_for_secrets_again(metaclaw):
    port = free_port()
    sets = ["--set", "metaclaw_top_k=2", "--set", "metaclaw_llm_api_key=sk-canary-0123456789"]
    assert metaclaw("start", "-d", "--no-lean", "--port", str(port), *sets).returncode == 0
    pid = metaclaw.status()["pid"]
    assert read_back(metaclaw.home, pid) == StartOptions(
        port=port, lean=False, sets=("metaclaw_top_k=2",), left_out=("metaclaw_llm_api_key",)
    )
    refused = metaclaw("restart")
    assert refused.returncode == 1
    assert "give --set metaclaw_llm_api_key=… again" in refused.stderr
    assert metaclaw.status()["pid"] == pid
    assert metaclaw("restart", *sets[2:]).returncode == 0
    new = metaclaw.status()["pid"]
    assert read_back(metaclaw.home, new).sets == ("metaclaw_top_k=2",)
    assert metaclaw("stop").returncode == 0
    for file in metaclaw.home.rglob("*"):
        assert not file.is_file() or b"canary" not in file.read_bytes(), file


@pytest.mark.slow
def test_a_killed_proxy_is_forgotten_and_another_starts(metaclaw):
    port = str(free_port())
    assert metaclaw("start", "-d", "--port", port).returncode == 0
    pid = metaclaw.status()["pid"]
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert metaclaw("status").returncode == 3
    assert metaclaw("start", "-d", "--port", port).returncode == 0
    assert metaclaw.status()["pid"] != pid
    assert metaclaw("stop").returncode == 0


def test_a_pid_that_belongs_to_somebody_else_by_now_is_left_alone(cli, metaclaw_home):
    run = metaclaw_home / "run"
    run.mkdir(parents=True)
    stranger = os.getpid()  # alive, and nobody listens on the socket
    (run / f"{stranger}.json").write_text(json.dumps({"pid": stranger, "socket": str(run / f"{stranger}.sock")}))
    assert cli("stop").code == 3


def test_options_go_to_a_command_line_and_through_a_restart():
    old = StartOptions(port=31000, mode="rl", lean=False, sets=("a=1", "b=2"), left_out=("k",))
    assert old.arguments() == ["--no-lean", "--port", "31000", "--mode", "rl", "--set", "a=1", "--set", "b=2"]
    new = StartOptions(sets=("b=3", "k=s")).over(old)
    assert new == StartOptions(port=31000, mode="rl", lean=False, sets=("a=1", "b=3", "k=s"))


def test_what_a_proxy_was_started_with_is_there_while_it_runs(metaclaw_home):
    options = StartOptions(port=1, sets=("metaclaw_max_context_tokens=9000", "proxyauth=me:x"))
    metaclaw_home.mkdir()
    with written_down(metaclaw_home, options):
        found = read_back(metaclaw_home, os.getpid())
        assert found == StartOptions(port=1, sets=("metaclaw_max_context_tokens=9000",), left_out=("proxyauth",))
        assert (metaclaw_home / "run" / f"{os.getpid()}.start").stat().st_mode & 0o777 == 0o600
    assert read_back(metaclaw_home, os.getpid()) is None


@pytest.mark.slow
def test_a_drained_proxy_refuses_what_it_would_cut_and_a_purge_reaches_its_memory(metaclaw):
    port = free_port()
    assert metaclaw("start", "-d", "--port", str(port)).returncode == 0
    with ScriptedLLM() as llm:
        url = f"{llm.url}/v1/chat/completions"
        headers = {"content-type": "application/json"}
        with httpx.Client(proxy=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
            assert client.post(url, content=BODY, headers=headers).status_code == 200
            assert metaclaw.status()["sessions"] == 1
            purged = metaclaw("purge", "--all", "--yes")
            assert (purged.returncode, purged.stderr) == (0, "")
            assert metaclaw.status()["sessions"] == 0
            (proxy,) = running_proxies(metaclaw.home)
            assert call(proxy, "drain", seconds=1)["open_requests"] == 0
            refused = client.post(url, content=BODY, headers=headers)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
            assert refused.json()["error"]["message"] == "The proxy is restarting; try again."
        assert len(llm.received) == 1
    assert metaclaw.status()["counters"]["refused: the proxy is about to end"] == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [("config", "show"), ("--help",), ("turns",)])
def test_an_output_that_takes_nothing_is_one_sentence(metaclaw, words):
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run([TOOL, *words], env=metaclaw.env, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert ran.returncode == 1
    assert ran.stderr == "metaclaw: the output can't be written (No space left on device): make room, or send it elsewhere.\n"
