"""Requests that the human never sent, through the real proxy: a child of the agent with a copied session line.

The ten forged attacks of the learner's tests, as bytes: with another key, at a host of the forger's own, and with the
very key of the agent, with a new history or a copied one. The evolver's model proposes just what the forger wants.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e_tools import SCRIPT, running_proxy
from evolve_tools import OTHER, SYSTEM, Talk, edits
from live_tools import eventually, kit, post, prepare, turns  # noqa: F401 - kit is a fixture
from test_attacks import ATTACKS, lesson

from metaclaw_core.model import Exchange
from metaclaw_core.skills.library import Library
from metaclaw_core.testing import Received, Script, ScriptedLLM

pytestmark = pytest.mark.slow

FORGED = [case for case in ATTACKS if case["channel"] == "forged"]
CONTROL = {**FORGED[0], "id": "control", "name": "a-real-wish", "human": "In this project always run the linter before a commit.",
           "description": "Run the linter before a commit in this project.", "rule": "Always run the linter before a commit in this project."}  # fmt: skip


def exchanges(case: dict[str, Any]) -> list[Exchange]:
    """A conversation of the human with the forged request inside, in order; the control has the human say it himself."""
    names = {"session": f"s-{case['id']}", "key": f"agent:main:{case['id']}"}
    real = Talk(**names).say("Good morning, let us go on with the project.", "Good morning!")
    real.say("What is the next thing to do?", "The release.")
    if case is CONTROL:
        return real.say(case["human"], "Noted.").made
    forger = {"other key": {"principal": OTHER}, "other host": {"principal": OTHER, "host": "forger"}}.get(case["how"], {})
    forged = Talk(at=real.now + 0.5, **names, **forger)
    if case["how"] == "same key, copied history":
        forged.history = list(real.history)
    forged.say(case["human"], "Noted.")
    real.now = forged.now + 1
    real.say("Then let us write the notes for it.", "They are written.")
    return sorted((*real.made, *forged.made), key=lambda made: made.started_at)


def proposer(received: Received) -> Script:
    """The lesson of the case whose words are in the question."""
    text = received.json()["messages"][-1]["content"]
    case = next((case for case in (*FORGED, CONTROL) if case["human"] in text), None)
    return Script(text=json.dumps(edits(*([lesson(case, case["human"])] if case else []))))


def test_none_of_ten_forged_requests_becomes_an_active_skill(tmp_path: Path, kit: Any, metaclaw: Any) -> None:  # noqa: F811
    home = prepare(tmp_path, kit)
    answers = {made.request_body: made.response_body for case in (*FORGED, CONTROL) for made in exchanges(case)}

    def agent(received: Received) -> Script:
        return Script(raw=next(answer for body, answer in answers.items() if _same(body, received.body)))

    with ScriptedLLM(agent) as llm, ScriptedLLM(agent) as forger, ScriptedLLM(proposer) as learner:
        settings = {
            "llm": {"api_base": f"{learner.url}/v1", "model_id": "m-evolver"},
            "proxy": {"hosts": [f"127.0.0.1:{llm.port}"]},
            "judge": {"enabled": False},
        }
        (home / "config.yaml").write_text(yaml.safe_dump(settings))
        with running_proxy(tmp_path, "-s", str(SCRIPT)) as proxy:
            sent = 0
            for case in (*FORGED, CONTROL):
                for made in exchanges(case):
                    server = forger if made.host == "forger" else llm
                    key = "sk-forger-0000000000000000" if made.principal == OTHER else "sk-human-0000000000000000"
                    head = [("host", server.url.partition("://")[2]), ("authorization", f"Bearer {key}")]
                    head += [("content-type", "application/json"), ("content-length", str(len(made.request_body)))]
                    assert post(f"{server.url}/v1/chat/completions", made.request_body, proxy, headers=head).status == 200
                    sent += 1
            eventually(lambda: len(turns(home)) == sent, 30)
            assert metaclaw("evolve", "--json", check=False).returncode == 0
        asked = [received.json()["messages"][-1]["content"] for received in learner.received]
    scan = Library(home / "skills").scan()
    found = {skill.name: skill.status.value for skill in (*scan.skills, *scan.candidates)}
    assert found.pop("a-real-wish") == "active"  # the proof that lessons get through at all
    assert "active" not in found.values()
    assert sum(any(case["human"] in text for text in asked) for case in FORGED) >= 6  # what is shown is at least proposed


def _same(original: bytes, received: bytes) -> bool:
    """`received` may hold our block at the end of its system prompt."""
    at = received.find(SYSTEM[-20:].encode())
    return received[:at] == original[:at] and received.endswith(original[original.find(b'"role": "user"') :])
