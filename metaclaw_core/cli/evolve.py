"""``metaclaw evolve``: write skills now from what was said, without waiting for sessions to end.

Design: what the worker does by itself, asked for by hand. Where the settings name an LLM it is done here. Where
skills are written with the caller's own key, only the worker of a running proxy holds one: the sessions are
marked as ended and the worker does the rest, within its bounds.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from metaclaw_core.cli.output import json_line, opened_store
from metaclaw_core.errors import StoreError
from metaclaw_core.settings import load_settings

if TYPE_CHECKING:
    from metaclaw_core.settings import Settings
    from metaclaw_core.store.rollouts import Store

_POLL_SECONDS = 1.0


@click.command("evolve")
@click.option(
    "--session", help="Only this one: its id, or its key in the store. Also one that was read from a capture."
)
@click.option("--wait", default=120.0, show_default=True, help="Seconds to wait for a worker to do it.")
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object.")
def command(session: str | None, wait: float, as_json: bool) -> None:
    """Write skills from the sessions as they are now. Exit status 4 if some have to wait."""
    import asyncio

    settings = load_settings()
    with opened_store() as store:
        asked = [row["id"] for row in store.sessions() if session is None or session in (row["id"], row["session_id"])]
        if session is not None and not asked:
            raise StoreError(f"There is no session {session!r}; see `metaclaw sessions`.")
        report = asyncio.run(_evolve(store, settings, asked, imported=session is not None, wait_s=wait))
    if as_json:
        json_line(report)
    else:
        click.echo("\n".join(_lines(report)))
    sys.exit(4 if report["waiting"] else 0)


async def _evolve(
    store: Store, settings: Settings, asked: list[str], *, imported: bool, wait_s: float
) -> dict[str, Any]:
    import asyncio
    import dataclasses

    from metaclaw_core.learn.evolve import Evolver

    evolver = Evolver(store, settings)
    began = time.time()
    try:
        if evolver.configured:
            return dataclasses.asdict(await evolver.run(asked=asked, imported=imported, wait_s=wait_s))
        await evolver.end(asked, imported=imported)
    finally:
        await evolver.aclose()
    deadline = time.monotonic() + wait_s
    while (  # noqa: ASYNC110 - another process does it
        (waiting := await asyncio.to_thread(_waiting, store))
        and time.monotonic() < deadline
        and _worker_may_come(waiting)
    ):
        await asyncio.sleep(_POLL_SECONDS)
    return await asyncio.to_thread(_since, store, began)


def _waiting(store: Store) -> dict[str, int]:
    from metaclaw_core.learn.evolve import segment_counts

    counts = segment_counts(store)
    return {name: n for name, n in counts.items() if name in ("waiting", "proposed") or name.startswith("waiting(")}


def _worker_may_come(waiting: dict[str, int]) -> bool:
    """A share that is used up or a pause takes longer than anybody waits for."""
    from metaclaw_core.proxy.control import running_proxies
    from metaclaw_core.settings import home

    return any(name in ("waiting", "proposed", "waiting(credential)") for name in waiting) and any(
        running_proxies(home())
    )


def _since(store: Store, began: float) -> dict[str, Any]:
    """The report of what was done to segments after `began`, whoever did it."""
    import dataclasses

    from sqlalchemy import select

    from metaclaw_core.learn.evolve import Tally
    from metaclaw_core.store.tables import segments

    with store.reading() as db:
        rows = db.execute(select(segments).where(segments.c.updated_at >= began)).all()
    tally = Tally(len(rows))
    for row in rows:
        tally.skipped += row.state == "skipped"
        tally.failed += row.state == "failed"
        if row.state == "done":
            tally.applied([(row.id, edit) for edit in row.edits])
    tally.waiting = {name.removeprefix("waiting(").removesuffix(")"): n for name, n in _waiting(store).items()}
    return dataclasses.asdict(tally.report())


def _lines(report: dict[str, Any]) -> list[str]:
    said = [
        f"{words}: {', '.join(report[name])}"
        for name, words in (
            ("active", "written"),
            ("review", "for review (metaclaw skills review)"),
            ("quarantined", "quarantined"),
            ("retired", "retired"),
        )
        if report[name]
    ]
    said += [f"not written: {why}" for why in report["dropped"]]
    said += [f"{n} waiting: {reason}" for reason, n in report["waiting"].items()]
    said += [f"problem: {problem}" for problem in report["problems"]]
    if report["skipped"]:
        said.append(f"{report['skipped']} part{'s' if report['skipped'] > 1 else ''} of conversations held nothing to learn")
    if report["failed"]:
        said.append(f"{report['failed']} part{'s' if report['failed'] > 1 else ''} of conversations failed; `metaclaw status` says why")
    return said or ["Nothing new to learn from."]
