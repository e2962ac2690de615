"""What the worker does, as plain async functions without timers: each takes what it needs and returns a report.

Design: a job can be run from a test, the command line or the scheduler alike. It is safe to kill at any
moment: rows move in transactions, files are replaced atomically, and the next run carries on. What needs
much memory (building the index imports scikit-learn) runs in a process of its own that ends.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from metaclaw_core.errors import MetaClawError
from metaclaw_core.settings import Settings, skills_settings
from metaclaw_core.store.drain import DrainReport, drain_under_lease, last_written
from metaclaw_core.store.rollouts import Store

if TYPE_CHECKING:
    from metaclaw_core.learn.counters import LifeReport
    from metaclaw_core.learn.evolve import Evolver, EvolveReport
    from metaclaw_core.learn.health import CheckReport
    from metaclaw_core.learn.llm import LLMClient
    from metaclaw_core.learn.prices import Prices
    from metaclaw_core.learn.promote import GateReport
    from metaclaw_core.learn.scoring import ScoreReport
    from metaclaw_core.learn.training import StepReport, Trainer


INGEST_SECONDS = 2.0  # what is recorded is in the store so soon, however much comes
_PAUSE_SECONDS = 0.4  # without a request: then it is taken in at once
_BUSY_RATE = 20.0  # exchanges a second
_LONGEST_WAIT = 60.0  # seconds


class Intake:
    """Takes in what lies in the spools; one per worker, asked every half second or so.

    The processor is the proxy's while requests come: then it is taken in together, every `INGEST_SECONDS`. Once they
    pause it is taken in at once.
    """

    def __init__(self, store: Store, home: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._folder = home / "spool"
        self._clock = clock
        self._began = -math.inf  # of the last round
        self._written: float | None = None  # as `last_written` was after it
        self._rate = 0.0
        self._calm_at = clock()

    async def look(self) -> DrainReport:
        """One look, and what is to be done."""
        since = self._clock() - self._began
        if since < INGEST_SECONDS:
            written = last_written(self._folder)
            if written == self._written or (written is not None and 0 <= time.time() - written < _PAUSE_SECONDS):
                return DrainReport()
        return await self.take_in()

    async def take_in(self) -> DrainReport:
        """All there is, now."""
        began = self._clock()
        before, self._began = self._began, began  # also where it fails: the next try comes at its time
        report = await asyncio.to_thread(drain_under_lease, self._store, self._folder)
        self._rate = report.stored / min(max(began - before, _PAUSE_SECONDS), INGEST_SECONDS)  # it waited no longer
        self._written = last_written(self._folder)
        return report

    def put_off(self) -> bool:
        """Should what can wait wait? While very much comes, and for a minute at most."""
        now = self._clock()
        if self._rate < _BUSY_RATE or now - self._calm_at > _LONGEST_WAIT:
            self._calm_at = now
            return False
        return True


@dataclass(frozen=True, slots=True)
class IndexReport:
    built: bool  # or patched
    skills: int | None = None  # None where nothing was built
    problems: tuple[str, ...] = ()


class IndexKeeper:
    """Keeps the index file of a home as the library is; one per worker, asked at each tick.

    Small changes are patched in at once. The full build runs beside the ticks, in a process of its own, so that what
    changes meanwhile is patched in as well.
    """

    def __init__(self, settings: Settings, home: Path) -> None:
        from metaclaw_core.skills.library import open_library

        self._settings = settings
        self._home = home
        self._library = open_library(skills_settings(settings))  # remembers what it has read
        self._build: asyncio.Future[IndexReport] | None = None
        self._too_much = ""  # the state of the library that was no matter of a patch

    async def refresh(self) -> IndexReport:
        """One look, and what is to be done. Raises MetaClawError for a build that failed since the last look."""
        from metaclaw_core.skills.build import INDEX_FILE, fingerprint, needs_build
        from metaclaw_core.skills.indexfile import read_origin
        from metaclaw_core.skills.patch import MARK

        report = IndexReport(built=False)
        if self._build is not None and self._build.done():
            build, self._build = self._build, None
            report = build.result()
        origin = await asyncio.to_thread(fingerprint, self._library, self._settings)
        if not needs_build(self._home, origin):
            return report
        if origin != self._too_much and read_origin(self._home / INDEX_FILE) != origin + MARK:
            skills = await asyncio.to_thread(self._patch, origin)
            if skills is not None:
                return IndexReport(built=True, skills=skills, problems=report.problems)
            self._too_much = origin
        if self._build is None:
            self._build = asyncio.ensure_future(_build_index())
        return report

    async def aclose(self) -> None:
        """End a build that runs; the next keeper begins it anew."""
        if self._build is not None:
            self._build.cancel()
            await asyncio.gather(self._build, return_exceptions=True)

    def _patch(self, origin: str) -> int | None:
        from metaclaw_core.skills.build import INDEX_FILE
        from metaclaw_core.skills.patch import patch_file

        index = patch_file(self._home / INDEX_FILE, self._library.skills(), origin)
        return None if index is None else len(index)


async def _build_index() -> IndexReport:
    """In a process of its own. Raises MetaClawError if it fails."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # nothing is imported from the folder we happen to be in
        "-m",
        "metaclaw_core.skills.build",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        raise MetaClawError(f"The skill index could not be built: {err.decode(errors='replace').strip()[-2000:]}")
    from metaclaw_core.wire.jsonio import loads_object

    report = loads_object(out, "report of the index build")
    return IndexReport(built=True, skills=report["skills"], problems=tuple(report["problems"]))


