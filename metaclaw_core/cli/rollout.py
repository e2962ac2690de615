"""``metaclaw rollout DIR``: tasks from JSONL files through an agent behind the proxy."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from metaclaw_core.errors import ConfigError
from metaclaw_core.settings import load_settings

if TYPE_CHECKING:
    from metaclaw_core.cli.agentenv import AgentEnv
    from metaclaw_core.learn.endpoint import Endpoint
    from metaclaw_core.rollout.run import Agent
    from metaclaw_core.rollout.tasks import Outcome, Results, Task
    from metaclaw_core.settings import Settings


@click.command("rollout")
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Where results and the tasks' folders go.  [default: DIR/rollout]")
@click.option("-n", "--at-once", default=2, show_default=True, type=click.IntRange(1, 64), help="Tasks at a time.")
@click.option("--agent", "kind", default="openclaw", show_default=True, type=click.Choice(["openclaw", "loop"]),
              help="The real OpenClaw, or a built-in loop with file tools that asks llm.*.")
@click.option("--model", help="PROVIDER/MODEL for OpenClaw, a model's name for the loop; else the one that is set.")
@click.option("--timeout", default=600.0, show_default=True, type=click.FloatRange(1), help="Seconds for one task.")
@click.option("--again", is_flag=True, help="Also the tasks that failed before.")
@click.option("--json", "as_json", is_flag=True, help="What came of it as one JSON object.")
def command(
    folder: Path | None, out: Path | None, at_once: int, kind: str, model: str | None, timeout: float, again: bool, as_json: bool
) -> None:
    """Give the tasks of DIR to an agent, so that there is something to learn from.

    DIR (default: the setting openclaw_env_data_dir) holds *.jsonl files with {"task_id": …, "instruction": …} a line, and
    for a task that needs files a folder of its name. A task with a result is not run again. Exit status 3 if some failed.
    """
    from metaclaw_core.cli.output import json_line
    from metaclaw_core.cli.run import proxy_for_a_command
    from metaclaw_core.rollout.tasks import Results, read_tasks

    settings = load_settings()
    if folder is None:
        if not settings.openclaw_env_data_dir:
            raise ConfigError("Name the folder of the tasks, or set it: metaclaw config openclaw_env_data_dir DIR.")
        folder = Path(settings.openclaw_env_data_dir).expanduser()
    tasks = read_tasks(folder)
    if kind == "openclaw" and shutil.which("openclaw") is None:
        raise ConfigError("openclaw is no command that can be found: install it, or use --agent loop.")
    endpoint = _endpoint(settings, model) if kind == "loop" else None
    place = out or folder / "rollout"
    results = Results(place)
    todo = results.open_tasks(tasks, again=again)
    counts = {"done": 0, "failed": 0, "timeout": 0}
    if todo:
        run = Run(todo, results, folder, at_once, endpoint, model, timeout)
        with proxy_for_a_command() as environment:
            counts = asyncio.run(_run(run, environment))
    if as_json:
        json_line({"tasks": len(tasks), "run": len(todo), **counts, "results": str(place / "results")})
    elif todo:
        click.echo(", ".join(f"{n} {word}" for word, n in counts.items() if n) + f"; results in {place / 'results'}")
    else:
        click.echo(f"All {len(tasks)} tasks have a result in {place / 'results'}.")
    sys.exit(3 if counts["failed"] or counts["timeout"] else 0)


@dataclass(frozen=True, slots=True)
class Run:
    tasks: list[Task]
    results: Results
    folder: Path
    at_once: int
    endpoint: Endpoint | None  # None: OpenClaw
    model: str | None
    timeout_s: float


async def _run(run: Run, environment: AgentEnv) -> dict[str, int]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from metaclaw_core.cli.agentenv import current_environment
    from metaclaw_core.rollout.openclaw import OpenClawAgent
    from metaclaw_core.rollout.run import run_tasks
    from metaclaw_core.rollout.toolloop import ToolLoop

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("tasks", total=len(run.tasks))

        def ended(task: Task, outcome: Outcome) -> None:
            progress.advance(bar)
            if outcome.status != "done":
                console.print(f"{task.id}: {outcome.status}: {outcome.error}", markup=False, highlight=False)

        async def with_(agent: Agent) -> dict[str, int]:
            return await run_tasks(run.tasks, agent, run.results, run.folder, at_once=run.at_once, ended=ended)

        if run.endpoint is None:
            whole = environment.over(current_environment())
            return await with_(OpenClawAgent(whole, model=run.model, timeout_s=run.timeout_s))
        proxy, bundle = environment.variables["HTTPS_PROXY"], environment.variables["SSL_CERT_FILE"]
        verify = ssl.create_default_context(cafile=bundle)
        async with ToolLoop(run.endpoint, proxy=proxy, verify=verify, timeout_s=run.timeout_s) as loop:
            if not loop.has_shell:
                console.print("metaclaw: bubblewrap (bwrap) is not installed: the loop has file tools and no shell.", highlight=False)
            return await with_(loop)


def _endpoint(settings: Settings, model: str | None) -> Endpoint:
    """What the loop asks. Raises ConfigError."""
    from dataclasses import replace

    from metaclaw_core.learn.endpoint import llm_endpoint

    endpoint = llm_endpoint(settings)
    if endpoint is None:
        raise ConfigError("--agent loop asks llm.*, and nothing is set there: metaclaw setup.")
    if endpoint.dialect != "openai":
        raise ConfigError(f"--agent loop speaks OpenAI's chat completions, and {endpoint.api_base} does not.")
    return replace(endpoint, model=model) if model else endpoint
