"""`metaclaw rollout` as a user types it: the built-in loop, and the real OpenClaw, each behind a proxy that it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from e2e_tools import environment
from openclaw_tools import KIT, RecordingLLM, WithoutGateway

from metaclaw_core.testing import Received, Script, ScriptedLLM


def metaclaw(env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    line = [str(Path(sys.executable).with_name("metaclaw")), *words]
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=110, stdin=subprocess.DEVNULL)


def tasks(folder: Path, *instructions: str) -> Path:
    folder.mkdir()
    rows = [json.dumps({"task_id": f"t{n}", "instruction": text}) for n, text in enumerate(instructions)]
    (folder / "tasks.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.slow
def test_tasks_go_through_the_built_in_loop_and_into_the_store(tmp_path: Path):
    def answer(received: Received) -> Script:
        last = received.json()["messages"][-1]
        if last["role"] == "tool":
            return Script(text=f"It says: {last['content']}")
        return Script(status=400) if "fail" in last["content"] else Script(tool=("read", {"path": "notes.txt"}))

    folder = tasks(tmp_path / "env", "Read my notes.", "fail")
    (folder / "t0").mkdir()
    (folder / "t0/notes.txt").write_text("milk")
    env = environment(tmp_path / "metaclaw")
    with ScriptedLLM(answer) as llm:
        env |= {"METACLAW_LLM_API_BASE": f"{llm.url}/v1", "METACLAW_LLM_MODEL_ID": "m", "METACLAW_LLM_API_KEY": "sk-test-0"}
        env |= {"METACLAW_OPENCLAW_ENV_DATA_DIR": str(folder)}
        done = metaclaw(env, "rollout", "--agent", "loop")
        assert done.returncode == 3, done.stderr
        assert "1 done, 1 failed" in done.stdout
        assert "t1: failed: " in done.stderr
        row = json.loads((folder / "rollout/results/t0.json").read_text())
        assert (row["status"], row["reply"], row["steps"]) == ("done", "It says: milk", 2)
        seen = len(llm.received)
        again = metaclaw(env, "rollout", str(folder), "--agent", "loop")
        assert (again.returncode, len(llm.received)) == (0, seen)
        assert "All 2 tasks have a result" in again.stdout
    turns = [json.loads(line) for line in metaclaw(env, "turns", "--json").stdout.splitlines()]
    assert [turn["kind"] for turn in turns].count("tool") == 1
    assert len(turns) == 3


def test_a_rollout_that_can_not_begin_says_why(tmp_path: Path):
    env = environment(tmp_path / "metaclaw") | {"PATH": "/usr/bin:/bin"}
    assert "Name the folder of the tasks" in metaclaw(env, "rollout").stderr
    folder = tasks(tmp_path / "env", "x")
    assert "--agent loop asks llm.*" in metaclaw(env, "rollout", str(folder), "--agent", "loop").stderr
    assert "openclaw is no command that can be found" in metaclaw(env, "rollout", str(folder)).stderr
    assert "is no folder" in metaclaw(env, "rollout", str(tmp_path / "none")).stderr


@pytest.mark.openclaw
@pytest.mark.slow
def test_tasks_go_through_the_real_openclaw(tmp_path: Path):
    folder = tasks(tmp_path / "env", 'Read my notes. TOOL:read {"path":"notes.txt"} END', "Say hello")
    (folder / "t0").mkdir()
    (folder / "t0/notes.txt").write_text("milk")
    with RecordingLLM() as llm:
        stage = WithoutGateway(tmp_path / "stage", llm)
        stage.make_home()
        own = ("HTTP_PROXY", "HTTPS_PROXY", "NODE_EXTRA_CA_CERTS")
        env = {k: v for k, v in stage.agent_env().items() if k not in own} | {"METACLAW_HOME": str(stage.home)}
        env["PATH"] = f"{KIT / 'node_modules/.bin'}:{os.environ['PATH']}"
        done = metaclaw(env, "rollout", str(folder), "--model", "exloop/fake-1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"tasks": 2, "run": 2, "done": 2, "failed": 0, "timeout": 0, "results": str(folder / "rollout/results")}
    rows = [json.loads((folder / f"rollout/results/t{n}.json").read_text()) for n in range(2)]
    assert rows[0]["reply"] == "Tool finished. The task is done."
    assert rows[1]["reply"].startswith("ok: ")
    sessions = {json.loads(line)["session_id"] for line in metaclaw(env, "sessions", "--json").stdout.splitlines()}
    assert {row["session"] for row in rows} <= sessions
