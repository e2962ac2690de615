"""``metaclaw purge``: forget recorded sessions, in every table and file of this home.

Design: what will go is counted and shown first. Exchanges that still lie in spools are taken in before, so that there
is one place to look; the lease of ingest is held meanwhile, so that nobody brings anything back.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

import click

from metaclaw_core.cli.output import json_line, opened_store
from metaclaw_core.cli.wire import YES
from metaclaw_core.errors import ConfigError
from metaclaw_core.settings import home, load_settings, skills_settings

if TYPE_CHECKING:
    from metaclaw_core.store.purge import Found, PurgeReport
    from metaclaw_core.store.rollouts import Store

_LEASE_SECONDS = 600.0


@click.command("purge")
@click.option("--session", metavar="ID", help="This session, as `metaclaw sessions` names it.")
@click.option("--before", type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]), help="Exchanges that began before this local time.")
@click.option("--all", "everything", is_flag=True, help="Everything that was recorded.")
@YES
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(session: str | None, before: datetime | None, everything: bool, yes: bool, as_json: bool) -> None:
    """Forget what was recorded: rows, files and logs, so that no byte of it is left in METACLAW_HOME.

    Skills stay, and so does what was sent to an LLM. Exit status 1 if something could not be cleaned.
    """
    if sum((session is not None, before is not None, everything)) != 1:
        raise ConfigError("Say what to forget: --session ID, --before DATE or --all, one of them.")
    from metaclaw_core.store.purge import Selection, find

    selection = Selection(session, before.timestamp() if before else None)
    if not home().exists():
        raise ConfigError(f"There is no {home()}, so nothing was recorded.")
    # What running proxies hold in their queues comes to disk first.
    for problem in _tell_proxies("flush", "what it still holds in memory is not forgotten"):
        click.echo(f"metaclaw: {problem}", err=True)
    with opened_store() as store:
        found = find(store, selection)
        if not as_json:
            click.echo(_what(found))
        if not yes:
            if as_json or not sys.stdin.isatty():
                raise ConfigError("Nobody can be asked here: add --yes to forget it for good.")
            if not click.confirm("Forget it for good?", default=False):
                return
        with _only_here(store):
            found = find(store, selection)  # what has come since belongs to it
            report = _purge(store, found)
    _tell(found, report, as_json)
    sys.exit(1 if report.problems else 0)


def _purge(store: Store, found: Found) -> PurgeReport:
    from dataclasses import replace

    from metaclaw_core.store import purge, samplefile

    report = purge.purge(store, found)
    problems = [
        *report.problems,
        *purge.purge_spools(home() / "spool", found),
        *purge.purge_session_file(home() / "run" / "sessions.db", found),
        *purge.purge_policy_file(home() / "run" / samplefile.FILE, found),
        *_tell_proxies("forget", "restart it, or it may write down again what it knows"),
        *purge.purge_logs(home() / "logs", found),
    ]
    return replace(report, problems=tuple(problems))


def _tell_proxies(message: str, otherwise: str) -> list[str]:
    """One command to each running proxy; a sentence for each that does not take it."""
    from metaclaw_core.proxy.control import call, running_proxies

    problems = []
    for proxy in running_proxies(home()):
        try:
            problem = call(proxy, message).get("error")
        except (OSError, ValueError) as e:
            problem = str(e)
        if problem:
            problems.append(f"The proxy with pid {proxy.pid} did not {message} ({problem}): {otherwise}.")
    return problems


@contextmanager
def _only_here(store: Store) -> Iterator[None]:
    """As the only one that takes in exchanges, with none left in the spools."""
    from metaclaw_core.store.drain import LEASE, drain_spools

    owner = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    deadline = time.monotonic() + 15
    while not store.acquire_lease(LEASE, owner, _LEASE_SECONDS):
        if time.monotonic() > deadline:
            raise ConfigError("Another process is taking in exchanges: try again in a minute.")
        time.sleep(0.1)
    try:
        drain_spools(store, home() / "spool")
        yield
    finally:
        store.release_lease(LEASE, owner)


def _what(found: Found) -> str:
    names = ", ".join(sorted(found.names)) if 0 < len(found.names) <= 5 else f"{len(found.keys)} sessions"
    partly = f", and older parts of {len(found.touched)} more" if found.touched else ""
    lines = [f"{found.turns} exchanges, all of {names}{partly}" if found.keys else f"{found.turns} exchanges{partly}"]
    if found.related:
        lines.append(f"Subagents that worked for it are sessions of their own and stay: {', '.join(found.related)}")
    if learned := _learned(found):
        lines.append(f"Skills that were learned from it stay: {', '.join(learned)} (metaclaw skills archive NAME)")
    return "\n".join(lines)


def _learned(found: Found) -> list[str]:
    from metaclaw_core.skills.library import open_library
    from metaclaw_core.store.purge import learned_from

    scan = open_library(skills_settings(load_settings())).scan()
    known = [(skill.name, skill.provenance.sessions) for skill in (*scan.skills, *scan.candidates) if skill.provenance]
    return learned_from(known, found)


def _tell(found: Found, report: PurgeReport, as_json: bool) -> None:
    if as_json:
        json_line(
            {
                "turns": report.turns,
                "sessions": report.sessions,
                "messages": report.messages,
                "blobs": report.blobs,
                "problems": list(report.problems),
                "related": list(found.related),
            }
        )
        return
    click.echo(f"Forgotten: {report.turns} exchanges, {report.sessions} sessions, {report.messages} messages.")
    for problem in report.problems:
        click.echo(f"metaclaw: {problem}", err=True)
    if load_settings().store.url and "postgresql" in load_settings().store.url:
        click.echo("PostgreSQL's own log and backups are its owner's to clean.")
