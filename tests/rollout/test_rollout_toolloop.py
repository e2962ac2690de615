from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from metaclaw_core.learn.endpoint import Endpoint
from metaclaw_core.rollout.tasks import Task
from metaclaw_core.rollout.toolloop import ToolLoop, _result, tools
from metaclaw_core.testing import Received, Script, ScriptedLLM


def call(name: str, **arguments: object) -> dict[str, object]:
    return {"id": "c", "function": {"name": name, "arguments": json.dumps(arguments)}}


async def test_a_task_is_solved_with_tools_under_one_trace(tmp_path: Path):
    (tmp_path / "in.txt").write_text("remember the milk")

    def answer(received: Received) -> Script:
        said = received.json()["messages"]
        if said[-1]["role"] == "user":
            return Script(tool=("read", {"path": "in.txt"}))
        if len(said) == 4:
            return Script(tool=("write", {"path": "sub/out.txt", "content": said[-1]["content"].upper()}))
        return Script(text="written")

    with ScriptedLLM(answer) as llm:
        async with ToolLoop(Endpoint(f"{llm.url}/v1", "m", "sk-k"), proxy=None, timeout_s=20) as loop:
            outcome = await loop.run(Task("1", "Copy it in capitals."), tmp_path)
    assert (outcome.status, outcome.reply, outcome.steps) == ("done", "written", 3)
    assert (tmp_path / "sub/out.txt").read_text() == "REMEMBER THE MILK"
    assert len({(r.header("traceparent") or "")[:36] for r in llm.received}) == 1
    assert llm.received[0].header("authorization") == "Bearer sk-k"


async def test_a_model_that_never_ends_and_an_llm_that_fails_are_outcomes(tmp_path: Path):
    with ScriptedLLM(lambda r: Script(tool=("list", {"path": "."}))) as llm:
        async with ToolLoop(Endpoint(f"{llm.url}/v1", "m", ""), proxy=None, timeout_s=20, max_steps=3) as loop:
            assert (await loop.run(Task("1", "x"), tmp_path)).error == "No end after 3 calls of the LLM."
    with ScriptedLLM(lambda r: Script(status=500)) as llm:
        async with ToolLoop(Endpoint(f"{llm.url}/v1", "m", ""), proxy=None, timeout_s=20) as loop:
            outcome = await loop.run(Task("1", "x"), tmp_path)
            assert outcome.status == "failed"
            assert "answered 500" in (outcome.error or "")
    with ScriptedLLM(lambda r: Script(raw=b'{"choices": []}')) as llm:
        async with ToolLoop(Endpoint(f"{llm.url}/v1", "m", ""), proxy=None, timeout_s=20) as loop:
            assert "holds no message" in ((await loop.run(Task("1", "x"), tmp_path)).error or "")
    async with ToolLoop(Endpoint("http://127.0.0.1:9/v1", "m", ""), proxy=None, timeout_s=5) as loop:
        assert (await loop.run(Task("1", "x"), tmp_path)).status == "failed"


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "link/secret", "sub/../../secret"])
async def test_no_path_leads_out_of_the_folder(tmp_path: Path, path: str):
    work = tmp_path / "work"
    (work / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_text("s")
    (work / "link").symlink_to(tmp_path)
    for tool in (call("read", path=path), call("write", path=path, content="x"), call("list", path=path)):
        assert (await _result(tool, work)).startswith("error: ")
    assert (tmp_path / "secret").read_text() == "s"


async def test_what_is_wrong_with_a_call_is_told_to_the_model(tmp_path: Path):
    assert await _result(call("fly"), tmp_path) == "error: There is no tool 'fly'."
    assert await _result(call("read"), tmp_path) == "error: path must be a text."
    assert await _result({"function": {"name": "read", "arguments": "{"}}, tmp_path) == "error: arguments is not JSON: Expecting property name enclosed in double quotes at 1"
    assert await _result(call("read", path="none"), tmp_path) == "error: No such file or directory"
    assert await _result({}, tmp_path) == "error: There is no tool None."


def test_a_shell_is_offered_only_where_it_can_be_shut_in():
    assert [tool["function"]["name"] for tool in tools(shell=False)] == ["list", "read", "write"]
    assert [tool["function"]["name"] for tool in tools(shell=True)] == ["list", "read", "write", "run"]


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
async def test_the_shell_sees_its_folder_and_no_network(tmp_path: Path):
    work = tmp_path / "work"
    work.mkdir()
    said = await _result(call("run", command="echo hi > here; cat here; touch /etc/x; exit 3"), work)
    if "Operation not permitted" in said or "setting up uid map" in said:
        pytest.skip("this system lets nobody make a sandbox")
    assert said.startswith("hi\n")
    assert said.endswith("[exit status 3]")
    assert (work / "here").read_text() == "hi\n"


async def test_a_loop_that_takes_too_long_is_ended(tmp_path: Path):
    with ScriptedLLM(lambda r: Script(first_after=30)) as llm:
        async with ToolLoop(Endpoint(f"{llm.url}/v1", "m", ""), proxy=None, timeout_s=0.3) as loop:
            began = asyncio.get_running_loop().time()
            assert (await loop.run(Task("1", "x"), tmp_path)).status == "timeout"
            assert asyncio.get_running_loop().time() - began < 5
