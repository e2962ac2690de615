"""Siblings where something fails: the server for one prompt or for all, the judge for a while or for good. Nothing is sampled for real."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judge_tools import client_of

pytest.importorskip("tinker")
pytest.importorskip("transformers")

from training_help import put

from metaclaw_core.learn import journal
from metaclaw_core.learn.batch import build
from metaclaw_core.learn.groups import Siblings
from metaclaw_core.learn.guards import Guards
from metaclaw_core.learn.prices import Prices
from metaclaw_core.learn.siblings import SiblingSource
from metaclaw_core.learn.trainer import Sampled, ServerError
from metaclaw_core.settings import Settings
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.testing import Received, Script, ScriptedLLM

A, B, END = 3, 4, 1


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "store.db") as store:
        yield store


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"?": 0, "<end>": END, "ask": 2, "a": A, "b": B}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "?")), eos_token="<end>", unk_token="?")


class Server:
    """Says "a" and "b" in turn, unless `fails` knows an error for the prompt's first id."""

    base_model = "m"

    def __init__(self, fails: Callable[[Sequence[int]], ServerError | None] = lambda _: None, *, empty: bool = False) -> None:
        self.fails, self.asked, self.empty = fails, 0, empty

    async def tokenizer(self) -> Any:
        return tokenizer()

    async def sample(self, path: str | None, prompt: Sequence[int], *, n: int, max_tokens: int, stop_ids: Sequence[int]) -> list[Sampled]:
        self.asked += 1
        if (error := self.fails(prompt)) is not None:
            raise error
        said = [((A, END), (B, END))[i % 2] for i in range(n)]
        if self.empty:
            said[-1] = ()  # type: ignore[assignment] - a server that does not count the end among the tokens
        return [Sampled(tokens, np.full(len(tokens), -1.0, np.float32), True) for tokens in said]


class Judge:
    """Likes "a". `does`: what it answers instead to each question: its number from 1, what is shown."""

    def __init__(self, does: Callable[[int, str], Script | None] = lambda _, __: None) -> None:
        self.does, self.asked = does, 0

    def __call__(self, received: Received) -> Script:
        self.asked += 1
        shown = received.json()["messages"][-1]["content"]
        reply = shown.split("<<<")[-1].split("\n")[1].strip()
        return self.does(self.asked, shown) or Script(text=json.dumps({"score": 1 if reply == "a" else -1}))


@asynccontextmanager
async def sources(store: Store, server: Server, judge: Judge, **rl: Any) -> AsyncIterator[SiblingSource]:
    values = {"model": "m", "batch_size": 8, "group_size": 4, "support_share": 0, "tinker_base_url": "http://127.0.0.1:1", **rl}
    settings = Settings.model_validate({"mode": "rl", "rl": values, "judge": {"votes": 1}})
    guards = Guards(store, settings, Prices(), judged=False, taught=False)
    with ScriptedLLM(judge) as llm:
        client = client_of(llm, store)
        yield SiblingSource(store, settings, server, guards, client, taught=False, at=lambda _: None)  # type: ignore[arg-type] - no real server
        await client.aclose()


def log(store: Store, n: int, first: int = 2) -> int:
    """Someone asked, and the turn was scored. `first`: the prompt's first id."""
    return put(store, n, (first, 2), (A, END), (-1.0, -1.0), user_text=f"Say {n}.", sampling={"temperature": 1.0, "max_tokens": 5})


async def work(source: SiblingSource, store: Store) -> Siblings | str:
    base = journal.begin(store, "m")
    prompts, why, _ = source.choose(base)
    assert prompts is not None, why
    return await source.work(base, prompts)


def refuses(first: int, kind: str = "refused") -> Callable[[Sequence[int]], ServerError | None]:
    return lambda prompt: ServerError(kind, "no") if prompt[0] == first and len(prompt) > 1 else None


# --- the server -----------------------------------------------------------------------------------


async def test_a_server_that_fails_for_a_moment_costs_no_prompt(opened: Store) -> None:
    log(opened, 0)
    log(opened, 1, first=0)
    async with sources(opened, Server(refuses(0, "server")), Judge()) as source:
        with pytest.raises(ServerError, match="no"):
            await work(source, opened)


async def test_a_prompt_that_the_server_refuses_is_left_out_even_where_it_is_the_only_one(opened: Store) -> None:
    log(opened, 0)
    log(opened, 1, first=0)  # the newest: it would be chosen again and again
    async with sources(opened, Server(refuses(0)), Judge(), batch_size=4) as source:
        found = await work(source, opened)
    assert isinstance(found, Siblings)
    assert [g.reason for g in found.groups] == ["it can't be answered: no"]


async def test_a_server_that_refuses_everything_costs_no_prompt(opened: Store) -> None:
    log(opened, 0)
    log(opened, 1)
    async with sources(opened, Server(lambda _: ServerError("refused", "no")), Judge()) as source:
        with pytest.raises(ServerError, match="no"):
            await work(source, opened)


