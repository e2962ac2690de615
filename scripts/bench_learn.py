#!/usr/bin/env python
"""Does it learn, does it learn only what is rewarded, and what do others notice meanwhile: python scripts/bench_learn.py [--quick]

The loop of `tests/e2e/test_learns.py`, with its helpers: a real mitmdump, the policy server, a judge by rule and the Tinker SDK on an
engine of ours that is held to one core. A tiny model that was taught to say a good letter about every fourth time answers 48 people
a step, LR 1e-2. Needs the extras rl and local and a checkout. The exit status is 1 where a bar is not met:

- `single` and `grpo`, three seeds each: the mean reward is at least 0.9 within 25 steps.
- Control, five seeds of 25 steps: the rewards of each batch are dealt to its replies at random; the mean over the seeds of the last
  two batches' true rewards stays within 0.15 of the start.
- Requests that are passed on, at a steady rate from a process of their own: their p50 during optimiser steps (from the claim of the
  turns to the new route) against that of rests of the same length between them: at most 15 % or 1 ms more, and no failure.

Limits: with fewer than four free cores the last figure says as much of how the system shares them; the load is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/e2e"), str(ROOT / "tests/policy")]

import tinker  # noqa: E402
from learns_help import Loop, Shuffled, a_loop, chance, is_good, letters, speaking  # noqa: E402
from policy_help import RunningEngine, running_engine  # noqa: E402
from sayings import make_blank  # noqa: E402
from steady_load import Asked, steady_load  # noqa: E402

STEPS, ENOUGH, DRIFT = 25, 0.9, 0.15
MORE, MORE_MS = 1.15, 1.0
PER_SECOND = 60


@dataclass(frozen=True, slots=True)
class Learnt:
    algorithm: str
    seed: int
    start: float  # chance of a good reply, exactly
    means: tuple[float, ...]  # mean reward of each step
    end: float  # as the start

    @property
    def met(self) -> bool:
        return self.start <= 0.35 and self.means[-1] >= ENOUGH


@dataclass(frozen=True, slots=True)
class Drifted:
    seed: int
    start: float
    end: float  # the last two batches' true mean reward


@dataclass(frozen=True, slots=True)
class Passed:
    training: tuple[Asked, ...]
    idle: tuple[Asked, ...]

    @property
    def failures(self) -> int:
        return sum(one.failure is not None for one in (*self.training, *self.idle))

    @property
    def met(self) -> bool:
        busy, idle = p50(self.training), p50(self.idle)
        return self.failures == 0 and (busy <= MORE * idle or busy - idle <= MORE_MS)


def p50(asked: tuple[Asked, ...]) -> float:
    return statistics.median(one.ms for one in asked)


class Bench:
    def __init__(self, folder: Path, engine: RunningEngine, service: tinker.ServiceClient) -> None:
        self._folder, self._engine, self._service = folder, engine, service

    async def learn(self, algorithm: str, seed: int) -> Learnt:
        name = f"{algorithm}-{seed}"
        state, start = await self._taught(name, seed)
        with a_loop(self._folder / name, self._engine, resume_from_ckpt=state, algorithm=algorithm) as loop:
            await self._begun(loop)
            means: list[float] = []
            while len(means) < STEPS and (not means or means[-1] < ENOUGH):
                await self._made(loop)
                means.append(loop.mean_reward())
            end = await asyncio.to_thread(chance, self._service, loop.state())
            await loop.aclose()
        return Learnt(algorithm, seed, start, tuple(means), end)

    async def control(self, seed: int, steps: int) -> Drifted:
        name = f"control-{seed}"
        state, start = await self._taught(name, seed)
        with a_loop(self._folder / name, self._engine, Shuffled(seed), resume_from_ckpt=state) as loop:
            await self._begun(loop)
            said: list[list[str]] = []
            for _ in range(steps):
                said.append(await self._made(loop))
            await loop.aclose()
        last = [is_good(reply) for replies in said[-2:] for reply in replies]
        return Drifted(seed, start, sum(last) / len(last))

    async def pass_on(self, pairs: int) -> Passed:
        """The weights hardly move, so there is something to learn in every step."""
        state, _ = await self._taught("passing", 0)
        training: list[Asked] = []
        idle: list[Asked] = []
        with a_loop(self._folder / "passing", self._engine, resume_from_ckpt=state, learning_rate=1e-5) as loop:
            await self._begun(loop)
            with steady_load(loop.proxy.port, PER_SECOND) as load:
                hold(os.getpid())  # as the worker is, which makes the steps; all that serves runs already
                async with load.going():  # connections are made, caches are filled
                    await asyncio.sleep(2)
                for _ in range(pairs):
                    await loop.answered()
                    began = time.monotonic()
                    async with load.going() as asked:
                        await loop.step()
                    took = time.monotonic() - began
                    steps = loop.spans("opened", "done")[-1:]
                    training += [one for one in asked if one.within(steps)]
                    async with load.going() as asked:
                        await asyncio.sleep(took)
                    idle += asked
            await loop.aclose()
        return Passed(tuple(training), tuple(idle))

    async def _taught(self, name: str, seed: int) -> tuple[str, float]:
        state = await asyncio.to_thread(letters, self._service, self._engine.model, name=name, seed=seed)
        return state, await asyncio.to_thread(chance, self._service, state)

    async def _begun(self, loop: Loop) -> None:
        await loop.trainer.begin()
        await asyncio.to_thread(loop.serves, 1)

    async def _made(self, loop: Loop) -> list[str]:
        """A step; what was said before it."""
        replies = await loop.answered()
        report = await loop.step()
        if not report.made:
            print(f"no step: {report.waits}", file=sys.stderr, flush=True)
        return replies


def hold(process: int, core: int | None = None) -> None:
    """All of its threads come after everybody else's, and stay on one core."""
    for thread in Path(f"/proc/{process}/task").iterdir():
        os.setpriority(os.PRIO_PROCESS, int(thread.name), 19)
        if core is not None:
            os.sched_setaffinity(int(thread.name), {core})


