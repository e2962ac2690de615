"""Jobs that only one worker may do at a time, what they did, and what the user was told.

Design: a job runs under a lease of its own name, renewed while it runs, so any number of workers may share
a store and the one that holds what a job needs (a caller's key) is not kept out by one that idles. A run
becomes a row when it begins; one that was killed keeps no end. Runs that had nothing to do leave no row.

Limits: the last 200 runs of a job are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from sqlalchemy import delete, insert, select, update

from metaclaw_core.errors import MetaClawError
from metaclaw_core.store.queries import upsert
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import job_runs, notices

LEASE_SECONDS = 60.0
_KEPT = 200


class JobBusy(MetaClawError):
    """Another process does this job right now."""


@contextlib.asynccontextmanager
async def job_lease(store: Store, name: str, *, wait_s: float = 0.0) -> AsyncIterator[None]:
    """Be the only one who does `name`. Raises JobBusy if another is, after `wait_s` seconds."""
    owner = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    lease = f"job:{name}"
    deadline = time.monotonic() + wait_s
    while not await asyncio.to_thread(store.acquire_lease, lease, owner, LEASE_SECONDS):
        if time.monotonic() >= deadline:
            raise JobBusy(f"Another process does the job {name!r} right now.")
        await asyncio.sleep(0.2)
    holder = asyncio.current_task()

    async def renew() -> None:
        while True:
            await asyncio.sleep(LEASE_SECONDS / 3)
            if not await asyncio.to_thread(store.renew_lease, lease, owner, LEASE_SECONDS) and holder is not None:
                holder.cancel()  # another took over: what we would write, it writes
                return

    renewer = asyncio.ensure_future(renew())
    try:
        yield
    finally:
        renewer.cancel()
        await asyncio.to_thread(store.release_lease, lease, owner)


async def recorded[R](
    store: Store, name: str, job: Callable[[], Awaitable[R]], *, worth: Callable[[R], bool] = lambda _: True
) -> R:
    """Run `job` with a row of `job_runs`; its exception is recorded and goes on. A run whose report is not `worth`
    keeping leaves no row."""
    run = await asyncio.to_thread(_begin, store, name)
    try:
        report = await job()
    except BaseException as e:
        said = str(e) if isinstance(e, MetaClawError) else type(e).__name__
        await asyncio.to_thread(_end, store, run, False, None, said)
        raise
    if worth(report):
        await asyncio.to_thread(_end, store, run, True, _plain(report), None)
    else:
        await asyncio.to_thread(_forget, store, run)
    return report


def _begin(store: Store, name: str) -> int:
    with store.transaction() as db:
        run = db.execute(
            insert(job_runs).values(name=name, started_at=time.time()).returning(job_runs.c.id)
        ).scalar_one()
        old = select(job_runs.c.id).where(job_runs.c.name == name).order_by(job_runs.c.id.desc()).offset(_KEPT).limit(1)
        if (beyond := db.scalar(old)) is not None:
            db.execute(delete(job_runs).where(job_runs.c.name == name, job_runs.c.id <= beyond))
    return int(run)


def _end(store: Store, run: int, ok: bool, report: Any, error: str | None) -> None:
    with store.transaction() as db:
        db.execute(
            update(job_runs).where(job_runs.c.id == run).values(ended_at=time.time(), ok=ok, report=report, error=error)
        )


def _forget(store: Store, run: int) -> None:
    with store.transaction() as db:
        db.execute(delete(job_runs).where(job_runs.c.id == run))


def _plain(report: Any) -> Any:
    return dataclasses.asdict(report) if dataclasses.is_dataclass(report) and not isinstance(report, type) else report


def last_runs(store: Store) -> list[dict[str, Any]]:
    """The newest run of each job."""
    newest: dict[str, dict[str, Any]] = {}
    with store.reading() as db:
        for row in db.execute(select(job_runs).order_by(job_runs.c.id)):
            newest[row.name] = dict(row._mapping)
    return [newest[name] for name in sorted(newest)]


def notice(store: Store, name: str, text: str, at: float) -> bool:
    """Leave a notice once; False if it was there."""
    with store.transaction() as db:
        row = {"name": name, "at": at, "text": text}
        added = upsert(db.dialect.name, notices).on_conflict_do_nothing().returning(notices.c.name)
        return db.execute(added, row).first() is not None


def all_notices(store: Store) -> list[dict[str, Any]]:
    with store.reading() as db:
        return [dict(row._mapping) for row in db.execute(select(notices).order_by(notices.c.at))]
