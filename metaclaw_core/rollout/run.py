"""Several tasks at a time, each with its own agent process or loop.

Design: an `Agent` gives a task to whatever answers it and returns an `Outcome`; it does not raise for what goes wrong with
one task. The runner bounds how many run, times each, and writes its result before the next begins. Cancelled (Ctrl-C), it
writes nothing for tasks that had not ended: they are open at the next run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from metaclaw_core.rollout.tasks import Outcome, Results, Task


class Agent(Protocol):
    async def run(self, task: Task, workspace: Path) -> Outcome: ...


async def run_tasks(
    tasks: Sequence[Task],
    agent: Agent,
    results: Results,
    source: Path,
    *,
    at_once: int,
    ended: Callable[[Task, Outcome], object] = lambda task, outcome: None,
) -> dict[str, int]:
    """How many came to which status. `source`: the folder of the tasks. `ended` is told of each."""
    waiting = iter(tasks)
    counts = {"done": 0, "failed": 0, "timeout": 0}

    async def work() -> None:
        for task in waiting:
            workspace = await asyncio.to_thread(results.workspace, task, source)
            started_at, began = time.time(), time.perf_counter()
            outcome = await agent.run(task, workspace)
            results.write(task, outcome, started_at, time.perf_counter() - began)
            counts[outcome.status] += 1
            ended(task, outcome)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(at_once, len(tasks))):
            group.create_task(work())
    return counts
