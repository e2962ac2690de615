"""The real OpenClaw, nothing configured: what its user corrects twice becomes a skill that the next session gets.

The provider is a known one, so that even ``proxy.hosts`` is unset. The scripted LLM answers the agent's turns and the
worker's question alike; the worker reaches it under the provider's own name (fixed_names.py) with the key that it got
from the proxy. The session ends as a user ends one: OpenClaw gives its key a new session id.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from e2e_tools import environment
from fixed_names import site_folder
from openclaw_tools import KIT, Message, Pair, RecordingLLM, Stage, _run
from skills_ref.validator import validate as reference_validate

from metaclaw_core.skills.skill import parse

pytestmark = [pytest.mark.openclaw, pytest.mark.slow]

ASKED = b"You keep the skills of an AI agent"
NAME = "lint-with-zarniwoop"
BODY = (
    "When you check code in this project, run zarniwoop, which holds the rules that everybody here agreed on. Fix what it "
    "reports before you say that a task is done, and name each rule that you had to silence together with the reason. Do "
    "not run flake8 in this project: its rules contradict ours, and people get reports that nobody follows."
)
FIRST = "No, lint this project with zarniwoop, not with flake8."
SECOND = "Again: always run zarniwoop before you say the lint is clean."
EDIT = {
    "op": "add",
    "name": NAME,
    "description": "Lint this project with zarniwoop, never with flake8, before a task counts as done.",
    "body": BODY,
    "triggers": ["lint this project"],
    "evidence": [{"quote": FIRST}, {"quote": SECOND}],
}


def evolver(kit: ModuleType, turns: list[Any], body: dict[str, Any]) -> Any:
    """The lesson where it is asked for; the kit's own answers elsewhere."""
    if any(ASKED.decode() in turn.text for turn in turns):
        return kit.Reply("Here is what I learned:\n" + json.dumps({"edits": [EDIT]}))
    return None


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setenv("PYTHONPATH", str(site_folder(tmp_path / "site", KIT / "ca/ca.pem")))
    with RecordingLLM(evolver) as llm:
        monkeypatch.setenv("KIT_LLM_HOSTS", "api.openai.com,api.anthropic.com")
        monkeypatch.setenv("LLM_TLS_PORT", str(llm.tls_port))
        with Stage(tmp_path, llm) as stage:
            yield stage


def questions(stage: Stage) -> list[Message]:
    return [message for message in list(stage.llm.received) if ASKED in message.body]


def turns(stage: Stage) -> list[Pair]:
    before = {message.trace: message for message in stage.sent()}
    return [Pair(before[m.trace], m) for m in list(stage.llm.received) if m.dialect != "other" and m.trace in before]


@pytest.mark.parametrize(
    ("model", "header", "key"),
    [
        ("anthropic/claude-opus-4-6", "x-api-key", "sk-ant-api03-fake-0000"),
        ("openai/gpt-5.5", "authorization", "Bearer sk-fake-openai-0000"),
    ],
)
def test_two_corrections_become_one_skill_that_the_next_session_gets(stage: Stage, model: str, header: str, key: str) -> None:
    assert not (stage.home / "config.yaml").exists()
    for text in ("Please lint this project for me.", FIRST, SECOND, "Thank you, that is all for today."):
        stage.post(text, model, "work")
    assert not questions(stage)
    before = _skills(stage)
    stage.call("sessions.reset", key="agent:main:work")
    stage.post("What can you tell me about the weather?", model, "work")

    file = stage.home / "skills" / NAME / "SKILL.md"
    stage.wait_for(file.exists, 90)
    assert [path.name for path in (stage.home / "skills").iterdir() if not path.name.startswith(".")] == [NAME]
    assert reference_validate(file.parent) == []
    skill = parse(file.read_text())
    assert (skill.name, skill.description, skill.body) == (NAME, EDIT["description"], BODY)
    assert skill.provenance is not None
    first = next(row for row in map(json.loads, _lines(stage, "sessions", "--json")) if row["session_key"] == "agent:main:work")
    assert skill.provenance.sessions == (first["session_id"],)
    assert skill.provenance.digest == skill.content_hash
    assert skill.provenance.model == model.partition("/")[2]

    (question,) = questions(stage)
    assert question.header(header) == key  # the caller's own, at the caller's own origin
    assert question.trace is None
    secret = key.removeprefix("Bearer ").encode()
    assert [path for path in stage.home.rglob("*") if path.is_file() and secret in path.read_bytes()] == []

    stage.wait_for(lambda: _skills(stage) == before + 1)
    stage.post("Please lint this project for me.", model, "next")
    assert f"### {NAME}\n" in (turns(stage)[-1].block or "")
    assert len(questions(stage)) == 1


def _skills(stage: Stage) -> int:
    """How many the proxy may inject."""
    (line,) = _lines(stage, "status", "--json")
    count: int = json.loads(line)["skills"]["count"]
    return count


def _lines(stage: Stage, *arguments: str) -> list[str]:
    return _run([str(Path(sys.executable).with_name("metaclaw")), *arguments], environment(stage.home), stage.folder).splitlines()