async def test_a_reply_without_a_token_teaches_nothing_and_breaks_nothing(opened: Store) -> None:
    log(opened, 0)
    async with sources(opened, Server(empty=True), Judge(), batch_size=4) as source:
        found = await work(source, opened)
    assert isinstance(found, Siblings)
    assert len(found.groups[0].members) == 4
    assert [datum.parts[0].sample.tokens.tolist() for datum in build(found.samples)] == [[A, END], [B, END], [A, END]]


# --- the judge ------------------------------------------------------------------------------------


async def test_while_the_judge_is_down_siblings_wait_for_it_and_are_not_sampled_again(opened: Store) -> None:
    log(opened, 0)
    log(opened, 1)
    down, server = True, Server()
    async with sources(opened, server, Judge(lambda *_: Script(status=503) if down else None)) as source:
        for _ in range(3):
            with pytest.raises(ServerError) as raised:
                await work(source, opened)
            assert raised.value.kind == "judge_down"
        assert server.asked == 2
        log(opened, 2)  # a newer one, which is chosen in place of an older
        down = False
        found = await work(source, opened)
        assert server.asked == 3
        assert isinstance(found, Siblings)
        assert [len(g.members) for g in found.groups] == [4, 4]
        await work(source, opened)
        assert server.asked == 5  # what was judged is not used again


async def test_a_judge_that_fails_at_some_replies_gets_others_with_the_next_try(opened: Store) -> None:
    log(opened, 0)
    log(opened, 1)
    server = Server()
    async with sources(opened, server, Judge(lambda n, _: Script(status=503) if n > 2 else None), daily_budget_usd=None) as source:
        with pytest.raises(ServerError):
            await work(source, opened)
        with pytest.raises(ServerError):
            await work(source, opened)
    assert server.asked == 4


async def test_siblings_do_not_wait_for_ever(opened: Store) -> None:
    log(opened, 0)
    server = Server()
    async with sources(opened, server, Judge(lambda *_: Script(status=503)), batch_size=4) as source:
        for _ in range(12):
            with pytest.raises(ServerError):
                await work(source, opened)
    assert server.asked == 2


async def test_siblings_of_other_weights_are_sampled_anew(opened: Store) -> None:
    turn, server, down = log(opened, 0), Server(), True
    async with sources(opened, server, Judge(lambda *_: Script(status=503) if down else None), batch_size=4) as source:
        with pytest.raises(ServerError):
            await work(source, opened)
        down = False
        prompts, _, _ = source.choose(journal.begin(opened, "m"))
        step = journal.claim(opened, [turn], base_version=1, algorithm="grpo")
        number = journal.saved(opened, step, "tinker://a", [journal.Trained(turn, None)], {}, {})
        found = await source.work(journal.version(opened, number), prompts or ())
    assert server.asked == 2
    assert isinstance(found, Siblings)
    assert {s.version for s in found.samples} == {number}


async def test_a_judge_that_refuses_every_reply_of_every_prompt_costs_no_prompt(opened: Store) -> None:
    log(opened, 0)
    log(opened, 1)
    judge = Judge(lambda *_: Script(status=400, text="no credit is left"))
    async with sources(opened, Server(), judge) as source:
        with pytest.raises(ServerError) as raised:
            await work(source, opened)
    assert raised.value.kind == "judge"
    assert judge.asked == 8  # and is not asked to compare what it refuses


async def test_a_judge_that_refuses_the_replies_of_one_prompt_costs_that_one(opened: Store) -> None:
    log(opened, 0)
    log(opened, 1)
    async with sources(opened, Server(), Judge(lambda _, shown: Script(status=400) if "Say 0." in shown else None)) as source:
        found = await work(source, opened)
    assert isinstance(found, Siblings)
    assert [g.reason for g in found.groups] == [None, "too few of its siblings could be judged"]


async def test_at_the_limit_no_more_than_one_question_to_the_judge_is_asked(opened: Store) -> None:
    """Nobody knows what the judge costs, which is seen once it was asked."""
    log(opened, 0)
    log(opened, 1)
    judge = Judge()
    async with sources(opened, Server(), judge, daily_budget_usd=1.0) as source:
        found = await work(source, opened)
    assert found == "rl.daily_budget_usd is set, and the price of judge-1 is not known: add it to prices.yaml in METACLAW_HOME."
    assert judge.asked == 1


async def test_with_a_budget_a_judge_that_hangs_is_asked_once(opened: Store) -> None:
    log(opened, 0)
    judge = Judge(lambda *_: Script(status=503))
    async with sources(opened, Server(), judge, batch_size=4, daily_budget_usd=1.0) as source:
        with pytest.raises(ServerError) as raised:
            await work(source, opened)
    assert raised.value.kind == "judge_down"
    assert judge.asked == 3  # with the client's own tries
