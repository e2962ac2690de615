"""``metaclaw store``: check what is stored."""

from __future__ import annotations

import sys

import click

from metaclaw_core.cli.output import json_line, opened_store


@click.group("store")
def command() -> None:
    """Check and describe the store."""


@command.command("verify")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def verify(as_json: bool) -> None:
    """Derive every message's hash again and look for missing parents. Exit status 1 if something is wrong."""
    with opened_store(drain=False) as store:
        report = store.verify()
    if as_json:
        json_line({"messages": report.messages, "turns": report.turns, "problems": list(report.problems), "found": report.found})
    else:
        for problem in report.problems:
            click.echo(problem)
        if report.found > len(report.problems):
            click.echo(f"… and {report.found - len(report.problems):,} more.")
        click.echo(f"{report.messages} messages and {report.turns} turns checked, {report.found:,} problems.")
    sys.exit(1 if report.problems else 0)
