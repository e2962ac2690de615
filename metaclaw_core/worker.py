"""The worker process: APScheduler around the jobs. Started by the proxy, or by hand with ``metaclaw worker``.

Design: intervals with ``coalesce`` and one instance each, so a slow job delays only itself; a job that
fails is logged and tried again at its next tick, with nothing half done (see ``jobs``). Started by the
proxy it ends when its stdin closes, so none outlives a killed proxy.

The processor is the proxy's: the worker is as nice as can be, takes in what was recorded together while requests come
(`jobs.Intake`), and evolves skills once they are fewer. It is not put into the kernel's idle class. Measured, a
process that wakes up beside it waits no less; and starved there it would hold the spool's write lock, and without
privileges there is no way back.

Limits: what it says goes to ``logs/worker.log``; it serves no traffic and opens no port.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apscheduler.schedulers.asyncio import AsyncIOScheduler

from metaclaw_core import jobs
from metaclaw_core.errors import ConfigError, MetaClawError
from metaclaw_core.learn.budget import Budget
from metaclaw_core.learn.credentials import Callers
from metaclaw_core.learn.evolve import Evolver
from metaclaw_core.learn.llm import LLMClient
from metaclaw_core.learn.prices import load_prices
from metaclaw_core.learn.scoring import judge_client
from metaclaw_core.parent import until_stdin_closes
from metaclaw_core.settings import Settings, home, load_settings, private_dir
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store

if TYPE_CHECKING:
    from metaclaw_core.learn.training import Trainer

logger = logging.getLogger("metaclaw.worker")

LOOK_SECONDS = 0.5  # at the spools
INDEX_SECONDS = 1.0
EVOLVE_SECONDS = 10.0
SKILLS_SECONDS = 300.0
SCORE_SECONDS = 10.0
EXAMINE_SECONDS = 3600.0
TRAIN_SECONDS = 5.0
PROMOTE_SECONDS = 30.0
ROUTE_SECONDS = 0.5


async def serve(*, follow_stdin: bool) -> None:
    """Run the jobs until SIGTERM, SIGINT or the end of stdin. Raises MetaClawError if the store can't be opened."""
    settings = load_settings()
    here = private_dir(home())
    store = open_store(settings.store.url or here / "store.db")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, stop.set)
    callers = Callers(store, settings.proxy.hosts, enabled=settings.llm.use_caller_credentials)
    def take(message: Mapping[str, Any]) -> None:
        if message.get("type") == "forget":
            store.forget()
        else:
            callers.take(message)

    follower = asyncio.ensure_future(until_stdin_closes(stop, take)) if follow_stdin else None
    budget = Budget(store, settings.llm.daily_token_budget)
    evolver = _evolver(store, settings, callers, budget)
    judge = _judge(settings, budget)

    logging.getLogger("apscheduler").setLevel(logging.ERROR)  # it warns of each tick that finds a job still running
    scheduler = AsyncIOScheduler(event_loop=loop)

    def every(seconds: float, name: str, job: Callable[[], Awaitable[Any]]) -> None:
        scheduler.add_job(
            _logged,
            "interval",
            (name, job),
            seconds=seconds,
            id=name,
            coalesce=True,
            max_instances=1,
            misfire_grace_time=60,
            next_run_time=datetime.now(UTC),  # the first time at once: the proxy waits for the index
        )

    keeper = jobs.IndexKeeper(settings, here)
    every(INDEX_SECONDS, "index", keeper.refresh)
    intake = jobs.Intake(store, here)
    every(LOOK_SECONDS, "ingest", intake.look)
    if evolver is not None:
        every(EVOLVE_SECONDS, "evolve", lambda: jobs.evolve(evolver, intake.put_off))
    if judge is not None:
        every(SCORE_SECONDS, "score", lambda: jobs.score(store, settings, judge))
        started = time.monotonic()
        every(
            EXAMINE_SECONDS,
            "judge",
            lambda: jobs.examine_judge(store, settings, judge, at_start=time.monotonic() - started < EXAMINE_SECONDS / 2),
        )
    every(SKILLS_SECONDS, "skills", lambda: jobs.look_after_skills(store, settings))
    trainer = _trainer(store, settings, here)
    if trainer is not None:
        prices = load_prices(here)
        every(TRAIN_SECONDS, "train", lambda: jobs.train(store, trainer))
        every(PROMOTE_SECONDS, "promote", lambda: jobs.promote(store, settings, prices, here))
        every(ROUTE_SECONDS, "route", lambda: jobs.publish_route(store, settings, prices, here))
    scheduler.start()
    try:
        await stop.wait()
    finally:
        scheduler.shutdown(wait=False)
        await keeper.aclose()
        if follower is not None:
            follower.cancel()
        if evolver is not None:
            await evolver.aclose()
        if judge is not None:
            await judge.aclose()
        if trainer is not None:
            await trainer.aclose()
        await _logged("ingest", intake.take_in)
        store.close()


def _trainer(store: Store, settings: Settings, here: Path) -> Trainer | None:
    """None: nothing is trained. The SDK and its tokenizers are loaded only in rl mode."""
    if settings.mode != "rl":
        return None
    try:
        from metaclaw_core.learn.training import trainer_of

        return trainer_of(store, settings, here)
    except (ConfigError, ImportError) as e:
        missing = f"{e.name} is missing: pip install 'metaclaw-mitmproxy[rl]'" if isinstance(e, ImportError) else e
        logger.warning("Nothing is trained: %s", missing)
        return None


async def _logged(name: str, job: Callable[[], Awaitable[Any]]) -> None:
    try:
        report = await job()
    except MetaClawError as e:
        logger.warning("%s: %s", name, e)
        return
    except Exception:
        logger.exception("%s failed; it is tried again", name)  # the boundary of a job
        return
    for problem in getattr(report, "problems", ()):
        logger.warning("%s: %s", name, problem)


def _judge(settings: Settings, budget: Budget) -> LLMClient | None:
    try:
        return judge_client(settings, budget)
    except ConfigError as e:
        logger.warning("Nothing is scored: %s", e)
        return None


def _evolver(store: Store, settings: Settings, callers: Callers, budget: Budget) -> Evolver | None:
    if not settings.skills.auto_evolve:
        return None
    try:
        return Evolver(store, settings, callers=callers, budget=budget)
    except ConfigError as e:
        logger.warning("No skills are written: %s", e)
        return None


def main() -> None:
    os.umask(0o077)
    os.nice(19)  # everything here can wait; the proxy and the agent can't
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(serve(follow_stdin="--follow-stdin" in sys.argv[1:]))
    except MetaClawError as e:
        sys.exit(f"metaclaw worker: {e}")


if __name__ == "__main__":
    main()