def table(learnt: list[Learnt], drifted: list[Drifted], passed: Passed) -> tuple[str, bool]:
    """Markdown, and whether every bar is met."""
    lines = ["| learning, seed | good replies at the start | mean reward, step by step | steps | good replies at the end | bar |", "|---|---|---|---|---|---|"]
    for one in learnt:
        means = " ".join(f"{mean:.2f}" for mean in one.means)
        lines.append(f"| `{one.algorithm}`, {one.seed} | {one.start:.2f} | {means} | {len(one.means)} | {one.end:.2f} | {_met(one.met)} |")
    start, end = (statistics.mean(getattr(one, name) for one in drifted) for name in ("start", "end"))
    kept = abs(end - start) <= DRIFT
    ends = " ".join(f"{one.end:.2f}" for one in drifted)
    lines += ["", "| rewards shuffled | at the start | at the end, seed by seed | mean | bar |", "|---|---|---|---|---|"]
    lines.append(f"| {len(drifted)} seeds | {start:.2f} | {ends} | {end:.2f} | {_met(kept)} |")
    busy, idle = p50(passed.training), p50(passed.idle)
    lines += ["", "| passed on | requests | failures | p50 | bar |", "|---|---|---|---|---|"]
    lines.append(f"| idle | {len(passed.idle)} | {sum(a.failure is not None for a in passed.idle)} | {idle:.2f} ms | |")
    lines.append(
        f"| during optimiser steps | {len(passed.training)} | {sum(a.failure is not None for a in passed.training)} "
        f"| {busy:.2f} ms ({busy / idle:.2f}×, {busy - idle:+.2f} ms) | {_met(passed.met)} |"
    )
    return "\n".join(lines), all(one.met for one in learnt) and kept and passed.met


def _met(met: bool) -> str:
    return "met" if met else "**not met**"


async def run(options: argparse.Namespace) -> bool:
    seeds, controls, steps, pairs = (1, 2, 10, 8) if options.quick else (3, 5, STEPS, 24)
    began = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with running_engine(make_blank(folder / "model"), folder / "engine") as engine, speaking(engine) as service:
            hold(engine.process.pid, max(os.sched_getaffinity(0)))
            bench = Bench(folder, engine, service)
            learnt = [await bench.learn(algorithm, seed) for algorithm in ("single", "grpo") for seed in range(seeds)]
            drifted = [await bench.control(seed, steps) for seed in range(controls)]
            passed = await bench.pass_on(pairs)  # the last, as it makes this process as nice as can be
    said, good = table(learnt, drifted, passed)
    print(said)
    print(f"\n{len(os.sched_getaffinity(0))} cores, load {began:.1f} before and {os.getloadavg()[0]:.1f} after.")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed each, two controls of 10 steps, 8 pairs: some three minutes")
    options = parser.parse_args()
    os.environ |= {"TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}
    return 0 if asyncio.run(run(options)) else 1


if __name__ == "__main__":
    sys.exit(main())
