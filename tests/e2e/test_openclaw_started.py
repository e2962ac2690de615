"""What a person does: `metaclaw start --detach`, the real OpenClaw behind `metaclaw run`, and a proxy that goes away
under a gateway in mid-session and comes back, where OpenClaw's own retries carry the turn over.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openclaw_tools import KIT, LLM_HOSTS, MARK, OPENCLAW, SCRIPTS, RecordingLLM, Stage
from service_tools import Supervisor

from metaclaw_core.proxy.control import running_proxies
from metaclaw_core.proxy.detach import live_proxies
from metaclaw_core.wiring import service
from metaclaw_core.wiring.units import GATEWAY, service_unit

pytestmark = [pytest.mark.openclaw, pytest.mark.slow]

MODEL = "example/fake-1"
REBASE = "Help me resolve a git rebase conflict in two files."


class Started(Stage):
    """A stage whose proxy was started by `metaclaw start --detach`."""

    def metaclaw(self, *words: str) -> str:
        own = ("HTTP_PROXY", "HTTPS_PROXY", "NODE_EXTRA_CA_CERTS")  # these are for `metaclaw run` to set
        env = {name: value for name, value in self.agent_env().items() if name not in own} | {
            "METACLAW_HOME": str(self.home),
            "KIT_LLM_HOSTS": LLM_HOSTS,
            "LLM_TLS_PORT": str(self.llm.tls_port),
        }
        line = [str(Path(sys.executable).with_name("metaclaw")), *words]
        done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start_proxy(self, *, addon: bool = True) -> None:
        self.metaclaw("start", "--detach", *self.options)

    @property
    def options(self) -> list[str]:
        sets = {
            "confdir": self.folder / "mitmproxy",
            "ssl_verify_upstream_trusted_ca": KIT / "ca/ca.pem",
            "scripts": SCRIPTS / "upstream_map.py",
        }
        return ["--port", str(self.proxy_port), *(word for name, value in sets.items() for word in ("--set", f"{name}={value}"))]

    @property
    def pid(self) -> int:
        return int(json.loads(self.metaclaw("status", "--json"))["pid"])

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        for proxy in running_proxies(self.home):
            os.kill(proxy.pid, signal.SIGTERM)


class Serviced(Started):
    """One whose proxy is a service that comes back."""

    def start_proxy(self, *, addon: bool = True) -> None:
        more = {"KIT_LLM_HOSTS": LLM_HOSTS, "LLM_PORT": str(self.llm.port), "LLM_TLS_PORT": str(self.llm.tls_port)}
        unit = service_unit([*service.command(), *self.options], service.service_environment(self.home) | more, [GATEWAY])
        bare = {"HOME": str(self.user), "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
        self.service = Supervisor(unit, self.folder / "service.log", bare).__enter__()
        self.wait_for(lambda: bool(live_proxies(self.home)))

    def __exit__(self, *exc: object) -> None:
        self.service.__exit__(*exc)
        super().__exit__(*exc)


def blocks(llm: RecordingLLM) -> list[bytes]:
    """What was injected, of each request that answers a person."""
    found = []
    for message in llm.received:
        if MARK in message.body:
            start = message.body.index(b"<metaclaw-skills>")
            found.append(message.body[start : message.body.index(b"</metaclaw-skills>")])
    return found


class WithoutGateway(Started):
    def start_gateway(self) -> None:
        """OpenClaw's command line does without."""


def test_the_first_five_minutes(tmp_path: Path):
    with RecordingLLM() as llm, WithoutGateway(tmp_path / "openclaw", llm) as stage:
        agent = ("agent", "--local", "--agent", "main", "--model", MODEL, "-m", REBASE)
        assert "ok: " in stage.metaclaw("run", "--", OPENCLAW, *agent)
        assert b"git-rebase-conflicts" in blocks(llm)[0]
        assert REBASE[:30] in stage.metaclaw("turns")
        assert "1 recorded, 1 with skills, 0 open" in stage.metaclaw("status")
        assert REBASE[:20] in stage.metaclaw("top", "--once")
        assert ", 0 fail" in stage.metaclaw("doctor")
        assert " has ended." in stage.metaclaw("stop")
        assert list((stage.home / "run").glob("*.json")) == []


def test_a_proxy_that_is_killed_or_restarted_in_mid_session_costs_no_turn(tmp_path: Path):
    with RecordingLLM() as llm, Started(tmp_path / "openclaw", llm) as stage:
        assert "ok: " in stage.post(REBASE, MODEL, "one")
        (first,) = set(blocks(llm))
        killed, count = stage.pid, len(llm.received)
        os.kill(killed, signal.SIGKILL)
        with ThreadPoolExecutor(1) as pool:
            turn = pool.submit(stage.post, "And how do I go on after that?", MODEL, "one")
            time.sleep(2)
            assert len(llm.received) == count  # nothing reached it while there was no proxy
            stage.start_proxy()
            assert "ok: " in turn.result(80)
        assert stage.pid != killed
        assert set(blocks(llm)) == {first}  # the new proxy repeats the session's block, byte for byte

        with ThreadPoolExecutor(1) as pool:
            turn = pool.submit(stage.post, "And what if it fails once more?", MODEL, "one")
            stage.metaclaw("restart")
            assert "ok: " in turn.result(80)
        assert {block[: len(first)] for block in blocks(llm)} == {first}  # it may have grown at its end
        said = [json.loads(line)["user_text"] for line in stage.metaclaw("turns", "--json").splitlines()]
        assert {*stage.said} <= {text for text in said if text}


def test_a_proxy_that_is_killed_under_its_service_costs_no_turn(tmp_path: Path):
    with RecordingLLM() as llm, Serviced(tmp_path / "openclaw", llm) as stage:
        assert "ok: " in stage.post(REBASE, MODEL, "one")
        (first,) = set(blocks(llm))
        killed = stage.service.pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        began = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            turn = pool.submit(stage.post, "And how do I go on after that?", MODEL, "one")
            stage.wait_for(lambda: any(live.addresses for live in live_proxies(stage.home)))
            assert time.monotonic() - began < 5
            assert "ok: " in turn.result(80)
        assert (stage.service.starts, stage.service.pid == killed) == (2, False)
        assert set(blocks(llm)) == {first}
