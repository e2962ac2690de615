from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from metaclaw_core.errors import ConfigError
from metaclaw_core.rollout.openclaw import OpenClawAgent, outcome_of
from metaclaw_core.rollout.run import run_tasks
from metaclaw_core.rollout.tasks import Outcome, Results, Task, read_tasks


def lines(folder: Path, name: str, *rows: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return folder


def test_tasks_come_in_the_order_of_files_and_lines_with_their_other_fields(tmp_path: Path):
    lines(tmp_path, "b.jsonl", {"task_id": "3", "instruction": "c"})
    lines(tmp_path, "a.jsonl", {"task_id": "1", "instruction": "a", "level": 2}, "", {"task_id": "2", "instruction": "b"})
    assert read_tasks(tmp_path) == [Task("1", "a", {"level": 2}), Task("2", "b"), Task("3", "c")]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["{"], "a.jsonl, line 1: task is not JSON"),
        ([{"task_id": "1", "instruction": "a"}, {"task_id": "2"}], "a.jsonl, line 2: instruction must be a text"),
        ([{"task_id": 7, "instruction": "a"}], "a.jsonl, line 1: task_id must be a text"),
        ([{"task_id": "1", "instruction": "a"}, {"task_id": "1", "instruction": "b"}], "line 2: there is another task '1'"),
        ([], "holds no tasks"),
    ],
)
def test_what_is_wrong_with_the_tasks_is_named_with_its_line(tmp_path: Path, rows: list[object], words: str):
    with pytest.raises(ConfigError, match=words):
        read_tasks(lines(tmp_path, "a.jsonl", *rows))
    with pytest.raises(ConfigError, match="is no folder"):
        read_tasks(tmp_path / "nowhere")


def test_an_id_that_can_not_name_a_file_is_told_apart_by_a_hash():
    names = [Task(name, "x").name for name in ("plain-1.a", "../up", "a/b", "a b", "x" * 300)]
    assert names[0] == "plain-1.a"
    assert all("/" not in name and not name.startswith(".") and len(name) < 100 for name in names)
    assert len(set(names)) == 5


class Scripted:
    """Answers by the task's instruction, and knows how many ran at once."""

    def __init__(self) -> None:
        self.open = self.most = 0

    async def run(self, task: Task, workspace: Path) -> Outcome:
        self.open += 1
        self.most = max(self.most, self.open)
        await asyncio.sleep(0.01)
        self.open -= 1
        files = sorted(p.name for p in workspace.iterdir())
        return Outcome("failed", error="no") if task.instruction == "fail" else Outcome("done", reply=",".join(files))


async def test_each_task_has_its_files_and_its_result_and_is_not_run_again(tmp_path: Path):
    source = lines(tmp_path / "tasks", "t.jsonl", *({"task_id": str(n), "instruction": "fail" if n == 2 else "go"} for n in range(6)))
    (source / "1").mkdir()
    (source / "1/notes.txt").write_text("x")
    results, tasks, agent = Results(tmp_path / "out"), read_tasks(source), Scripted()
    assert await run_tasks(results.open_tasks(tasks, again=False), agent, results, source, at_once=3) == {"done": 5, "failed": 1, "timeout": 0}
    assert agent.most == 3
    row = json.loads((tmp_path / "out/results/1.json").read_text())
    assert (row["status"], row["reply"], row["instruction"]) == ("done", "notes.txt", "go")
    assert results.open_tasks(tasks, again=False) == []
    assert [task.id for task in results.open_tasks(tasks, again=True)] == ["2"]


async def test_a_run_that_is_cut_off_goes_on_where_it_was(tmp_path: Path):
    source = lines(tmp_path / "tasks", "t.jsonl", *({"task_id": str(n), "instruction": "go"} for n in range(4)))
    results, tasks = Results(tmp_path / "out"), read_tasks(source)

    class Hangs(Scripted):
        async def run(self, task: Task, workspace: Path) -> Outcome:
            if task.id == "2":
                run.cancel()
            return await super().run(task, workspace)

    run = asyncio.ensure_future(run_tasks(tasks, Hangs(), results, source, at_once=1))
    with pytest.raises(asyncio.CancelledError):
        await run
    assert [task.id for task in results.open_tasks(tasks, again=False)] == ["2", "3"]


def test_what_openclaw_says_of_a_task_becomes_its_outcome():
    good = {"ok": True, "status": "ok", "final": "Done.", "assistantTurns": 2, "sessionId": "s-1"}
    assert outcome_of(json.dumps(good), "noise", 0) == Outcome("done", "Done.", None, "s-1", 2)
    late = outcome_of(json.dumps({"ok": False, "status": "timeout", "sessionId": "s-2"}), "", 1)
    assert (late.status, late.error, late.session) == ("timeout", "OpenClaw ended with status timeout.", "s-2")
    bad = outcome_of(json.dumps({"ok": False, "status": "error", "error": {"message": "no key"}}), "", 1)
    assert (bad.status, bad.error) == ("failed", "no key")
    dead = outcome_of("", "Killed", 137)
    assert (dead.status, dead.error) == ("failed", "OpenClaw ended with status 137 and said: Killed")


async def test_an_agent_that_hangs_is_ended_with_what_it_started(tmp_path: Path):
    script = tmp_path / "openclaw"
    script.write_text("#!/bin/sh\nsleep 600 &\necho $! > pid\nwait\n")
    script.chmod(0o700)
    agent = OpenClawAgent({"PATH": "/usr/bin:/bin"}, model=None, timeout_s=-9.5, command=[str(script)])  # the grace is 10 s
    workspace = tmp_path / "work"
    workspace.mkdir()
    assert (await agent.run(Task("1", "x"), workspace)).status == "timeout"
    state = Path(f"/proc/{(workspace / 'pid').read_text().strip()}/stat")
    for _ in range(100):
        if not state.exists() or ") Z " in state.read_text():
            break
        await asyncio.sleep(0.02)
    else:
        pytest.fail("what the agent started still runs")


async def test_an_agent_that_is_not_there_is_a_failed_task(tmp_path: Path):
    agent = OpenClawAgent({}, model=None, timeout_s=5, command=[str(tmp_path / "none")])
    outcome = await agent.run(Task("1", "x"), tmp_path)
    assert (outcome.status, outcome.error) == ("failed", f"{tmp_path / 'none'} can't be run: No such file or directory.")
