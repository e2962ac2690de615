"""Weights whose loading is never answered: the policy server goes on with what it has, and asks again."""

from __future__ import annotations

import asyncio

import pytest
from between_help import HANG, Lane
from policy_help import RunningEngine

from metaclaw_core.policy.sampler import Sampler

pytestmark = [pytest.mark.local, pytest.mark.slow]


async def test_a_version_whose_loading_is_not_answered_is_tried_again(engine: RunningEngine, proxy: Lane):
    sampler = Sampler(engine.model, base_url=proxy.url, api_key=engine.key, load_s=1.5)
    sampler.serve({1: None})
    await sampler.open()
    weights = await saved(engine)
    proxy.errs["create_sampling_session"] = HANG
    sampler.serve({1: None, 2: weights})
    await asyncio.sleep(2)
    assert sampler.versions == (1,)
    proxy.errs.clear()
    sampler.serve({1: None, 2: weights})
    async with asyncio.timeout(20):
        while sampler.versions != (1, 2):
            await asyncio.sleep(0.05)
    await sampler.close()


async def saved(engine: RunningEngine) -> str:
    """Weights of the base model with an adapter that changes nothing."""
    from metaclaw_core.learn.trainer import TrainingServer

    server = TrainingServer(engine.model, base_url=engine.url, api_key=engine.key, lora_rank=4)
    await server.open(None)
    path = await server.save_weights("untouched", 3600)
    await server.aclose()
    return path
