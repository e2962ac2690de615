"""The proxy goes away under a gateway in mid-session and comes back: OpenClaw's own retries carry the turn over.

The proxy is `metaclaw start --detach`, as a person has it, and not the mitmdump of the other tests.
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
from e2e_tools import environment
from openclaw_tools import KIT, LLM_HOSTS, MARK, SCRIPTS, RecordingLLM, Stage

pytestmark = [pytest.mark.openclaw, pytest.mark.slow]

MODEL = "example/fake-1"
REBASE = "Help me resolve a git rebase conflict in two files."


class Started(Stage):
    """A stage whose proxy was started by `metaclaw start --detach`."""

    def metaclaw(self, *words: str) -> str:
        env = environment(self.home) | {
            "HOME": str(self.user),
            "KIT_LLM_HOSTS": LLM_HOSTS,
            "LLM_PORT": str(self.llm.port),
            "LLM_TLS_PORT": str(self.llm.tls_port),
        }
        line = [str(Path(sys.executable).with_name("metaclaw")), *words]
        done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start_proxy(self, *, addon: bool = True) -> None:
        sets = {
            "confdir": self.folder / "mitmproxy",
            "ssl_verify_upstream_trusted_ca": KIT / "ca/ca.pem",
            "scripts": SCRIPTS / "upstream_map.py",
        }
        words = [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
        self.metaclaw("start", "--detach", "--port", str(self.proxy_port), *words)

    @property
    def pid(self) -> int:
        return int(json.loads(self.metaclaw("status", "--json"))["pid"])

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self.metaclaw("stop", "--grace", "0")


def blocks(llm: RecordingLLM) -> list[bytes]:
    """What was injected, of each request that answers a person."""
    found = []
    for message in llm.received:
        if MARK in message.body:
            start = message.body.index(b"<metaclaw-skills>")
            found.append(message.body[start : message.body.index(b"</metaclaw-skills>")])
    return found


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
