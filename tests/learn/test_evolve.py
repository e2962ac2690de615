from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from evolve_tools import BODY, OTHER, START, Model, Talk, add, edits
from sqlalchemy import select

from metaclaw_core.learn.edits import parse_proposal
from metaclaw_core.learn.evolve import Evolver, EvolveReport, is_support, segment_counts
from metaclaw_core.learn.llm import LLMUnavailable
from metaclaw_core.learn.runs import last_runs
from metaclaw_core.settings import Settings, load_settings, skills_settings
from metaclaw_core.skills.library import open_library
from metaclaw_core.skills.skill import Skill, Status
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import segments

LATER = START + 7200
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(metaclaw_home: Path) -> Iterator[Store]:
    with open_store(metaclaw_home / "store.db") as opened:
        yield opened


def corrected(**fields: Any) -> Talk:
    """A session in which the human corrects the agent twice."""
    talk = Talk(**fields).say(
        "Install left-pad in my repository.", "I ran npm install.", call=("exec", "added 1 package")
    )
    talk.say("No. In this repository use pnpm, not npm.", "I ran npm run test after pnpm install.")
    return talk.say("Again: never npm here, run the scripts with pnpm too.", "Understood.")


async def run(store: Store, model: Model, settings: Settings | None = None, **options: Any) -> EvolveReport:
    evolver = Evolver(store, settings or load_settings(), llm=model, clock=lambda: LATER)
    try:
        return await evolver.run(**options)
    finally:
        await evolver.aclose()


def learned(settings: Settings | None = None) -> list[Skill]:
    """What is written, whatever its status."""
    scan = open_library(skills_settings(settings or load_settings())).scan()
    return [s for s in (*scan.skills, *scan.candidates) if s.provenance is not None]


def details(store: Store) -> list[tuple[str, str | None]]:
    with store.reading() as db:
        return [(r.state, r.detail) for r in db.execute(select(segments).order_by(segments.c.ended_at))]


async def test_two_corrections_become_one_skill_with_provenance(store: Store, metaclaw_home: Path) -> None:
    corrected().into(store)
    report = await run(store, Model(edits(add())))
    assert report == EvolveReport(segments=1, asked=1, active=("use-pnpm",))
    [skill] = learned()
    assert skill.status is Status.ACTIVE
    assert skill.triggers == ("install a package",)
    assert skill.body == BODY
    assert skill.provenance is not None
    assert skill.provenance.sessions == ("s-1",)
    assert skill.provenance.model == "m-evolver"
    assert skill.provenance.created == "2026-11-23T22:40:00+00:00"
    assert skill.provenance.digest == skill.content_hash
    assert (metaclaw_home / "skills" / "use-pnpm" / "SKILL.md").stat().st_mode & 0o777 == 0o600
    assert [(r["name"], r["ok"], r["report"]["active"]) for r in last_runs(store)] == [("evolve", True, ["use-pnpm"])]


async def test_a_segment_is_asked_about_once(store: Store) -> None:
    corrected().into(store)
    model = Model(edits(add()))
    await run(store, model)
    assert await run(store, model) == EvolveReport()
    assert len(model.asked) == 1


async def test_the_model_sees_who_said_what_and_never_the_system_prompt(store: Store) -> None:
    talk = Talk().say(
        "Have a look at the page for me.", "It is about trains.", call=("web_fetch", "WEBWORDS about trains")
    )
    talk.say("Please keep such summaries to one sentence.", "Sure.").into(store)
    model = Model(edits())
    await run(store, model)
    [asked] = model.asked
    assert [m["role"] for m in asked] == ["system", "user"]
    heads = [line.split(" ", 1)[1] for line in asked[1]["content"].splitlines() if line.startswith("<<<")]
    assert heads == [
        "turn 1, what the user said, written by: human",
        "turn 1, what the agent said, written by: assistant",
        "turn 1, what the agent did, written by: assistant",
        "turn 1, what the tools brought, written by: tool or web",
        "turn 2, what the user said, written by: human",
        "turn 2, what the agent said, written by: assistant",
    ]
    assert "WEBWORDS" in asked[1]["content"]
    assert "running inside OpenClaw" not in model.text
    assert "Runtime:" not in model.text


