"""Siblings of logged prompts, sampled and trained on through the real SDK on the real engine, judged by rule over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judge_tools import client_of
from learns_help import Judge, is_good, make_speller
from policy_help import RunningEngine, close_rest, running_engine
from sqlalchemy import func, insert, select
from training_help import put, server, settings, trainer

from metaclaw_core.learn import journal
from metaclaw_core.learn.groups import Prompt
from metaclaw_core.learn.judge import prompt_version
from metaclaw_core.learn.ranking import Asked
from metaclaw_core.learn.siblings import Reader
from metaclaw_core.learn.trainer import Sampled
from metaclaw_core.learn.training import Trainer
from metaclaw_core.settings import Settings
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.samplefile import pack_ids
from metaclaw_core.store.tables import health, route_events, samples, spend, step_turns, steps, turns, versions, votes
from metaclaw_core.testing import Received, Script, ScriptedLLM

pytestmark = [pytest.mark.local, pytest.mark.slow]
STEPS = 25
REPLY_TOKENS = 24


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    with running_engine(make_speller(tmp_path_factory.mktemp("speller") / "model"), tmp_path_factory.mktemp("speller-home")) as running:
        yield running
        close_rest(running)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "store.db") as opened:
        yield opened


def ids_of(engine: RunningEngine, text: str) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(engine.model)
    said = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
    return [int(id) for id in said]


def ask(store: Store, engine: RunningEngine, first: int, count: int, **fields: Any) -> list[int]:
    """So many people have asked something, and their turns were scored."""
    found = []
    for n in range(first, first + count):
        values = {"user_text": f"Spell {n}", "base_model": engine.model, "session": f"s{n % 8}", "reward": None}
        values["sampling"] = {"temperature": 1.0, "max_tokens": REPLY_TOKENS}
        found.append(put(store, n, ids_of(engine, f"Spell {n}"), (70, 2), (-4.0, -1.0), **(values | fields)))
    return found


def sibling_settings(engine: RunningEngine, **rl: Any) -> Settings:
    values = {"algorithm": "grpo", "batch_size": 48, "group_size": 6, "lora_rank": 8} | rl
    said = settings(engine, **values)
    return said.model_copy(update={"judge": said.judge.model_copy(update={"votes": 1})})


@contextmanager
def learning(store: Store, engine: RunningEngine, home: Path, judge: Callable[[Received], Script], **more: Any) -> Iterator[Trainer]:
    said = sibling_settings(engine, **more.pop("rl", {}))
    with ScriptedLLM(judge) as llm:
        yield trainer(store, said, home, server=server(said), judge=client_of(llm, store), **more)


async def share_of_good(engine: RunningEngine) -> float:
    """Of 240 replies of the base model: where every run starts."""
    where = server(sibling_settings(engine))
    reader = Reader(await where.tokenizer())
    said = []
    for n in range(4):
        ids = ids_of(engine, f"Spell {n}")
        replies = await where.sample(None, ids, n=60, max_tokens=REPLY_TOKENS, stop_ids=reader.stop_ids)
        said += [reader.read(prompt_of(ids), reply)[1].message.text for reply in replies]
    await where.aclose()
    return sum(map(is_good, said)) / len(said)


def prompt_of(ids: Sequence[int], **fields: Any) -> Prompt:
    values = {"turn": 1, "session": "s", "split_by": "s", "created_at": 0.0, "ids": np.asarray(ids, np.int32), "max_tokens": REPLY_TOKENS}
    values |= {"stops": (), "tools": False, "asked": Asked("Spell."), "text": "Spell.", "agent": "a/main"}
    return Prompt(**(values | fields))


def rows(store: Store, query: Any) -> list[tuple[Any, ...]]:
    with store.reading() as db:
        return [tuple(row) for row in db.execute(query)]


async def test_the_model_learns_from_siblings_what_the_judge_likes(speller: RunningEngine, store: Store, tmp_path: Path):
    judge, means, asked = Judge(is_good), [], 0
    with learning(store, speller, tmp_path, judge) as train:
        for _ in range(STEPS):
            await asyncio.to_thread(ask, store, speller, asked, 8)
            asked += 8
            report = await train.run_once()
            [(metrics,)] = rows(store, select(steps.c.metrics).where(steps.c.id == report.step))
            means.append(metrics["reward_mean"])
            assert metrics["turns"] == 48
            assert report.made or means[-1] == 1.0, report  # where all are good there is nothing to learn
            assert not report.made or abs(metrics["ratio_mean"] - 1) < 1e-4  # sampled from the very weights
            if means[-1] >= 0.9:
                break
        await train.aclose()
    assert await share_of_good(speller) <= 0.35
    assert means[-1] >= 0.9, means
    # What was claimed are the prompts, each once; of the siblings nothing is in the store but what they cost.
    claimed = rows(store, select(step_turns.c.turn, step_turns.c.reason, turns.c.state, turns.c.reason).join(turns, turns.c.id == step_turns.c.turn))
    assert len({turn for turn, *_ in claimed}) == len(claimed) == asked
    assert {(reason, state, why) for _, reason, state, why in claimed} <= {
        (None, "trained", None),
        ("its siblings earned the same", "skipped", "training: its siblings earned the same"),
    }
    assert rows(store, select(func.count()).select_from(turns)) == rows(store, select(func.count()).select_from(samples)) == [(asked,)]
    assert rows(store, select(func.count()).select_from(votes)) == [(0,)]
    booked = dict(rows(store, select(spend.c.purpose, spend.c.requests)))
    assert booked["sibling"] >= 8 * len(means)
    assert booked["judge"] >= 48 * len(means)
    assert len(judge.replies) == booked["judge"]


def test_a_sibling_is_read_as_the_client_would_have_had_it(speller: RunningEngine):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(speller.model)
    reader = Reader(tokenizer)

    def read(text: str, *, ended: bool = True, **fields: Any) -> tuple[int, str, bool, bool]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        sampled = Sampled(tuple(ids), np.zeros(len(ids), np.float32), ended)
        counts, reply = reader.read(prompt_of(tokenizer.encode(fields.pop("prompt", "?"), add_special_tokens=False), **fields), sampled)
        assert len(counts.tokens) == len(counts.logprobs)
        return len(counts.tokens), reply.message.text, reply.cut, reply.malformed

    assert read("abcd<|im_end|>") == (5, "abcd", False, False)
    assert read("abcd", ended=False) == (4, "abcd", True, False)
    assert read("abcd", ended=False, stops=("bc",)) == (3, "a", False, False)  # its end was the client's own word
    call = '<tool_call>{"name": </tool_call><|im_end|>'
    assert read(call)[2:] == (False, False)  # without tools it is text
    assert read(call, tools=True)[2:] == (False, True)
    assert read("so</think>abcd<|im_end|>", prompt="? <think>\n")[1] == "abcd"


async def test_groups_that_tell_nothing_apart_make_no_step_and_say_so(speller: RunningEngine, store: Store, tmp_path: Path):
    with learning(store, speller, tmp_path, Judge(lambda _: True)) as train:
        ask(store, speller, 0, 8)
        report = await train.run_once()
        again = await train.run_once()
        await train.aclose()
    assert (report.made, report.waits) == (False, "the batch held nothing to learn: no signal")
    assert (again.made, again.waits) == (False, "0 of 8 prompts are there")
    assert set(rows(store, select(turns.c.state, turns.c.reason))) == {("skipped", "training: its siblings earned the same")}
    assert rows(store, select(versions.c.id)) == [(1,)]
    assert rows(store, select(steps.c.state, steps.c.error)) == [("abandoned", "no signal")]
    assert journal.carried(store, "tracker")["rewards"] == 48  # that all went well is worth knowing


async def test_a_limit_that_is_reached_stops_after_the_call_in_hand(speller: RunningEngine, store: Store, tmp_path: Path):
    """Nobody knows what the judge costs, which is seen once it was asked."""
    judge = Judge(is_good)
    with learning(store, speller, tmp_path, judge, rl={"daily_budget_usd": 1.0}) as train:
        ask(store, speller, 0, 8)
        report = await train.run_once()
        asked = len(judge.replies)
        again = await train.run_once()
        await train.aclose()
    assert not report.made
    assert report.waits == again.waits == "rl.daily_budget_usd is set, and the price of judge-1 is not known: add it to prices.yaml in METACLAW_HOME."
    assert len(judge.replies) == asked == 1
    assert set(rows(store, select(turns.c.state))) == {("scored",)}
    assert rows(store, select(steps.c.state)) == [("abandoned",)]


async def test_a_judge_that_is_down_costs_no_prompt(speller: RunningEngine, store: Store, tmp_path: Path):
    rule, down = Judge(is_good), True
    with learning(store, speller, tmp_path, lambda received: Script(status=503) if down else rule(received), retry_s=0) as train:
        ask(store, speller, 0, 8)
        failed = await train.run_once()
        assert not failed.made
        assert "answered 503" in str(failed.waits)
        assert failed.problems == (failed.waits,)
        assert set(rows(store, select(turns.c.state))) == {("scored",)}
        down = False
        report = await train.run_once()
        await train.aclose()
    assert report.made, report
    assert rows(store, select(steps.c.state).order_by(steps.c.id)) == [("abandoned",), ("routed",)]


async def test_a_prompt_that_the_server_cant_take_is_left_out(speller: RunningEngine, store: Store, tmp_path: Path):
    with learning(store, speller, tmp_path, Judge(is_good)) as train:
        [long] = ask(store, speller, 99, 1)
        with store.transaction() as db:  # the model takes 512 tokens
            db.execute(samples.update().where(samples.c.flow_id == "f99").values(prompt_ids=pack_ids([10] * 600)))
        ask(store, speller, 0, 7)
        report = await train.run_once()
        await train.aclose()
    assert report.made, report
    [(reason,)] = rows(store, select(turns.c.reason).where(turns.c.id == long))
    assert reason.startswith("training: it can't be answered: ")


# --- killed -----------------------------------------------------------------------------------------

KILLED_AT = ("sampled", "judged", "state saved", "saved", "published", "decided")  # the rest: test_training_killed
POINTS = (
    "opened", "claimed", "sampled", "judged", "forward", "taught", "before step", "stepped", "state saved", "saved", "before publish",
    "weights saved", "published", "before checks", "checked", "decided", "route published", "done",
)  # fmt: skip


@contextmanager
def forks() -> Iterator[Callable[[list[dict[str, Any]]], list[int]]]:
    """Runs trainers side by side, each in a process of its own; gives their exit statuses."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("METACLAW_")}
    environment |= {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("kill_tools.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None
        assert stdout.readline() == "ready\n"

        def run(asked: list[dict[str, Any]]) -> list[int]:
            print(json.dumps(asked), file=stdin, flush=True)
            return list(json.loads(stdout.readline()))

        try:
            yield run
        finally:
            process.kill()


def examined(store: Store, said: Settings, url: str) -> None:
    """The judge has passed."""
    judge = {"url": f"{url}/v1/chat/completions", "models": ["judge-1"], "prompts": [prompt_version("judge"), prompt_version("pair")]}
    with store.transaction() as db:
        db.execute(insert(health).values(name="judge", ok=True, reason=None, checked_at=0.0, detail={"judge": judge, "result": {}}))


def test_killed_at_any_point_no_prompt_is_used_twice_and_none_is_lost(speller: RunningEngine, tmp_path: Path):
    """Replies are drawn anew after a kill, so the weights differ; what must not is which prompts a step of the lineage claimed."""
    with ScriptedLLM(Judge(lambda reply: sum(map(ord, reply)) % 2 == 0)) as llm, forks() as run:
        judge = {"prm_url": f"{llm.url}/v1", "prm_model": "judge-1", "prm_api_key": "k-0123456789"}
        said = sibling_settings(speller, batch_size=16, group_size=8, learning_rate=1e-4, **judge)
        begun = tmp_path / "begun"
        begun.mkdir()
        with open_store(begun / "store.db") as store:
            prompts = ask(store, speller, 0, 4)
            examined(store, said, llm.url)
        homes = [Path(shutil.copytree(begun, tmp_path / name.replace(" ", "-"))) for name in ("whole", *KILLED_AT)]
        common = {"how": "kill", "steps": 2, "settings": said.model_dump(mode="json")}
        exits = run([{"home": str(home), "kills": kills, **common} for home, kills in zip(homes, ([], *([name] for name in KILLED_AT)), strict=True)])
        assert exits == [0, *[-signal.SIGKILL] * len(KILLED_AT)]
        told = json.loads((homes[0] / "told.json").read_text())
        assert tuple(told["points"][: len(POINTS)]) == POINTS
        for home, name in zip(homes[1:], KILLED_AT, strict=True):
            check_cut(home, name)
        assert run([{"home": str(home), **common} for home in homes[1:]]) == [0] * len(KILLED_AT)
        for home in homes:
            check_done(home, prompts)


def check_cut(home: Path, name: str) -> None:
    with open_store(home / "store.db") as store:
        states = [state for (state,) in rows(store, select(turns.c.state).order_by(turns.c.id))]
        assert len(journal.open_steps(store)) == (name != "decided")
        saved = POINTS.index(name) >= POINTS.index("saved")
        assert states.count("batched") == (0 if saved else 2)
        assert states.count("scored") == 2
        with store.transaction() as db:
            db.exec_driver_sql("DELETE FROM leases")


def check_done(home: Path, prompts: Sequence[int]) -> None:
    with open_store(home / "store.db") as store:
        assert journal.open_steps(store) == []
        current = journal.in_force(store)
        assert current is not None
        ended = rows(store, select(turns.c.id, turns.c.state, turns.c.reason).order_by(turns.c.id))
        assert [turn for turn, _, _ in ended] == list(prompts)  # none lost, and no sibling among them
        assert {(state, why) for _, state, why in ended} <= {("trained", None), ("skipped", "training: its siblings earned the same")}
        lineage: list[int] = []
        number: int | None = current.working
        while number is not None:
            [(step, number)] = rows(store, select(versions.c.step, versions.c.parent).where(versions.c.id == number))
            lineage += [turn for (turn,) in rows(store, select(step_turns.c.turn).where(step_turns.c.step == step, step_turns.c.reason.is_(None)))]
        assert sorted(lineage) == [turn for turn, state, _ in ended if state == "trained"]
        [(newest,)] = rows(store, select(func.max(route_events.c.id)))
        assert newest == current.generation
