"""Weights that must not serve, planted at the engine as what a step has published: the real trial keeps them from traffic.

The stable weights say one of two sentences, as sure of themselves as a real model is. Each planted version is a LoRA of the same base: taught
the wrong thing by cross-entropy, or with its numbers overwritten in the engine's folder.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guard_help import LIMITS
from policy_help import RunningEngine, close_rest, running_engine, speak_words
from render_help import MARKS, QWEN
from sqlalchemy import select, update
from training_help import answers, put, server, settings, trainer

from metaclaw_core.learn import journal
from metaclaw_core.learn.journal import Trained
from metaclaw_core.routes import read_route
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import route_events, steps, turns, versions

pytestmark = [pytest.mark.local, pytest.mark.slow]
GOOD = ("Yes I can do that.", "No I can not do that.")


class Teacher:
    """Makes versions at the engine."""

    def __init__(self, engine: RunningEngine, home: Path) -> None:
        import tinker
        from transformers import AutoTokenizer

        self.engine, self.checkpoints = engine, home / "engine"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(engine.model)
        self.service = tinker.ServiceClient(base_url=engine.url, api_key=engine.key)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def prompt(self, asked: str) -> list[int]:
        return self.ids(f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n")

    def taught(self, replies: Sequence[Sequence[int]], steps: int) -> tuple[str, str]:
        """A state and weights to sample from, of a model that was shown nothing but `replies`."""
        from tinker import types

        client = self.service.create_lora_training_client(self.engine.model, rank=4, seed=1).result(60)
        data, prompt = [], self.prompt("Can you do it?")
        for reply in replies:
            full = [*prompt, *reply]
            weights = np.zeros(len(full) - 1, dtype=np.float32)
            weights[len(prompt) - 1 :] = 1.0
            inputs = {"target_tokens": np.asarray(full[1:], dtype=np.int64), "weights": weights}
            data.append(types.Datum(model_input=types.ModelInput.from_ints(full[:-1]), loss_fn_inputs=inputs))
        for _ in range(steps):
            client.forward_backward(data, "cross_entropy").result(60)
            client.optim_step(types.AdamParams(learning_rate=3e-2)).result(60)
        return str(client.save_state("taught").result(60).path), str(client.save_weights_for_sampler("taught").result(60).path)

    def broken(self, how: str) -> tuple[str, str]:
        """As `taught`; then every number is overwritten: with "noise" or "nan"; or all but one array is gone ("cut")."""
        from safetensors import safe_open
        from safetensors.numpy import load_file, save_file

        state, weights = self.taught([self.ids("a")], 1)
        run, kind, name = weights.removeprefix("tinker://").split("/")
        file = self.checkpoints / run / kind / f"{name}.safetensors"
        with safe_open(file, "np") as opened:
            metadata = opened.metadata()
        dice = np.random.default_rng(0)
        arrays = load_file(file)
        if how == "cut":
            arrays = dict(list(arrays.items())[:1])
        else:
            arrays = {n: (dice.normal(size=a.shape) if how == "noise" else np.full(a.shape, np.nan)).astype(a.dtype) for n, a in arrays.items()}
        save_file(arrays, file, metadata)
        return state, weights


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Teacher]:
    import torch
    from tokenizers import AddedToken
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    from metaclaw_core.engine.testing import make_model

    home = tmp_path_factory.mktemp("bad-weights")
    folder = make_model(home / "model", stops=True, template=QWEN)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in MARKS[:2]])
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    speak_words(folder)
    with running_engine(folder, home) as engine:
        one = Teacher(engine, home)
        yield one
        one.service.close("success").result(10)
        close_rest(engine)


def planted(store: Store, base: int, turn: int, state: str, weights: str) -> tuple[int, int]:
    """A step whose weights are published; its number and its version's."""
    step = journal.claim(store, [turn], base_version=base, algorithm="single")
    version = journal.saved(store, step, state, [Trained(turn, None)], {}, {})
    journal.published(store, step, weights, time.time() + 10 * 24 * 3600)
    return step, version


