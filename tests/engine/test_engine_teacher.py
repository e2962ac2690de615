"""The engine as a teacher: its values for exact ids are those of the SDK, and it passes the check of its tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine_help import Client, RunningEngine, ids
from rl_tools import sample

from metaclaw_core.learn.batch import build
from metaclaw_core.learn.endpoint import Endpoint
from metaclaw_core.learn.opd import aligned, opd_advantages
from metaclaw_core.learn.teacher import Teacher

pytestmark = pytest.mark.local


def teacher_of(engine: RunningEngine) -> Teacher:
    return Teacher(Endpoint(f"{engine.url}/oai/api/v1", engine.model, engine.key))


async def test_the_engine_is_a_fit_teacher_for_its_own_tokenizer(engine: RunningEngine, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    async with teacher_of(engine) as teacher:
        await teacher.check(AutoTokenizer.from_pretrained(tiny_model))


async def test_opd_advantages_equal_those_of_the_teacher_s_own_logprobs(engine: RunningEngine, client: Client) -> None:
    from tinker import types

    prompt, tokens = ids("what is it? "), ids("a cat")
    [datum] = build([sample(1, prompt, tokens)])
    async with teacher_of(engine) as teacher:
        taught = await teacher.score(datum.full.tolist())
    assert taught.logprobs is not None
    values = aligned(taught.logprobs, datum.targets.size)
    assert values is not None
    direct = client.sampler().compute_logprobs(types.ModelInput.from_ints(prompt + tokens)).result(60)
    student = np.linspace(-3.0, -0.1, datum.targets.size).astype(np.float32)
    found = opd_advantages(datum, student, values, beta=0.5)[1]
    expected = [-0.5 * (float(student[k - 1]) - direct[k]) for k in range(len(prompt), len(prompt) + len(tokens))]
    assert found == pytest.approx(np.clip(expected, -5, 5), abs=1e-4)
