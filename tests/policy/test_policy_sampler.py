"""Sampling through the real SDK from the real engine: segments, versions, limits, errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from policy_help import RunningEngine

from metaclaw_core.policy.asked import Sampling
from metaclaw_core.policy.sampler import Sampler, SamplerError, Segment

pytestmark = pytest.mark.local

WRONG = "tml-not-the-right-one"
PROMPT = [1, 60, 61, 62]
NO_STOP: tuple[int, ...] = ()


def run[T](engine: RunningEngine, work: Callable[[Sampler], Awaitable[T]], key: str | None = None) -> T:
    """`work` with a connected sampler that serves version 1, the base model."""

    async def whole() -> T:
        sampler = Sampler(engine.model, base_url=engine.url, api_key=key or engine.key)
        sampler.serve({1: None})
        try:
            await sampler.open()
            return await work(sampler)
        finally:
            await sampler.close()

    return asyncio.run(whole())


async def segments(sampler: Sampler, sampling: Sampling, stop: tuple[int, ...] = NO_STOP, version: int = 1) -> list[Segment]:
    return [segment async for segment in sampler.sample(version, PROMPT, sampling, stop)]


def test_segments_begin_with_64_tokens_and_double(engine: RunningEngine) -> None:
    found = run(engine, lambda sampler: segments(sampler, Sampling(300)))
    assert [len(segment.tokens) for segment in found] == [64, 128, 108]
    assert [len(segment.logprobs) for segment in found] == [64, 128, 108]
    assert not any(segment.stopped for segment in found)


def test_segments_are_what_one_call_would_give(engine: RunningEngine) -> None:
    async def both(sampler: Sampler) -> tuple[list[int], list[int]]:
        from tinker import ServiceClient, types

        def at_once() -> list[int]:
            service = ServiceClient(base_url=engine.url, api_key=engine.key)
            client = service.create_sampling_client(base_model=engine.model).result()
            asked = types.SamplingParams(max_tokens=200, temperature=0.0, stop=list(NO_STOP))
            tokens = list(client.sample(types.ModelInput.from_ints(PROMPT), 1, asked).result().sequences[0].tokens)
            service.close("success").result(30)
            return tokens

        parts = await segments(sampler, Sampling(200, temperature=0.0))
        return [token for part in parts for token in part.tokens], await asyncio.to_thread(at_once)

    mine, theirs = run(engine, both)
    assert len(mine) == 200
    assert mine == theirs


def test_a_reply_ends_with_its_stop_token(engine: RunningEngine) -> None:
    async def stopped(sampler: Sampler) -> tuple[list[Segment], int]:
        free = await segments(sampler, Sampling(100, temperature=0.0))
        stop = [token for segment in free for token in segment.tokens][70]
        return await segments(sampler, Sampling(100, temperature=0.0), (stop,)), stop

    found, stop = run(engine, stopped)
    assert found[-1].stopped
    assert found[-1].tokens[-1] == stop
    assert [segment.stopped for segment in found[:-1]] == [False] * (len(found) - 1)


def test_a_seed_gives_the_same_reply_again_and_no_segment_repeats_another(engine: RunningEngine) -> None:
    async def three(sampler: Sampler) -> list[list[Segment]]:
        asked = (Sampling(192, seed=5), Sampling(192, seed=5), Sampling(192))
        return [await segments(sampler, sampling) for sampling in asked]

    first, second, free = run(engine, three)
    assert [s.tokens for s in first] == [s.tokens for s in second]
    assert [s.tokens for s in first] != [s.tokens for s in free]
    assert first[0].tokens[:32] != first[1].tokens[:32]


def test_a_version_that_is_not_served_is_an_error_of_its_own(engine: RunningEngine) -> None:
    with pytest.raises(SamplerError, match="Version 2 is not served any more") as error:
        run(engine, lambda sampler: segments(sampler, Sampling(8), version=2))
    assert error.value.kind == "version"


def test_weights_that_the_server_does_not_know_say_so_and_leave_the_others_alone(engine: RunningEngine) -> None:
    async def both(sampler: Sampler) -> list[Segment]:
        sampler.serve({1: None, 2: "tinker://0/sampler_weights/none"})
        with pytest.raises(SamplerError) as error:
            await segments(sampler, Sampling(8), version=2)
        assert error.value.kind in ("weights", "engine")
        assert sampler.versions == (1,)
        return await segments(sampler, Sampling(8))

    assert len(run(engine, both)) == 1


def test_a_version_that_left_the_route_is_dropped(engine: RunningEngine) -> None:
    async def dropped(sampler: Sampler) -> tuple[int, ...]:
        sampler.serve({3: None})
        with pytest.raises(SamplerError):
            await segments(sampler, Sampling(8), version=1)
        return sampler.versions

    assert run(engine, dropped) == (3,)


def test_a_wrong_key_is_refused_at_once_with_a_remedy(engine: RunningEngine) -> None:
    with pytest.raises(SamplerError, match=r"check rl\.tinker_api_key") as error:
        run(engine, lambda sampler: segments(sampler, Sampling(8)), key=WRONG)
    assert error.value.kind == "auth"


def test_who_no_longer_waits_does_not_hold_up_the_next(engine: RunningEngine) -> None:
    async def cancelled(sampler: Sampler) -> float:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await segments(sampler, Sampling(1500))
        ended = time.monotonic() - began
        assert len(await segments(sampler, Sampling(8))) == 1
        return ended

    assert run(engine, cancelled) < 1.0
