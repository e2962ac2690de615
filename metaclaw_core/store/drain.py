"""From the spools, and from the policy server's file of samples, into the store: exactly once, however often interrupted.

Design: ingest commits first, the spool rows are deleted after. A crash in between brings the rows again
and the unique keys drop them. Samples come after the spools: one is on disk before its answer ends, so a turn
that is in the store after a drain has its sample there, too. A row that can't be ingested at all is set aside in its spool and
reported. A spool that can't be read doesn't hold up the others.

Limits: `drain_under_lease` keeps two drainers apart for as long as a batch takes less than the lease;
two at once do the work twice, not wrongly.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from metaclaw_core.errors import StoreError
from metaclaw_core.store import samplefile
from metaclaw_core.store.queries import insert_one
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.spool import SpoolError, SpoolReader, remove_if_done
from metaclaw_core.store.tables import samples

BATCH_ROWS = 64
BATCH_BYTES = 16 * 1024 * 1024
LEASE = "ingest"
LEASE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class DrainReport:
    stored: int = 0
    skipped: int = 0
    duplicates: int = 0
    removed: int = 0  # spool files that were empty and without an owner
    problems: tuple[str, ...] = ()  # sentences about files and rows that were left behind
    samples: int = 0  # of our own model's answers, new in the store

    def __add__(self, other: DrainReport) -> DrainReport:
        return DrainReport(
            self.stored + other.stored,
            self.skipped + other.skipped,
            self.duplicates + other.duplicates,
            self.removed + other.removed,
            self.problems + other.problems,
            self.samples + other.samples,
        )


def drain_under_lease(store: Store, folder: Path, *, wait_s: float = 5.0) -> DrainReport:
    """`drain_spools` as the only drainer of this store. Who doesn't get the lease within `wait_s` seconds says so in the
    report and leaves the work to its holder."""
    if not any(folder.glob("*.db")) and not _sample_file(folder).exists():
        return DrainReport()
    owner = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    deadline = time.monotonic() + wait_s
    while not store.acquire_lease(LEASE, owner, LEASE_SECONDS):
        if time.monotonic() > deadline:
            return DrainReport(
                problems=("Another process is taking in the newest exchanges; they may be missing here.",)
            )
        time.sleep(0.05)
    try:
        return drain_spools(store, folder)
    finally:
        store.release_lease(LEASE, owner)


def last_written(folder: Path) -> float | None:
    """When something was last put into a spool of `folder` or taken from it, in unix seconds; None: there is none."""
    times: list[float] = []
    for path in folder.glob("*.db*"):
        if path.name.endswith((".db", ".db-wal")):
            with contextlib.suppress(FileNotFoundError):
                times.append(path.stat().st_mtime)
    return max(times, default=None)


def drain_spools(store: Store, folder: Path) -> DrainReport:
    """Every spool in `folder`, oldest name first, and the samples of the same home; a folder that doesn't exist holds
    none. Raises StoreError only where the store itself can't be used."""
    total = DrainReport()
    for path in sorted(folder.glob("*.db")):
        try:
            total += drain_spool(store, path)
            total += DrainReport(removed=int(remove_if_done(path)))
        except SpoolError as e:
            total += DrainReport(problems=(str(e),))
    return total + drain_samples(store, _sample_file(folder))


def _sample_file(spools: Path) -> Path:
    return spools.parent / "run" / samplefile.FILE


def drain_samples(store: Store, path: Path) -> DrainReport:
    """The samples in the policy server's file, which is left without any. Raises StoreError where the store can't be used."""
    new = 0
    while True:
        try:
            batch = samplefile.pending(path, BATCH_ROWS)
        except StoreError as e:
            return DrainReport(samples=new, problems=(str(e),))
        if not batch:
            return DrainReport(samples=new)
        with store.transaction() as connection:
            new += sum([insert_one(connection, samples, row) for _, row in batch])
        try:
            samplefile.remove(path, [row_id for row_id, _ in batch])
        except StoreError as e:
            return DrainReport(samples=new, problems=(str(e),))


def drain_spool(store: Store, path: Path) -> DrainReport:
    """One spool until nothing waits in it. Raises SpoolError or StoreError; what was committed stays committed."""
    total = DrainReport()
    with SpoolReader(path) as spool:
        while batch := spool.batch(BATCH_ROWS, BATCH_BYTES):
            report = store.ingest([exchange for _, exchange in batch], redacted=True)
            failed = {batch[place][0]: why for place, why in report.failed}
            for row_id, why in failed.items():
                spool.set_aside(row_id, why)
            spool.delete([row_id for row_id, _ in batch if row_id not in failed])
            total += DrainReport(report.stored, report.skipped, report.duplicates)
        aside = spool.counts()[1]
    if aside:
        total = replace(total, problems=(f"{aside} rows of {path} can't be taken in; they stay there.",))
    return total
