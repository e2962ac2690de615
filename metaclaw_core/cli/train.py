"""``metaclaw train``: what training has done, and a step by hand."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from metaclaw_core.cli.output import json_line, opened_store, table
from metaclaw_core.settings import home

if TYPE_CHECKING:
    from metaclaw_core.learn.training import StepReport, Trainer
    from metaclaw_core.store.rollouts import Store
    from metaclaw_core.view.training import Training


@click.group("train")
def command() -> None:
    """See what training has done, make a step now."""


@command.command("status")
@click.option("--json", "as_json", is_flag=True, help="All of it as one JSON object.")
def status(as_json: bool) -> None:
    """The route, the last steps, what was left out and why."""
    from dataclasses import asdict

    from metaclaw_core.view.training import training

    with opened_store() as store:
        found = training(store)
    if as_json:
        json_line(asdict(found))
        return
    for line in _lines(found):
        click.echo(line)
    if found.steps:
        click.echo()
        heads = ("step", "state", "turns", "reward", "KL", "ratio", "version", "what went wrong")
        table(heads, map(_row, reversed(found.steps[-10:])), empty="", wide=("what went wrong",))


def _lines(found: Training) -> list[str]:
    from metaclaw_core.view import words

    if found.routes:
        route = found.routes[0]
        pinned = ", pinned by hand" if route["pinned"] else ""
        lines = [f"route      working version {route['working']}, stable version {route['stable']}{pinned} ({route['reason']})"]
    else:
        lines = ["route      none: requests go to their own LLM"]
    classes = ", ".join(f"{n:,} of class {klass}" for klass, n in found.classes.items()) or "none"
    lines += [f"samples    {classes}", f"waiting    {found.waiting:,} scored turns"]
    if found.skipped:
        most = sorted(found.skipped.items(), key=lambda item: -item[1])
        lines += [f"left out   {n:,}: {words.one_line(reason)}" for reason, n in most[:10]]
    lines += [f"paused     {check['name']}: {check['reason']}" for check in found.health if not check["ok"]]
    return lines if found.steps else [*lines, "steps      none yet"]


def _row(step: dict[str, Any]) -> tuple[str, ...]:
    from metaclaw_core.view import words

    metrics = step["metrics"] or {}
    figures = (words.number(metrics.get("turns")), *(words.figure(metrics.get(key)) for key in ("reward_mean", "kl", "ratio_mean")))
    return str(step["id"]), step["state"], *figures, words.number(step["version"]), words.one_line(step["error"]) if step["error"] else ""


@command.command("step")
@click.option("--wait", default=60.0, show_default=True, help="Seconds to wait where the worker is at it.")
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object.")
def step(wait: float, as_json: bool) -> None:
    """Make one step now, if there are turns for it. Exit status 4 if not, with the reason."""
    import asyncio
    from dataclasses import asdict

    from metaclaw_core.errors import ConfigError
    from metaclaw_core.settings import load_settings

    settings = load_settings()
    if settings.mode != "rl":
        raise ConfigError("Training needs mode rl: metaclaw setup --mode rl.")
    try:
        from metaclaw_core.learn.training import trainer_of
    except ImportError as e:
        raise ConfigError(f"{e.name} is missing: pip install 'metaclaw-mitmproxy[rl]'") from e
    with opened_store() as store:
        report = asyncio.run(_step(store, trainer_of(store, settings, home()), wait))
    if report is None:
        click.echo("metaclaw: another process trains right now.", err=True)
        sys.exit(4)
    if as_json:
        json_line(asdict(report))
    else:
        for problem in report.problems:
            click.echo(f"metaclaw: {problem}", err=True)
        click.echo(f"Step {report.step} made version {report.version}." if report.made else f"No step: {report.waits}")
    sys.exit(0 if report.made else 4)


async def _step(store: Store, trainer: Trainer, wait: float) -> StepReport | None:
    from metaclaw_core import jobs

    try:
        return await jobs.train(store, trainer, wait_s=wait)
    finally:
        await trainer.aclose()


@command.command("report")
@click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False))
def report(file: Path | None) -> None:
    """Write FILE: one HTML page with curves that needs no other file.

    Without FILE it goes to the reports folder of this home; "-" prints it.
    """
    from metaclaw_core.settings import private_dir
    from metaclaw_core.skills.files import write_atomic
    from metaclaw_core.view.site import report as page

    now = time.time()
    with opened_store() as store:
        text = page(store, now)
    if file is not None and str(file) == "-":
        click.echo(text)
        return
    if file is None:
        file = private_dir(home() / "reports") / time.strftime("training-%Y%m%d-%H%M%S.html", time.localtime(now))
    try:
        write_atomic(file.absolute(), text.encode())
    except OSError as e:
        click.echo(f"metaclaw: {file} can't be written ({e.strerror}).", err=True)
        sys.exit(1)
    click.echo(str(file))
