"""What the worker does, as plain async functions without timers: each takes what it needs and returns a report.

Design: a job can be run from a test, the command line or the scheduler alike. It is safe to kill at any
moment: rows move in transactions, files are replaced atomically, and the next run carries on. What needs
much memory (building the index imports scikit-learn) runs in a process of its own that ends.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from metaclaw_core.errors import MetaClawError
from metaclaw_core.settings import Settings, skills_settings
from metaclaw_core.store.drain import DrainReport, drain_under_lease
from metaclaw_core.store.rollouts import Store

if TYPE_CHECKING:
    from metaclaw_core.learn.counters import LifeReport
    from metaclaw_core.learn.evolve import Evolver, EvolveReport
    from metaclaw_core.learn.health import CheckReport
    from metaclaw_core.learn.llm import LLMClient
    from metaclaw_core.learn.scoring import ScoreReport


async def ingest(store: Store, home: Path) -> DrainReport:
    """Take in what lies in the spools."""
    return await asyncio.to_thread(drain_under_lease, store, home / "spool")


@dataclass(frozen=True, slots=True)
class IndexReport:
    built: bool
    skills: int | None = None  # None where nothing was built
    problems: tuple[str, ...] = ()


async def refresh_index(settings: Settings, home: Path) -> IndexReport:
    """Build the skill index again if the library has changed since. Raises MetaClawError if the build fails."""
    from metaclaw_core.skills.build import library_fingerprint, needs_build

    if not needs_build(home, await asyncio.to_thread(library_fingerprint, settings)):
        return IndexReport(built=False)
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
        raise
    if process.returncode:
        raise MetaClawError(f"The skill index could not be built: {err.decode(errors='replace').strip()[-2000:]}")
    from metaclaw_core.wire.jsonio import loads_object

    report = loads_object(out, "report of the index build")
    return IndexReport(built=True, skills=report["skills"], problems=tuple(report["problems"]))


async def evolve(evolver: Evolver) -> EvolveReport | None:
    """Write skills from what has ended. None: another process is at it."""
    from metaclaw_core.learn.runs import JobBusy

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
    """Put the judge to the golden set where that is due. None: as for `score`."""
    from metaclaw_core.learn.health import check_judge
    from metaclaw_core.learn.runs import JobBusy, job_lease, recorded

    if judge is None:
        return None
    try:
        async with job_lease(store, "judge"):
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
