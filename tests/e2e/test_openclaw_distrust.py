"""What of the real OpenClaw doesn't trust our CA keeps its network: the agent itself, and the tools that it runs.

Each test has a proxy of its own, since what one client distrusts is tunnelled for all clients of this machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_tools import environment
from live_tools import kit, site  # noqa: F401 - fixtures
from openclaw_tools import KIT, RecordingLLM, WithoutGateway

pytestmark = [pytest.mark.openclaw, pytest.mark.slow]

MODEL = "example/fake-1"
REBASE = "Help me resolve a git rebase conflict in two files."


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[WithoutGateway]:
    with RecordingLLM() as llm, WithoutGateway(tmp_path / "openclaw", llm) as stage:
        yield stage


def recorded(stage: WithoutGateway) -> list[dict[str, Any]]:
    line = [str(Path(sys.executable).with_name("metaclaw")), "turns", "--json"]
    done = subprocess.run(line, env=environment(stage.home), capture_output=True, text=True, check=True, timeout=120)
    return [json.loads(row) for row in done.stdout.splitlines()]


def warnings(stage: WithoutGateway, host: str) -> list[str]:
    log = (stage.folder / "mitmdump.log").read_text()
    return [line for line in log.splitlines() if f"does not trust our CA for {host};" in line]


def test_an_openclaw_that_does_not_trust_us_works_from_its_second_attempt_unrecorded(stage: WithoutGateway):
    """It knows the CAs that the world knows, which here is the kit's; ours was never given to it."""
    answer = stage.agent(REBASE, MODEL, "one", NODE_EXTRA_CA_CERTS=str(KIT / "ca/ca.pem"))
    assert "ok: " in answer
    assert [message.answered.partition(" ")[0] for message in stage.llm.received if message.dialect != "other"] == ["text"]
    assert REBASE.encode() in stage.llm.received[-1].body
    assert b"metaclaw-skills" not in stage.llm.received[-1].body
    assert [message.path for message in stage.sent()] == ["/api/version"]  # that of the stage itself: all else was hidden
    (warning,) = warnings(stage, "api.example-llm.com")
    assert f"NODE_EXTRA_CA_CERTS={stage.folder / 'mitmproxy'}/mitmproxy-ca-cert.pem" in warning
    assert recorded(stage) == []


@pytest.mark.parametrize(
    ("program", "file", "shown"),
    [("GIT_SSL_CAINFO={ca} git ls-remote", "repo.git", "refs/heads/main"), ("curl -sS --cacert {ca}", "hello.txt", "hello")],
    ids=["git", "curl"],
)
def test_a_program_that_openclaw_runs_succeeds_at_the_second_try(stage: WithoutGateway, kit, site, program, file, shown):  # noqa: F811
    """While its own calls of the LLM go on being served, as it does trust us."""
    line = f"{program.format(ca=kit.ca)} {site}/{file}"
    ask = f"{REBASE} TOOL:exec {json.dumps({'command': line})} END"
    for _ in range(2):
        assert "The task is done." in stage.agent(ask, MODEL, "tools")
    results = [m.json()["messages"][-2]["content"] for m in stage.llm.received if m.answered == "text Tool finished. The task is done."]
    first, second = results
    assert "certificate" in first
    assert shown not in first
    assert shown in second
    assert len(warnings(stage, "localhost")) == 1
    assert [row["kind"] for row in recorded(stage)] == ["main", "tool", "main", "tool"]
