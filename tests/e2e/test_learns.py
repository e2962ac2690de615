"""The loop closes: people ask through the real mitmdump, the policy server answers from the engine's weights, a judge scores by
rule, a step is made through the real SDK, and the next who ask are answered by the new weights.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from learns_help import BATCH, a_loop, is_good, make_speller
from policy_help import RunningEngine, close_rest, running_engine
from sqlalchemy import select

from metaclaw_core.store.tables import samples, step_turns, turns

MISSING = [name for name in ("torch", "tinker", "transformers", "uvicorn") if find_spec(name) is None]
pytestmark = [
    pytest.mark.local,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no local engine: {', '.join(MISSING)} not installed"),
    # The SDK leaves the connections of a finished client to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
STEPS = 25


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[RunningEngine]:
    with running_engine(make_speller(tmp_path / "model"), tmp_path / "engine-home") as running:
        yield running
        close_rest(running)


async def test_the_model_learns_what_the_judge_likes_from_being_used(engine: RunningEngine, tmp_path: Path):
    with a_loop(tmp_path / "user", engine) as loop:
        await loop.trainer.begin()
        await asyncio.to_thread(loop.serves, 1)
        means, passed = [], []
        for _ in range(STEPS):
            replies = await asyncio.to_thread(loop.ask)
            beside = asyncio.ensure_future(asyncio.to_thread(loop.ask, 8, off=True))  # of somebody else, while a step is made
            report = await loop.learn()
            passed += await beside
            assert report.made, report
            means.append(loop.mean_reward())
            assert abs(means[-1] - sum(map(is_good, replies)) / len(replies)) < 1e-9  # the judge saw what was said
            if means[-1] >= 0.9:
                break
        assert means[0] <= 0.35, means
        assert means[-1] >= 0.9, means
        assert set(passed) == {"upstream"}
        with loop.store.reading() as db:
            trained = db.execute(
                select(samples.c.klass, samples.c.version, turns.c.version.label("answered"), turns.c.state)
                .join(turns, turns.c.flow_id == samples.c.flow_id)
                .join(step_turns, step_turns.c.turn == turns.c.id)
            ).all()
        assert len(trained) == BATCH * len(means)
        assert {row.klass for row in trained} == {"A"}
        assert {row.version for row in trained} == set(range(1, len(means) + 1))
        assert all(row.version == row.answered for row in trained)
        await loop.aclose()


async def test_weights_change_under_load_and_no_request_fails(engine: RunningEngine, tmp_path: Path):
    with a_loop(tmp_path / "user", engine, learning_rate=1e-4) as loop:
        await loop.trainer.begin()
        await asyncio.to_thread(loop.serves, 1)
        stop, failed, answered = threading.Event(), [], []

        def load() -> None:
            while not stop.is_set():
                try:
                    answered.extend(loop.ask(16))
                except AssertionError as e:
                    failed.append(str(e))

        thread = threading.Thread(target=load)
        thread.start()
        swaps, began = 0, time.monotonic()
        try:
            while swaps < 8 and time.monotonic() - began < 90:
                report = await loop.learn()  # returns once the new weights serve
                swaps += report.made
        finally:
            stop.set()
            await asyncio.to_thread(thread.join)
        assert failed == []
        assert swaps == 8
        assert len(answered) >= 8 * BATCH
        await loop.aclose()
