"""The worker process: APScheduler around the jobs. Started by the proxy, or by hand with ``metaclaw worker``.

Design: intervals with ``coalesce`` and one instance each, so a slow job delays only itself; a job that
fails is logged and tried again at its next tick, with nothing half done (see ``jobs``). Started by the
proxy it ends when its stdin closes, so none outlives a killed proxy.

Limits: what it says goes to ``logs/worker.log``; it serves no traffic and opens no port.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from apscheduler.schedulers.asyncio import AsyncIOScheduler

from metaclaw_core import jobs
from metaclaw_core.errors import MetaClawError
from metaclaw_core.settings import home, load_settings, private_dir
from metaclaw_core.store.db import open_store

logger = logging.getLogger("metaclaw.worker")

INGEST_SECONDS = 2.0
INDEX_SECONDS = 1.0


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
    follower = asyncio.ensure_future(_until_stdin_closes(stop)) if follow_stdin else None

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

    every(INDEX_SECONDS, "index", lambda: jobs.refresh_index(settings, here))
    every(INGEST_SECONDS, "ingest", lambda: jobs.ingest(store, here))
    scheduler.start()
    try:
        await stop.wait()
    finally:
        scheduler.shutdown(wait=False)
        if follower is not None:
            follower.cancel()
        await _logged("ingest", lambda: jobs.ingest(store, here))
        store.close()


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


async def _until_stdin_closes(stop: asyncio.Event) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.read(65536):
        pass
    stop.set()


def main() -> None:
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(serve(follow_stdin="--follow-stdin" in sys.argv[1:]))
    except MetaClawError as e:
        sys.exit(f"metaclaw worker: {e}")


if __name__ == "__main__":
    main()
