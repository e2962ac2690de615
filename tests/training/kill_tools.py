"""A process that forks trainers, engines and policy servers: importing what they need takes longer than what they do.

It reads lines of JSON. A list runs trainers side by side and is answered with their exit statuses; ``{"engine": {...}}`` and
``{"policy": {...}}`` (with the argument "servers") start one, and are answered with its process id. The engine says where it listens in a
file. No fork survives this process.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
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
PAUSED = "paused.json"  # in the home: the trainer waits at a point until it is gone


async def train(home: Path, settings: Settings, kills: list[str], kill_at: int, how: str, steps: int) -> dict[str, Any]:
    """Make steps until there are `steps` in all, or nothing is left. At the first passing of each point in `kills`, and at the
    `kill_at`-th point of all (from 1; 0: none): "kill" this process, "stop" the job as the worker does at SIGTERM, or "pause" until the
    test has killed another process and started it again."""
    passed: list[str] = []
    left = list(kills)

    def at(name: str) -> None:
        passed.append(name)
        if name in left:
            left.remove(name)
        elif len(passed) != kill_at:
            return
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "stop":
            task.cancel()
        else:
            (home / PAUSED).write_text(json.dumps(name))
            while (home / PAUSED).exists():
                time.sleep(0.01)

    rl = settings.rl
    server = TrainingServer(
        rl.model, base_url=rl.tinker_base_url, api_key=rl.tinker_api_key, lora_rank=rl.lora_rank, timeout_s=60
    )
    said: list[str] = []
    with open_store(home / "store.db") as store:
        trainer = Trainer(store, settings, home, server, Prices(), at=at, bounds=BOUNDS, limits=LIMITS, retry_s=0)
        for _ in range(steps + 2 + len(kills)):
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


def trainer(asked: dict[str, Any]) -> None:
    home = Path(asked["home"])
    settings = Settings.model_validate(asked["settings"])
    told = asyncio.run(train(home, settings, asked.get("kills", []), asked.get("kill_at", 0), asked["how"], asked["steps"]))
    (home / "told.json").write_text(json.dumps(told))


def engine(asked: dict[str, Any]) -> None:
    from metaclaw_core.cli.engine import command

    os.environ.update(asked["environment"])
    os.dup2(os.open(asked["says"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    command.main(asked["arguments"], standalone_mode=False)


def policy(asked: dict[str, Any]) -> None:
    from metaclaw_core.policy.__main__ import quiet_sdk, serve

    quiet_sdk()
    os.environ.update(asked["environment"])
    asyncio.run(serve(asked["token"]))


def fork(work: Callable[[dict[str, Any]], None], asked: dict[str, Any]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    status = 1
    try:
        if os.getppid() == parent:
            work(asked)
            status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    servers: set[int] = set()
    for line in sys.stdin:
        asked = json.loads(line)
        for pid in list(servers):
            if os.waitpid(pid, os.WNOHANG)[0]:
                servers.remove(pid)
        if isinstance(asked, list):
            pids = [fork(trainer, one) for one in asked]  # all at once
            print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
        else:
            pid = fork(engine, asked["engine"]) if "engine" in asked else fork(policy, asked["policy"])
            servers.add(pid)
            print(json.dumps(pid), flush=True)


if __name__ == "__main__":
    if "servers" in sys.argv[1:]:
        import torch  # noqa: F401 - once, not in each fork

        import metaclaw_core.engine.server
        import metaclaw_core.policy.server
        import metaclaw_core.policy.service
    import transformers  # noqa: F401

    import metaclaw_core.policy.parse  # noqa: F401

    print("ready", flush=True)
    main()
