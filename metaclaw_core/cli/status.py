"""``metaclaw status`` and ``metaclaw bypass``: ask and tell running proxies."""

from __future__ import annotations

import sys
from typing import Any

import click

from metaclaw_core.cli.output import json_line
from metaclaw_core.settings import home


def ask(message: str, **arguments: Any) -> list[dict[str, Any]]:
    """One answer per running proxy of this home; ends the program with status 3 if there is none."""
    from metaclaw_core.proxy.control import call, running_proxies

    answers = []
    for proxy in running_proxies(home()):
        try:
            answers.append({"pid": proxy.pid, **call(proxy, message, **arguments)})
        except OSError as e:
            answers.append({"pid": proxy.pid, "error": f"does not answer: {e}"})
    if not answers:
        click.echo("metaclaw: no proxy is running here. `metaclaw start`, or `mitmdump -s` with the addon.", err=True)
        sys.exit(3)
    return answers


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per running proxy.")
def status(as_json: bool) -> None:
    """What the running proxies do. Exit status 3 if none runs, 1 if one does not answer."""
    answers = ask("status")
    learning = _learning()
    for answer in answers:
        if as_json:
            json_line({**answer, "learning": learning})
        else:
            click.echo("\n".join(_lines(answer)))
    if learning is not None and not as_json:
        click.echo("\n".join(_learning_lines(learning)))
    sys.exit(1 if any("error" in answer for answer in answers) else 0)


def _learning() -> dict[str, Any] | None:
    """What the worker has done and what it waits for; None: there is no store yet."""
    from metaclaw_core.cli.output import opened_store
    from metaclaw_core.learn.evolve import segment_counts
    from metaclaw_core.learn.runs import all_notices, last_runs
    from metaclaw_core.settings import load_settings

    if not load_settings().store.url and not (home() / "store.db").exists():
        return None
    with opened_store(drain=False) as store:
        return {"segments": segment_counts(store), "runs": last_runs(store), "notices": all_notices(store)}


def _learning_lines(learning: dict[str, Any]) -> list[str]:
    from metaclaw_core.cli.output import when

    segments = ", ".join(f"{n} {state}" for state, n in learning["segments"].items())
    lines = [f"segments   {segments}"] if segments else []
    for run in learning["runs"]:
        how = {True: "ok", False: f"failed: {run['error']}", None: "running, or cut off"}[run["ok"]]
        lines.append(f"{run['name']:<10} {when(run['started_at'])}, {how}")
    return lines + [f"notice     {when(notice['at'])}: {notice['text']}" for notice in learning["notices"]]


def _lines(answer: dict[str, Any]) -> list[str]:
    if "error" in answer:
        return [f"pid {answer['pid']}: {answer['error']}"]
    counters, spool, skills = answer["counters"], answer["spool"], answer["skills"]
    hours, seconds = divmod(int(answer["uptime_s"]), 3600)
    lines = [
        f"proxy      pid {answer['pid']}, {', '.join(answer['listen']) or 'not listening'}, mode {answer['mode']}, "
        f"up {hours}h{seconds // 60:02}m" + (", BYPASSED" if answer["bypass"] else ""),
        f"skills     {skills['count']} in generation {skills['generation']}" if skills else "skills     no index yet",
        f"sessions   {answer['sessions']} known, {answer['sessions_active_10min']} in the last 10 minutes",
        f"exchanges  {counters.get('exchanges', 0)} recorded, {counters.get('injected', 0)} with skills, "
        f"{answer['open_requests']} open",
        f"spool      {spool['queued']} queued, {spool['written']} written"
        + (f", {spool['dropped']} LOST" if spool["dropped"] else "")
        + (f", last error: {spool['last_error']}" if spool["last_error"] else ""),
    ]
    for child in answer["children"]:
        state = f"pid {child['pid']}" if child["pid"] else "not running"
        lines.append(f"{child['name']:<10} {state}, {child['restarts']} restarts")
    rest = {k: v for k, v in counters.items() if k not in ("exchanges", "injected")}
    lines += [f"           {name}: {count}" for name, count in rest.items()]
    return lines


@click.command("bypass")
@click.argument("value", type=click.Choice(["on", "off"]))
def bypass(value: str) -> None:
    """on: requests pass every running proxy unchanged (and are still recorded). off: back to normal."""
    for answer in ask("bypass", value=value):
        click.echo(f"pid {answer['pid']}: {answer.get('error') or f'bypass {value}'}")