async def test_an_answer_in_the_wrong_form_is_repaired_once(store: Store) -> None:
    corrected().into(store)
    model = Model("Sure, here you are!", "```json\n" + json.dumps(edits(add())) + "\n```")
    report = await run(store, model)
    assert (report.asked, report.active) == (1, ("use-pnpm",))
    assert [m["role"] for m in model.asked[1]] == ["system", "user", "assistant", "user"]
    assert "the answer holds no JSON object" in model.asked[1][-1]["content"]


async def test_a_made_up_quote_is_told_and_what_stays_made_up_is_dropped(store: Store) -> None:
    corrected().into(store)
    model = Model(edits(add("use-pnpm", "always use pnpm for everything, please")))
    report = await run(store, model)
    assert report.active == ()
    assert report.dropped == ("add use-pnpm: none of its quotes is in the conversation",)
    assert "is not in the conversation" in model.asked[1][-1]["content"]


async def test_a_model_that_never_answers_in_form_is_given_up_after_five_tries(store: Store) -> None:
    corrected().into(store)
    now = [LATER]
    evolver = Evolver(store, load_settings(), llm=Model("no"), clock=lambda: now[0])
    for _ in range(6):
        await evolver.run()
        now[0] += 30_000
    assert details(store) == [
        ("failed", "The model did not answer in the form that was asked for, and could not repair it.")
    ]


async def test_a_provider_that_is_down_delays_and_loses_nothing(store: Store) -> None:
    corrected().into(store)
    report = await run(store, Model(LLMUnavailable("api.x answered 503: busy")))
    assert report.waiting == {"llm": 1}
    assert details(store) == [("waiting", "waiting(llm): api.x answered 503: busy")]
    assert segment_counts(store) == {"waiting(llm)": 1}
    evolver = Evolver(store, load_settings(), llm=Model(edits(add())), clock=lambda: LATER + 61)
    assert (await evolver.run()).active == ("use-pnpm",)


async def test_a_provider_that_is_down_is_asked_once_a_run(store: Store) -> None:
    for name in ("s-1", "s-2", "s-3"):
        corrected(session=name, key=f"agent:main:{name}").into(store)
    report = await run(store, Model(LLMUnavailable("api.x answered 503: busy")))
    assert (report.asked, report.waiting, report.problems) == (1, {"llm": 3}, ("api.x answered 503: busy",))
    assert details(store) == [("waiting", "waiting(llm): api.x answered 503: busy")] * 3
    model = Model(edits(add()))
    evolver = Evolver(store, load_settings(), llm=model, clock=lambda: LATER + 61)
    assert (await evolver.run()).asked == 3


async def test_without_a_model_and_a_key_the_work_waits(store: Store) -> None:
    corrected().into(store)
    evolver = Evolver(store, load_settings(), clock=lambda: LATER)
    report = await evolver.run()
    assert report.waiting == {"credential": 1}
    assert segment_counts(store) == {"waiting(credential)": 1}
    assert last_runs(store) == []


@pytest.mark.parametrize(
    ("talk", "why"),
    [
        (
            Talk(host="llm.evil.example").say("Always use pnpm, not npm, please."),
            "llm.evil.example:443 is neither a known provider nor in proxy.hosts",
        ),
        (Talk().say("ok", "Fine."), "no human said anything of substance in it"),
        (Talk().say("Always use pnpm, not npm, please.", None), "nothing in it was answered"),
    ],
)
async def test_what_is_no_source_of_skills_is_not_asked_about(store: Store, talk: Talk, why: str) -> None:
    Talk.into(talk, store)
    model = Model(edits(add()))
    assert (await run(store, model)).skipped == 1
    assert (details(store), model.asked) == ([("skipped", why)], [])


async def test_a_host_that_the_user_lists_is_a_source(store: Store) -> None:
    corrected(host="127.0.0.1", port=8080, scheme="http").into(store)
    assert (await run(store, Model(edits(add())))).skipped == 1
    corrected(session="s-2", host="127.0.0.1", port=8080, scheme="http", at=START + 50).into(store)
    settings = load_settings({"proxy": {"hosts": ["127.0.0.1:8080"]}})
    assert (await run(store, Model(edits(add())), settings)).active == ("use-pnpm",)


