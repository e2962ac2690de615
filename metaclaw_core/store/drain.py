"""From the spools into the store: exactly once, however often it is interrupted.

Design: ingest commits first, the spool rows are deleted after. A crash in between brings the rows again
and the unique keys drop them. A row that can't be ingested at all is set aside in its spool and
reported. A spool that can't be read doesn't hold up the others.

Limits: `drain_under_lease` keeps two drainers apart for as long as a batch takes less than the lease;
two at once do the work twice, not wrongly.
"""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.spool import SpoolError, SpoolReader, remove_if_done

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

    def __add__(self, other: DrainReport) -> DrainReport:
        return DrainReport(
            self.stored + other.stored,
            self.skipped + other.skipped,
            self.duplicates + other.duplicates,
            self.removed + other.removed,
            self.problems + other.problems,
        )


def drain_under_lease(store: Store, folder: Path, *, wait_s: float = 5.0) -> DrainReport:
    """`drain_spools` as the only drainer of this store. Who doesn't get the lease within `wait_s` seconds says so in the
    report and leaves the work to its holder."""
    if not any(folder.glob("*.db")):
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


def drain_spools(store: Store, folder: Path) -> DrainReport:
    """Every spool in `folder`, oldest name first; a folder that doesn't exist holds none. Raises StoreError only
    where the store itself can't be used."""
    total = DrainReport()
    for path in sorted(folder.glob("*.db")):
        try:
            total += drain_spool(store, path)
            total += DrainReport(removed=int(remove_if_done(path)))
        except SpoolError as e:
            total += DrainReport(problems=(str(e),))
    return total


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