REASONS = {
    "empty": r"\d+% of the replies are empty, \d+% of the stable weights'",
    "malformed": r"\d+% of the replies hold a malformed tool call, \d+% of the stable weights'",
    "babble": r"replies have 1\d\d tokens, the stable weights' \d+|the stable weights find the replies absurd: \d+\.\d nats per token, at most 4",
    "noise": r"replies have 1\d\d tokens, the stable weights' \d+|the stable weights find the replies absurd: \d+\.\d nats per token, at most 4",
    "not a number": "a logprob of the replies is no number",
    "cut": r"nothing can be sampled from them: The training server failed \(tinker://.*",
}


def plant(teacher: Teacher) -> tuple[str, dict[str, tuple[str, str]]]:
    """The stable weights' state, and states and weights of versions that must not serve."""
    end, dice = teacher.tokenizer.eos_token_id, np.random.default_rng(1)
    good, _ = teacher.taught([[*teacher.ids(text), end] for text in GOOD], 60)
    opens, closes = (teacher.ids(mark) for mark in MARKS[:2])
    return good, {
        "empty": teacher.taught([[end]], 20),
        "malformed": teacher.taught([[*opens, *teacher.ids("read notes"), *closes, end]], 60),
        "babble": teacher.taught([list(map(int, dice.integers(3, 250, 40))) for _ in range(16)], 30),
        "noise": teacher.broken("noise"),
        "not a number": teacher.broken("nan"),
        "cut": teacher.broken("cut"),
    }


async def test_weights_that_do_not_speak_any_more_never_get_traffic_and_training_goes_on_before_them(teacher: Teacher, tmp_path: Path):
    good, bad = await asyncio.to_thread(plant, teacher)
    rl = settings(teacher.engine, resume_from_ckpt=good, learning_rate=1e-3)
    where = server(rl)
    with open_store(tmp_path / "store.db") as store:
        train = trainer(store, rl, tmp_path, server=where, retry_s=0, limits=LIMITS)
        first = await train.begin()
        for n in range(8):
            prompt = teacher.prompt(f"Can you do {n}?")
            await answers(store, where, first.sampler_path, 1, lambda _: None, first=n, prompt=prompt, max_tokens=40, sessions=8, state="captured")
        found = {}
        for n, (name, (state, weights)) in enumerate(bad.items()):
            turn = put(store, 100 + n, teacher.prompt("?"), [70], [-1.0], base_model=teacher.engine.model)
            step, version = planted(store, first.id, turn, state, weights)
            report = await train.run_once()
            assert (report.made, report.problems) == (False, (f"step {step} was cut off and is carried on",)), name
            with store.reading() as db:
                row = db.execute(select(versions).where(versions.c.id == version)).one()
                assert (row.status, db.scalar(select(steps.c.state).where(steps.c.id == step))) == ("rejected", "rejected"), name
            assert (row.checks["prompts"], row.checks["ok"]) == (8, False)
            found[name] = row.reason
        # The next step begins where the last good one ended, and its weights pass the same trial.
        with store.transaction() as db:
            db.execute(update(turns).where(turns.c.state == "captured").values(state="scored", reward=turns.c.id % 2))
        report = await train.run_once()
        assert (report.made, report.waits) == (True, None)
        number = len(bad) + 2
        assert (report.version, journal.version(store, number).parent) == (number, first.id)
        with store.reading() as db:
            assert set(db.scalars(select(route_events.c.working))) == {first.id, number}
        route = read_route(tmp_path)
        assert (route.working, route.stable, [served.version for served in route.served]) == (number, first.id, [first.id, number])
        await train.aclose()
    for name, reason in found.items():
        assert re.fullmatch(REASONS[name], reason), (name, reason)
    assert found.keys() == REASONS.keys()
