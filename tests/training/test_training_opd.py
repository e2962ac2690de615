"""Distillation alone: no judge, a teacher behind the engine's own ``/v1/completions``, and a student that comes nearer to it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from policy_help import RunningEngine
from sqlalchemy import select
from tinker import types
from training_help import answers, server, settings, trainer

from metaclaw_core.learn import journal
from metaclaw_core.settings import Settings
from metaclaw_core.store.db import open_store
from metaclaw_core.store.tables import health, spend, steps, turns

pytestmark = [pytest.mark.local, pytest.mark.slow]

PROMPTS = ((10, 11, 12, 13), (20, 21, 22), (30, 31, 32, 33, 34))
HELD_OUT = ((10, 11, 12, 40), (20, 21, 41), (42, 31, 32, 33, 34))
STEPS = 40


def make_teacher(engine: RunningEngine) -> str:
    """The base model with a LoRA that was taught to prefer some ids; the path of its weights."""
    service = tinker.ServiceClient(base_url=engine.url, api_key=engine.key)
    training = service.create_lora_training_client(engine.model, rank=4, seed=7).result(60)
    said = np.arange(100, 108)
    data = []
    for prompt in PROMPTS:
        full = np.asarray([*prompt, *said])
        weights = np.asarray([0.0] * (len(prompt) - 1) + [1.0] * len(said), dtype=np.float32)
        inputs: Any = {"target_tokens": full[1:].astype(np.int64), "weights": weights}
        data.append(types.Datum(model_input=types.ModelInput.from_ints(full[:-1].tolist()), loss_fn_inputs=inputs))
    for _ in range(6):
        training.forward_backward(data, "cross_entropy").result(60)
        training.optim_step(types.AdamParams(learning_rate=5e-3, eps=1e-8)).result(60)
    path: str = training.save_weights_for_sampler("teacher", ttl_seconds=3600).result(60).path
    service.close("success").result(60)
    return path


def distribution(engine: RunningEngine, path: str | None, prompt: tuple[int, ...]) -> np.ndarray:
    """(V,) log probabilities of the next token, over the whole vocabulary."""
    service = tinker.ServiceClient(base_url=engine.url, api_key=engine.key)
    where = {"base_model": engine.model} if path is None else {"model_path": path}
    client = service.create_sampling_client(**where).result(60)
    asked = types.SamplingParams(max_tokens=1, temperature=1.0, seed=1)
    found = client.sample(types.ModelInput.from_ints(list(prompt)), 1, asked, topk_sample_logprobs=1000).result(60)
    top = dict(found.sequences[0].topk_logprobs[0])
    service.close("success").result(60)
    return np.asarray([top[token] for token in sorted(top)])


def kl(engine: RunningEngine, student: str | None, teacher: str) -> float:
    """KL(student ‖ teacher) over the whole vocabulary, mean over held-out prompts."""
    found = []
    for prompt in HELD_OUT:
        s, t = distribution(engine, student, prompt), distribution(engine, teacher, prompt)
        assert s.shape == t.shape
        assert abs(np.exp(s).sum() - 1) < 1e-3
        found.append(float((np.exp(s) * (s - t)).sum()))
    return float(np.mean(found))


def distilling(engine: RunningEngine, teacher: str, **opd: Any) -> Settings:
    rl = settings(engine, batch_size=48, min_sessions=1, learning_rate=7e-3).model_dump()
    rl["opd"] = {
        "enabled": True, "teacher_url": f"{engine.url}/oai/api/v1", "teacher_model": teacher, "teacher_api_key": engine.key, **opd,
    }  # fmt: skip
    return Settings.model_validate(rl)


async def test_the_student_comes_nearer_to_its_teacher_without_a_judge(engine: RunningEngine, tmp_path: Path):
    teacher = await asyncio.to_thread(make_teacher, engine)
    with open_store(tmp_path / "store.db") as store:
        chosen = distilling(engine, teacher)
        where = server(chosen)
        train = trainer(store, chosen, tmp_path, server=where)
        base = await train.begin()
        before, path, version = await asyncio.to_thread(kl, engine, None, teacher), None, base.id
        assert before > 0.05
        estimates = []
        for n in range(STEPS):
            for number, prompt in enumerate(PROMPTS):
                await answers(
                    store, where, path, 16, lambda _: None, first=100 * n + 20 * number, version=version, prompt=prompt, max_tokens=6,
                    state="captured",
                )  # fmt: skip
            report = await train.run_once()
            assert report.made, report
            version = report.version or 0
            path = journal.version(store, version).sampler_path
            with store.reading() as db:
                estimates.append(db.scalar(select(steps.c.metrics).order_by(steps.c.id.desc()).limit(1))["teacher_kl"])
            if n % 5 == 4 and await asyncio.to_thread(kl, engine, path, teacher) <= 0.5 * before:
                break
        after = await asyncio.to_thread(kl, engine, path, teacher)
        assert after <= 0.5 * before, (before, after, estimates)
        with store.reading() as db:
            assert set(db.scalars(select(turns.c.state))) == {"trained"}
            assert db.scalar(select(health.c.ok).where(health.c.name == "teacher")) is True
            booked = db.scalar(select(spend.c.requests).where(spend.c.purpose == "teacher"))
        assert booked > 0
        await train.aclose()


async def test_a_teacher_that_is_not_there_stops_training_and_costs_no_turn(engine: RunningEngine, tmp_path: Path):
    with open_store(tmp_path / "store.db") as store:
        chosen = distilling(engine, "tinker://none/sampler_weights/none")
        where = server(chosen)
        train = trainer(store, chosen, tmp_path, server=where)
        await train.begin()
        await answers(store, where, None, 48, lambda _: None, state="captured")
        report = await train.run_once()
        assert not report.made
        assert report.waits
        with store.reading() as db:
            assert set(db.scalars(select(turns.c.state))) <= {"captured", "scored"}  # they may be taken again
            assert db.scalar(select(turns.c.reward)) is None
        await train.aclose()
