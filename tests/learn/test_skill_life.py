"""After it is written: how a skill does, and what a human does with it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from evolve_tools import BODY, START, Model, Talk, add, edits
from sqlalchemy import update

from metaclaw_core.cli.evolve import command as evolve_command
from metaclaw_core.cli.skills import command as skills_command
from metaclaw_core.learn.counters import Figures, age, count_uses, figures
from metaclaw_core.learn.evolve import Evolver
from metaclaw_core.model import Injection
from metaclaw_core.proxy.children import Child
from metaclaw_core.settings import load_settings, skills_settings
from metaclaw_core.skills.library import Library, open_library
from metaclaw_core.skills.skill import Provenance, Skill, Status
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import turns

DAY = 86_400.0


@pytest.fixture
def store(metaclaw_home: Path) -> Iterator[Store]:
    with open_store(metaclaw_home / "store.db") as opened:
        yield opened


def library() -> Library:
    return open_library(skills_settings(load_settings()))


def learned(name: str = "use-pnpm", created: str = "2026-11-23T00:00:00+00:00") -> Skill:
    made = Skill(name, "Use pnpm, never npm.", BODY)
    return replace(made, provenance=Provenance(("s-1",), "m", created, made.content_hash))


def cli(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(skills_command, list(arguments))
    if code == 0:
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# --- figures ----------------------------------------------------------------------------------------


def injected(*skills: str) -> dict[str, Injection]:
    return {"injection": Injection("text", skills, 1)}


def test_uses_are_counted_per_human_turn_and_session_and_unknown_scores_stay_unknown(store: Store) -> None:
    talk = Talk().say("Install a package, please.", call=("exec", "done"), **injected("a", "b"))
    talk.say("And another one, please.", **injected("a")).into(store)
    Talk("s-2", at=START + 50).say("Something else, please.", **injected("b")).into(store)
    assert count_uses(store) == 4
    count_uses(store)  # again adds nothing
    assert figures(store) == {
        "a": Figures(2, 1, START + 3, None, None),
        "b": Figures(2, 2, START + 51, None, None),
    }


def test_scores_are_compared_with_and_without(store: Store) -> None:
    talk = Talk().say("Install a package, please.", **injected("a")).say("And another one, please.", **injected("a"))
    talk.say("And a third one, please.").into(store)
    with store.transaction() as db:
        for number, score in ((1, 1), (2, 0), (3, -1)):
            db.execute(update(turns).where(turns.c.id == number).values(score=score))
    count_uses(store)
    assert figures(store)["a"] == Figures(2, 1, START + 2, 0.5, -1.0)


def test_what_is_not_used_becomes_stale_and_what_is_used_again_active() -> None:
    home = library()
    home.add(learned())
    home.add(replace(learned("by-hand"), provenance=None))
    created = 1_795_392_000.0  # 2026-11-23
    assert age(home, {}, 30, created + 29 * DAY) == ([], [])
    assert age(home, {}, 30, created + 31 * DAY) == (["use-pnpm"], [])
    used = {"use-pnpm": Figures(1, 1, created + 32 * DAY, None, None)}
    assert age(home, used, 30, created + 33 * DAY) == ([], ["use-pnpm"])
    assert [(s.name, s.status) for s in home.scan().usable if s.name in ("by-hand", "use-pnpm")] == [
        ("by-hand", Status.ACTIVE),
        ("use-pnpm", Status.ACTIVE),
    ]


def test_the_listing_shows_the_figures(store: Store) -> None:
    library().add(learned())
    Talk().say("Install a package, please.", **injected("use-pnpm")).into(store)
    rows = {row["name"]: row for row in map(json.loads, cli("list", "--json").output.splitlines())}
    assert rows["use-pnpm"]["injected"] == {
        "turns": 1,
        "sessions": 1,
        "last_used": START + 1,
        "score_with": None,
        "score_without": None,
    }
    assert "score with" in cli("list").output


# --- review -----------------------------------------------------------------------------------------


async def proposed(store: Store, *answers: dict[str, object], status: str = "candidate") -> None:
    Talk().say(
        "Please have a look at the log.", "I will use pnpm, not npm.", call=("exec", "use yarn instead of npm")
    ).into(store)
    quote = "use pnpm, not npm" if status == "candidate" else "use yarn instead of npm"
    evolver = Evolver(store, load_settings(), llm=Model(edits(add("use-pnpm", quote))), clock=lambda: START + 7200)
    await evolver.run()


async def test_a_candidate_is_reviewed_with_its_reason_and_approved(store: Store) -> None:
    await proposed(store)
    [row] = map(json.loads, cli("review", "--json").output.splitlines())
    assert (row["name"], row["status"], row["reasons"]) == (
        "use-pnpm",
        "candidate",
        ["its evidence is the agent's own words"],
    )
    assert "+description: Use pnpm, never npm" in cli("diff", "use-pnpm").output
    assert cli("approve", "use-pnpm").output == "use-pnpm is in use (generation 2).\n"
    assert library().get("use-pnpm", Status.ACTIVE) is not None
    assert cli("review").output == "Nothing waits for review.\n"


async def test_what_is_rejected_does_not_come_back(store: Store) -> None:
    await proposed(store)
    assert cli("reject", "use-pnpm").output == "use-pnpm is rejected (generation 2).\n"
    Talk("s-2", at=START + 60).say("In this repository use pnpm, not npm.").into(store)
    evolver = Evolver(store, load_settings(), llm=Model(edits(add("pnpm-again"))), clock=lambda: START + 9200)
    assert (await evolver.run()).dropped == ("add pnpm-again: it says what 'use-pnpm' said, which was archived",)


async def test_what_is_quarantined_is_approved_only_with_the_word_for_it(store: Store) -> None:
    await proposed(store, status="quarantined")
    refused = cli("approve", "use-pnpm", code=1)
    assert "approve it with --quarantined" in str(refused.exception)
    cli("approve", "use-pnpm", "--quarantined")
    assert library().get("use-pnpm", Status.ACTIVE) is not None


def test_a_name_that_does_not_wait_is_an_error() -> None:
    for action in ("approve", "reject", "diff"):
        assert "review" in str(cli(action, "nothing-of-the-kind", code=1).exception)


def test_asked_for_without_a_model_and_a_proxy_the_work_waits(store: Store) -> None:
    Talk().say("In this repository use pnpm, not npm.").into(store)
    result = CliRunner().invoke(evolve_command, ["--json", "--wait", "0"])
    assert (result.exit_code, json.loads(result.output)["waiting"]) == (4, {"waiting": 1})


def test_an_unknown_session_is_a_sentence(store: Store) -> None:
    result = CliRunner().invoke(evolve_command, ["--session", "nobody"])
    assert str(result.exception) == "There is no session 'nobody'; see `metaclaw sessions`."


# --- the way of a key to the worker -------------------------------------------------------------------

_ECHO = """
import sys
out = open(sys.argv[1], "a")
for line in sys.stdin:
    out.write(line)
    out.flush()
