"""`kill -9` of the proxy under its service: the unit that `metaclaw service install` writes, under a stand-in for systemd."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from e2e_tools import environment, free_port
from live_tools import eventually
from retrying_agent import Agent, block
from service_tools import Supervisor

from metaclaw_core.proxy.detach import live_proxies
from metaclaw_core.testing import ScriptedLLM
from metaclaw_core.wiring import service
from metaclaw_core.wiring.units import GATEWAY, service_unit

pytestmark = pytest.mark.slow


def test_a_proxy_that_is_killed_again_and_again_is_back_within_five_seconds_each_time(tmp_path: Path, metaclaw_home: Path) -> None:
    port = free_port()
    metaclaw_home.mkdir(mode=0o700)
    (metaclaw_home / "config.yaml").write_text(f"proxy: {{port: {port}}}\n")
    unit = service_unit(service.command(), service.service_environment(metaclaw_home), [GATEWAY])
    bare = {"HOME": str(tmp_path / "home"), "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}  # as a user's manager has it
    with Supervisor(unit, tmp_path / "service.log", bare) as proxy, ScriptedLLM() as llm:
        eventually(lambda: [live.port for live in live_proxies(metaclaw_home)] == [port], 30)
        with Agent(f"http://127.0.0.1:{port}", llm.url) as agent:
            agent.say("How do I resolve a git rebase conflict in two files?")
            first = block(llm.received[-1])
            assert "git-rebase-conflicts" in first
            for number in range(3):
                killed = proxy.pid
                assert killed is not None
                assert killed == live_proxies(metaclaw_home)[0].pid
                time.sleep(0.2)  # the spool commits every 50 ms
                os.kill(killed, signal.SIGKILL)
                began = time.monotonic()
                agent.say(f"And how do I go on after that, number {number}?")
                assert time.monotonic() - began < 5
                assert agent.retries > 0
                agent.retries = 0
                assert block(llm.received[-1]) == first  # the session's block, byte for byte
        assert proxy.starts == 4
        line = [str(Path(sys.executable).with_name("metaclaw")), "turns", "--json"]
        listed = subprocess.run(line, env=environment(metaclaw_home), capture_output=True, text=True, timeout=60, check=True)
        assert len(listed.stdout.splitlines()) == len(llm.received) == 4  # what was answered before each kill is there, once
        assert len({json.loads(row)["session_id"] for row in listed.stdout.splitlines()}) == 1
    assert live_proxies(metaclaw_home) == []