async def evolve(evolver: Evolver, put_off: Callable[[], bool] = lambda: False) -> EvolveReport | None:
    """Write skills from what has ended. None: another process is at it, or it is put off."""
    from metaclaw_core.learn.runs import JobBusy

    if put_off():
        return None
    try:
        return await evolver.run()
    except JobBusy:
        return None


async def score(store: Store, settings: Settings, judge: LLMClient | None) -> ScoreReport | None:
    """Judge what is ready. None: no judge is configured, or another process is at it."""
    from metaclaw_core.learn.runs import JobBusy, job_lease, recorded
    from metaclaw_core.learn.scoring import score as score_turns

    if judge is None:
        return None
    try:
        async with job_lease(store, "score"):
            return await recorded(
                store, "score", lambda: score_turns(store, settings, judge), worth=lambda r: bool(r.scored or r.skipped or r.problems)
            )
    except JobBusy:
        return None


async def examine_judge(store: Store, settings: Settings, judge: LLMClient | None, *, at_start: bool) -> CheckReport | None:
    """Put the judge to the golden set where that is due. None: as for `score`. A worker that was killed at it is waited for: the
    next round is an hour away, and without the examination nothing is trained."""
    from metaclaw_core.learn.health import check_judge
    from metaclaw_core.learn.runs import LEASE_SECONDS, JobBusy, job_lease, recorded

    if judge is None:
        return None
    try:
        async with job_lease(store, "judge", wait_s=LEASE_SECONDS + 1):
            return await recorded(
                store, "judge", lambda: check_judge(store, settings, judge, at_start=at_start), worth=lambda r: r.checked
            )
    except JobBusy:
        return None


async def look_after_skills(store: Store, settings: Settings) -> LifeReport | None:
    """Count what was injected; mark what is no longer used. None: another process is at it."""
    from metaclaw_core.learn.counters import LifeReport, look_after
    from metaclaw_core.learn.runs import JobBusy, job_lease, recorded
    from metaclaw_core.skills.library import open_library

    library = open_library(skills_settings(settings))

    async def round_() -> LifeReport:
        return await asyncio.to_thread(look_after, store, library, settings.skills.stale_days)

    try:
        async with job_lease(store, "skills"):
            return await recorded(store, "skills", round_, worth=LifeReport.says_something)
    except JobBusy:
        return None


async def train(store: Store, trainer: Trainer, *, wait_s: float = 0.0) -> StepReport | None:
    """One optimiser step, if one can be made. None: another process trains."""
    from metaclaw_core.learn.runs import JobBusy, job_lease, recorded
    from metaclaw_core.learn.training import StepReport

    try:
        async with job_lease(store, "train", wait_s=wait_s):
            return await recorded(store, "train", trainer.run_once, worth=StepReport.says_something)
    except JobBusy:
        return None


async def promote(store: Store, settings: Settings, prices: Prices, home: Path) -> GateReport | None:
    """Let the gate look at what live sessions earned. None: another process trains."""
    from metaclaw_core.learn.promote import look
    from metaclaw_core.learn.publish import publish
    from metaclaw_core.learn.runs import JobBusy, job_lease, recorded

    async def round_() -> GateReport:
        report = await asyncio.to_thread(look, store)
        await asyncio.to_thread(publish, store, settings, prices, home)
        return report

    try:
        async with job_lease(store, "train"):
            return await recorded(store, "promote", round_, worth=lambda r: r.verdict in ("promote", "rollback"))
    except JobBusy:
        return None


async def publish_route(store: Store, settings: Settings, prices: Prices, home: Path) -> None:
    """The route file as the store has it. Safe beside training: it only reads, and the file is replaced whole."""
    from metaclaw_core.learn.publish import publish

    await asyncio.to_thread(publish, store, settings, prices, home)