async def test_in_rl_mode_only_support_sessions_write_skills(store: Store) -> None:
    names = [f"s-{n}" for n in range(40)]
    support = [name for name in names if is_support(name, 0.25)]
    assert 4 <= len(support) <= 16
    for at, name in enumerate(names):
        corrected(session=name, key=f"agent:main:{name}", at=START + 60 * at).into(store)
    settings = load_settings({"mode": "rl"})
    evolver = Evolver(store, settings, llm=Model(edits()), clock=lambda: LATER + 7200)
    reports = [await evolver.run() for _ in range(3)]
    assert sum(r.asked for r in reports) == len(support)


async def test_the_same_lesson_again_is_not_written_twice(store: Store) -> None:
    corrected().into(store)
    await run(store, Model(edits(add())))
    corrected(session="s-2", at=START + 100).into(store)
    report = await run(store, Model(edits(add("pnpm-only"))))
    assert report.dropped == ("refine use-pnpm: 'use-pnpm' says so already",)
    assert [s.name for s in learned()] == ["use-pnpm"]


async def test_a_similar_lesson_refines_the_skill_that_is_there(store: Store) -> None:
    corrected().into(store)
    await run(store, Model(edits(add())))
    corrected(session="s-2", at=START + 100).into(store)
    more = BODY + "\n\nRun the scripts with pnpm too."
    report = await run(store, Model(edits(add("pnpm-only", "run the scripts with pnpm too", body=more))))
    assert report.active == ("use-pnpm",)
    [skill] = learned()
    assert skill.body == more
    assert skill.provenance is not None
    assert skill.provenance.sessions == ("s-1", "s-2")


async def test_a_refinement_changes_places_and_a_retirement_archives(store: Store) -> None:
    corrected().into(store)
    await run(store, Model(edits(add())))
    talk = Talk("s-2", at=START + 100).say("For the lock file review you may use yarn and pnpm.", "Fine.").into(store)
    change = {"old": "Avoid npm and yarn here,", "new": "Avoid npm here,"}
    refine = {
        "op": "refine",
        "name": "use-pnpm",
        "changes": [change],
        "evidence": [{"quote": "lock file review you may use yarn"}],
    }
    assert (await run(store, Model(edits(refine)))).active == ("use-pnpm",)
    assert learned()[0].body == BODY.replace("npm and yarn", "npm")
    talk = Talk("s-3", at=START + 200).say("Forget the rule about pnpm in this repository, it is gone.", "Fine.")
    talk.into(store)
    retire = {
        "op": "retire",
        "name": "use-pnpm",
        "why": "gone",
        "evidence": [{"quote": "Forget the rule about pnpm in this repository"}],
    }
    assert (await run(store, Model(edits(retire)))).retired == ("use-pnpm",)
    assert learned()[0].status is Status.ARCHIVED


async def test_what_a_human_has_edited_is_changed_by_a_human(store: Store, metaclaw_home: Path) -> None:
    corrected().into(store)
    await run(store, Model(edits(add())))
    file = metaclaw_home / "skills" / "use-pnpm" / "SKILL.md"
    file.write_text(file.read_text() + "\nMy own line.\n")
    corrected(session="s-2", at=START + 100).into(store)
    more = BODY + "\n\nRun the scripts with pnpm too."
    report = await run(store, Model(edits(add("pnpm-only", "run the scripts with pnpm too", body=more))))
    assert (report.active, report.review) == ((), ("use-pnpm",))
    assert "My own line." in file.read_text()


async def test_with_admission_review_everything_waits(store: Store) -> None:
    corrected().into(store)
    report = await run(store, Model(edits(add())), load_settings({"skills": {"admission": "review"}}))
    assert (report.active, report.review) == ((), ("use-pnpm",))


async def test_secrets_reach_neither_the_model_nor_a_file(store: Store, metaclaw_home: Path) -> None:
    canary = "sk-proj-Canary0123456789abcdefCANARY"
    talk = Talk().say(f"Use pnpm, not npm. My key is {canary} by the way.", "Yes.", call=("exec", f"KEY={canary}"))
    talk.into(store)
    model = Model(edits(add(body=f"{BODY} The key is {canary}.")))
    await run(store, model)
    store.close()
    assert model.asked
    assert canary not in model.text
    holders = [f for f in metaclaw_home.rglob("*") if f.is_file() and canary.encode() in f.read_bytes()]
    assert holders == []


