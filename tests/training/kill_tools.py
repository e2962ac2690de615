"""A process that forks trainers, which are killed at a named point: importing takes longer than a step.

It reads lines, each a list of what is to be run side by side, and answers with their exit statuses.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from metaclaw_core.learn.fastchecks import Bounds
from metaclaw_core.learn.losses import Limits
from metaclaw_core.learn.prices import Prices
from metaclaw_core.learn.trainer import TrainingServer
from metaclaw_core.learn.training import Trainer
from metaclaw_core.settings import Settings
from metaclaw_core.store.db import open_store

# Checks draw by chance: here they must not decide. The second batch was not sampled from the first step's weights.
BOUNDS, LIMITS = Bounds(empty=1, malformed=1, length=1e9, kl=1e9), Limits(kl=1e9)


async def train(home: Path, settings: Settings, kill_at: int, how: str, steps: int) -> dict[str, Any]:
    """Make steps until there are `steps` in all, or nothing is left. `kill_at`: of the points that are passed, from 1; 0: none."""
    passed: list[str] = []

    def at(name: str) -> None:
        passed.append(name)
        if len(passed) != kill_at:
            return
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "stop":  # as the worker does at SIGTERM
            task.cancel()
        else:  # the engine goes, and comes back without what it had in memory
            os.kill(int(how), signal.SIGKILL)
            (home / "engine-gone").touch()
            while (home / "engine-gone").exists():
                time.sleep(0.02)

    rl = settings.rl
    server = TrainingServer(
        rl.model, base_url=rl.tinker_base_url, api_key=rl.tinker_api_key, lora_rank=rl.lora_rank, timeout_s=60
    )
    said: list[str] = []
    with open_store(home / "store.db") as store:
        trainer = Trainer(store, settings, home, server, Prices(), at=at, bounds=BOUNDS, limits=LIMITS, retry_s=0)
        for _ in range(steps + 2):
            task = asyncio.ensure_future(trainer.run_once())
            try:
                report = await task
            except asyncio.CancelledError:
                said.append("stopped")
                break
            said += [*report.problems, report.waits or ""]
            if not report.made and not report.problems:
                break
        await trainer.aclose()
    return {"points": passed, "said": said}


def main() -> None:
    for line in sys.stdin:
        pids = []
        for asked in json.loads(line):  # all at once
            pids.append(os.fork())
            if pids[-1] == 0:
                home = Path(asked["home"])
                settings = Settings.model_validate(asked["settings"])
                told = asyncio.run(train(home, settings, asked["kill_at"], asked["how"], asked["steps"]))
                (home / "told.json").write_text(json.dumps(told))
                os._exit(0)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


if __name__ == "__main__":
    import transformers  # noqa: F401 - once, not in each fork

    import metaclaw_core.policy.parse  # noqa: F401

    print("ready", flush=True)
    main()
