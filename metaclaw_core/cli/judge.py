"""``metaclaw judge``: how far the judge that the settings name can be believed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from metaclaw_core.cli.output import json_line, opened_store
from metaclaw_core.errors import ConfigError
from metaclaw_core.settings import Settings, load_settings

if TYPE_CHECKING:
    from metaclaw_core.learn.llm import LLMClient
    from metaclaw_core.store.rollouts import Store

_AS_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object.")


@click.group("judge")
def command() -> None:
    """Examine the judge (rl.prm_url, rl.prm_model, rl.prm_api_key, or else llm.*)."""


@command.command("calibrate")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--votes", type=click.IntRange(1, 15), help="Votes for each verdict; judge.votes if not given.")
@_AS_JSON
def calibrate(file: Path, votes: int | None, as_json: bool) -> None:
    """Agreement, order flips and calibration error against the pairs or labels in FILE, one JSON object a line.

    A pair: {"instruction": "…", "better": ACTION, "worse": ACTION}

    A label: {"instruction": "…", "action": ACTION, "next": "…", "label": 1, 0 or -1}; next may be missing.

    ACTION is text, or {"text": "…", "calls": [{"name": "…", "arguments": {…}}]}.
    """
    from metaclaw_core.learn.calibrate import CalibrationError, examine, read_items, summarise

    try:
        items = read_items(file.read_text(encoding="utf-8").splitlines(), str(file))
    except (OSError, UnicodeDecodeError) as e:
        raise CalibrationError(f"{file} can't be read: {e}.") from e

    async def work(_store: Store, client: LLMClient, settings: Settings) -> dict[str, Any]:
        judge = settings.judge
        with _progress(len(items), as_json) as on_item:
            outcomes, unanswered = await examine(items, client, judge, votes=votes or judge.votes, on_item=on_item)
        return asdict(summarise(outcomes, unanswered))

    _print(_with_judge(work), as_json)


@command.command("golden")
@_AS_JSON
def golden(as_json: bool) -> None:
    """Examine the judge on the shipped pairs now, and keep the result. Exit status 1 if RL is paused for it."""
    from metaclaw_core.learn.health import golden_pairs, judge_health

    async def work(store: Store, client: LLMClient, settings: Settings) -> dict[str, Any]:
        with _progress(len(golden_pairs()), as_json) as on_item:
            found = await judge_health(store, client, settings.judge, on_item=on_item)
        return {"ok": found.ok, "reason": found.reason, **found.result}

    result = _with_judge(work)
    _print(result, as_json)
    sys.exit(0 if result["ok"] else 1)


def _with_judge(work: Callable[[Store, LLMClient, Settings], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    from metaclaw_core.learn.budget import Budget
    from metaclaw_core.learn.scoring import judge_client

    settings = load_settings()

    async def run(store: Store) -> dict[str, Any]:
        client = judge_client(settings, Budget(store, settings.llm.daily_token_budget))
        if client is None:
            raise ConfigError("No judge is configured: set rl.prm_url, rl.prm_model and rl.prm_api_key, or llm.*.")
        async with client:
            return await work(store, client, settings)

    with opened_store(drain=False) as store:
        return asyncio.run(run(store))


@contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Callable[[], None]]:
    """A bar on a terminal's stderr, otherwise nothing; what it yields moves it on by one."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("judging", total=total)
        yield lambda: bar.advance(task)


_LINES = (
    ("pairs", "pairs", "{}"),
    ("labels", "labels", "{}"),
    ("unanswered", "not answered", "{}"),
    ("abstained", "abstentions", "{}"),
    ("kappa", "agreement beyond chance (κ)", "{:.2f}"),
    ("agreement", "right verdicts", "{:.0%}"),
    ("flips", "verdicts that change with the order", "{:.0%}"),
    ("first_place", "verdicts for the one shown first", "{:.0%}"),
    ("calibration_error", "calibration error", "{:.2f}"),
)


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        json_line(result)
        return
    for key, words, form in _LINES:
        click.echo(f"{words:<38}{'unknown' if result[key] is None else form.format(result[key])}")
    if "ok" in result:
        click.echo("The judge may train." if result["ok"] else f"RL is paused: {result['reason']}.")