async def test_one_run_gets_through_more_sessions_than_it_takes_at_a_time(store: Store) -> None:
    for n in range(25):
        Talk(f"s-{n}", key=f"agent:main:{n}").say(f"What is the weather like in town number {n}?").into(store)
    model = Model(edits())
    report = await run(store, model)
    assert (report.segments, report.asked, len(model.asked)) == (25, 25, 25)
    assert {state for state, _ in details(store)} == {"done"}


async def test_two_evolvers_at_once_write_one_skill(store: Store) -> None:
    corrected().into(store)
    reports = await asyncio.gather(
        *(run(store, Model(edits(add())), wait_s=20.0) for _ in range(2)), return_exceptions=False
    )
    assert sorted(r.active for r in reports) == [(), ("use-pnpm",)]
    assert len(open_library(skills_settings(load_settings())).history()) == 1


_KILLED = """
import asyncio, os, signal, sys
sys.path.insert(0, {tests!r})
from evolve_tools import Model, add, edits
from metaclaw_core.learn.evolve import Evolver
from metaclaw_core.settings import load_settings, home
from metaclaw_core.store.db import open_store
left = int(sys.argv[1])
def step(name):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
async def main():
    with open_store(home() / "store.db") as store:
        llm = Model(edits(add(), {other!r}))
        await Evolver(store, load_settings(), llm=llm, clock=lambda: {later!r}, step=step).run(wait_s=0)
asyncio.run(main())
"""
_BACKUP = add(
    "ask-before-install",
    "never npm here, run the scripts with pnpm",
    description="Run scripts with pnpm as well, never with npm.",
    body="Scripts of the package file are run through pnpm, each and every one of them, also in hooks and in the build. "
    "A script that calls another tool by name is changed first, so that nobody meets the wrong tool by accident. Say which "
    "script you changed, and run it once before you report back.",
)


@pytest.mark.slow
def test_killed_at_any_step_nothing_is_written_twice_or_by_halves(store: Store, metaclaw_home: Path) -> None:
    corrected().into(store)
    code = _KILLED.format(tests=str(Path(__file__).parent), later=LATER, other=_BACKUP)
    environment = {**os.environ, "METACLAW_HOME": str(metaclaw_home), "PYTHONPATH": str(ROOT)}
    killed = 0
    for point in range(1, 20):
        with store.transaction() as db:  # the lease of the one that was killed runs out after a minute
            db.exec_driver_sql("DELETE FROM leases")
        done = subprocess.run([sys.executable, "-c", code, str(point)], env=environment, timeout=60, check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        killed += 1
    assert killed >= 2
    assert sorted(s.name for s in learned()) == ["ask-before-install", "use-pnpm"]
    library = open_library(skills_settings(load_settings()))
    assert library.scan().problems == ()
    assert [c.action for c in library.history()] == ["add", "add"]
    assert [state for state, _ in details(store)] == ["done"]


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (add(body="Too short."), "edit 1: the body has 2 words; 40 to 600 are allowed"),
        (add(body="word " * 601), "edit 1: the body has 601 words; 40 to 600 are allowed"),
        (
            add("Not A Name"),
            "edit 1: \"name\" must be 1 to 64 lower-case letters, digits and single hyphens, not 'Not A Name'",
        ),
        (add(description="two\nlines"), 'edit 1: "description" must be one line of at most 300 characters'),
        (add(evidence=[]), 'edit 1: "evidence" must be a list of {"quote": words copied from the conversation}'),
        ({"op": "delete"}, 'edit 1: "op" is \'delete\', not "add", "refine" or "retire"'),
        ({**add(), "op": "refine"}, "edit 1: there is no skill 'use-pnpm' to refine"),
    ],
)
def test_a_faulty_edit_is_a_sentence_for_the_model(edit: dict[str, Any], fault: str) -> None:
    proposal = parse_proposal(json.dumps(edits(edit)), {})
    assert (proposal.edits, proposal.faults[0]) == ((), fault)


def test_a_fault_does_not_take_the_other_edits_along() -> None:
    proposal = parse_proposal(f"Here: {json.dumps(edits(add(body='no'), add('good-one')))} Good luck!", {})
    assert [e.name for e in proposal.edits] == ["good-one"]


async def test_a_copied_session_line_under_another_key_waits_for_review(store: Store) -> None:
    corrected().into(store)
    forged = corrected(at=START + 30, principal=OTHER).into(store)
    assert forged.session == "s-1"
    report = await run(store, Model(edits(), edits(add())))
    assert (report.active, report.review) == ((), ("use-pnpm",))