"""


async def test_a_child_is_greeted_at_every_start_and_told_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "echo_child.py").write_text(_ECHO)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    heard = tmp_path / "heard"
    child = Child("echo_child", tmp_path, str(heard), greeting=lambda: [{"type": "hello"}])
    assert child.send({"type": "early"}) is False
    child.start()

    async def lines(count: int) -> list[str]:
        for _ in range(200):
            found = heard.read_text().splitlines() if heard.exists() else []
            if len(found) >= count:
                return found
            await asyncio.sleep(0.05)
        raise AssertionError("the child heard nothing")

    assert await lines(1) == ['{"type": "hello"}']
    assert child.send({"type": "news"}) is True
    assert await lines(2) == ['{"type": "hello"}', '{"type": "news"}']
    assert child.pid is not None
    os.kill(child.pid, 9)
    assert (await lines(3))[2] == '{"type": "hello"}'
    child.stop()
    await asyncio.sleep(0.1)


async def test_the_worker_takes_keys_from_its_stdin_and_ends_with_it(metaclaw_home: Path) -> None:
    from metaclaw_core.parent import until_stdin_closes

    read_end, write_end = os.pipe()
    taken: list[object] = []
    stop = asyncio.Event()
    with os.fdopen(read_end) as stdin:
        original, sys.stdin = sys.stdin, stdin
        try:
            following = asyncio.ensure_future(until_stdin_closes(stop, taken.append))
            os.write(write_end, b'{"type": "caller_key"}\nnonsense\n[1]\n{"type": "caller_refused"}\n')
            os.close(write_end)
            await asyncio.wait_for(following, 5)
        finally:
            sys.stdin = original
    assert taken == [{"type": "caller_key"}, {"type": "caller_refused"}]
    assert stop.is_set()
