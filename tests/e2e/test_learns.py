"""The loop closes: people ask through the real mitmdump, the policy server answers from the engine's weights, a judge scores by
rule, a step is made through the real SDK, and the next who ask are answered by the new weights. Others, who are passed on to their
upstream all the while, notice nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from learns_help import BATCH, a_loop, chance, is_good, letters, speaking
from policy_help import RunningEngine, close_rest, running_engine
from sayings import make_blank
from sqlalchemy import select
from steady_load import Asked, steady_load
from swaps_help import SPEAKERS, STREAMS, Talk, make_reader, recorded, swap, talk_on, teach_readers

from metaclaw_core.store.tables import samples, step_turns, turns

pytestmark = [pytest.mark.local, pytest.mark.slow]
STEPS = 25
SWAPS = 50


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    yield from engine_of(make_blank, tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    yield from engine_of(make_reader, tmp_path_factory.mktemp("reader"))


def engine_of(make: Callable[[Path], Path], folder: Path) -> Iterator[RunningEngine]:
    with running_engine(make(folder / "model"), folder / "home") as running:
        yield running
        close_rest(running)


@pytest.mark.parametrize("algorithm", ["single", "grpo"])
async def test_the_model_learns_what_the_judge_likes_from_being_used(engine: RunningEngine, tmp_path: Path, algorithm: str):
    with speaking(engine) as service:
        state = await asyncio.to_thread(letters, service, engine.model, name=algorithm)
        assert await asyncio.to_thread(chance, service, state) <= 0.35
        with a_loop(tmp_path / "user", engine, resume_from_ckpt=state, algorithm=algorithm) as loop:
            await loop.trainer.begin()
            await asyncio.to_thread(loop.serves, 1)
            means: list[float] = []
            made = 0
            beside: list[Asked] = []
            with steady_load(loop.proxy.port, per_second=60) as load:
                while len(means) < STEPS and (not means or means[-1] < 0.9):
                    replies = await loop.answered()
                    async with load.going() as asked:
                        report = await loop.step()
                    # Siblings that are all alike teach nothing: the step is not made, but they were judged.
                    assert report.made or (algorithm == "grpo" and "no signal" in (report.waits or "")), report
                    made += report.made
                    beside += asked
                    means.append(loop.mean_reward())
                    if algorithm == "single":  # the judge saw what was said
                        assert means[-1] == pytest.approx(sum(map(is_good, replies)) / BATCH)
            assert means[-1] >= 0.9, means
            assert await asyncio.to_thread(chance, service, loop.state()) >= 0.8
            with loop.store.reading() as db:
                trained = db.execute(
                    select(samples.c.klass, samples.c.version, turns.c.version.label("answered"))
                    .join(turns, turns.c.flow_id == samples.c.flow_id)
                    .join(step_turns, step_turns.c.turn == turns.c.id)
                ).all()
            assert len(trained) == len(means) * (BATCH if algorithm == "single" else BATCH // loop.settings.rl.group_size)
            assert {row.klass for row in trained} == {"A"}
            assert {row.version for row in trained} == set(range(1, len(means) + 1))
            assert all(row.version == row.answered for row in trained)
            # Who was passed on meanwhile got his answer, during each optimiser step as well.
            assert [one.failure for one in beside if one.failure] == []
            optimised = loop.spans("before step", "stepped")
            assert len(optimised) == made
            assert all(any(one.within([span]) for one in beside) for span in optimised)
            await loop.aclose()


async def test_weights_change_under_load_and_no_tool_loop_hears_two_of_them(reader: RunningEngine, tmp_path: Path):
    with speaking(reader) as service:
        a, b = await asyncio.to_thread(teach_readers, service, reader.model, SWAPS // 2)
    with a_loop(tmp_path / "user", reader, resume_from_ckpt=a.state) as loop:
        await loop.trainer.begin()
        await asyncio.to_thread(loop.serves, 1)
        talks: list[Talk] = []
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for number in range(STREAMS):
                group.create_task(talk_on(loop.proxy.url, loop.upstream.url, number, stop, talks.append))
            paths = [path for pair in zip(b.weights, a.weights, strict=True) for path in pair]
            swaps = [await asyncio.to_thread(swap, loop, path) for path in paths]
            stop.set()
        turns_ = await recorded(loop)
        await loop.aclose()
    assert [talk.failure for talk in talks if talk.failure] == []
    assert [swap.version for swap in swaps] == list(range(2, SWAPS + 2))
    # A tool loop keeps the weights it began with: in the record, and as they were heard.
    assert [turn for turn in turns_ if len(set(turn.versions)) != 1 or None in turn.versions] == []
    heard = {talk.question: talk.spoke for talk in talks}
    loops = [turn for turn in turns_ if len(turn.versions) >= 3 and turn.question in heard]
    assert len(loops) >= 100
    assert all(set(heard[turn.question]) <= {SPEAKERS[(turn.versions[0] or 0) % 2 - 1], "?"} for turn in loops)
    said = [who for talk in talks for who in talk.spoke]
    assert said.count("?") <= 0.05 * len(said)
    # No human turn that begins a second after a swap gets older weights, whatever is being loaded meanwhile.
    late = [(swap, turn) for swap in swaps for turn in turns_ if turn.began > swap.began + 1.0 and (turn.versions[0] or 0) < swap.version]
    assert late == []
    assert len({turn.versions[0] for turn in turns_}) > 0.75 * SWAPS  # the others served for less than half a second
