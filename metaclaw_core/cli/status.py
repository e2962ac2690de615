"""``metaclaw status`` and ``metaclaw bypass``: ask and tell running proxies."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from metaclaw_core.cli.output import json_line
from metaclaw_core.settings import home

ROUTED = "to the policy server"  # the proxy's counter


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
        click.echo("\n".join([*_traffic_lines(learning["traffic_today"]), *_learning_lines(learning)]))
    sys.exit(1 if any("error" in answer for answer in answers) else 0)


def _learning() -> dict[str, Any] | None:
    """What the worker has done and what it waits for; None: there is no store yet."""
    from metaclaw_core.cli.output import opened_store
    from metaclaw_core.learn.costs import own_cost, traffic_cost
    from metaclaw_core.learn.overview import overview
    from metaclaw_core.learn.prices import load_prices
    from metaclaw_core.settings import load_settings

    settings, prices, now = load_settings(), load_prices(home()), time.time()
    if not settings.store.url and not (home() / "store.db").exists():
        return None
    with opened_store(drain=False) as store:
        return {
            **overview(store, settings, now),
            "traffic_today": traffic_cost(store, prices, now),
            "own_cost_today": own_cost(store, prices, now),
        }


def _traffic_lines(traffic: dict[str, Any]) -> list[str]:
    from metaclaw_core.learn.costs import cost_text

    silent = f"; {traffic['unreported']:,} answers without a count" if traffic["unreported"] else ""
    if not traffic["requests"]:
        return [f"traffic    no tokens were reported today{silent}"] if silent else []
    return [
        f"traffic    {traffic['input']:,} tokens in ({traffic['cached']:,} from the provider's cache), "
        f"{traffic['output']:,} out today (UTC), {cost_text(traffic)}{silent}"
    ]


def _learning_lines(learning: dict[str, Any]) -> list[str]:
    from metaclaw_core.cli.output import when

    lines = []
    for name in ("turns", "segments"):
        if counts := ", ".join(f"{n} {state}" for state, n in learning[name].items()):
            lines.append(f"{name:<10} {counts}")
    judge, tokens = learning["judge"], learning["tokens"]
    examined = f", examined {when(judge['checked_at'])}" if judge["ok"] is not None else ""
    said = f"{judge['model']}{examined}: {judge['problem'] or 'ok'}" if judge["model"] else judge["problem"]
    lines.append(f"judge      {said}")
    budget = "no limit" if tokens["budget"] is None else f"of {tokens['budget']:,}"
    purposes = ", ".join(f"{name} {n:,}" for name, n in tokens["by_purpose"].items())
    lines.append(
        f"tokens     {tokens['today']:,} today, {budget}"
        + (f" ({purposes})" if purposes else "")
        + (f"; {tokens['callers_24h']:,} in 24 h with your agent's own key" if tokens["callers_24h"] else "")
    )
    if (own := learning.get("own_cost_today")) and own["requests"]:
        from metaclaw_core.learn.costs import cost_text

        guessed = f"; {own['estimated']:,} tokens of it are estimates" if own["estimated"] else ""
        lines.append(f"own calls  {cost_text(own)} today{guessed}")
    for run in learning["runs"]:
        how = {True: "ok", False: f"failed: {run['error']}", None: "running, or cut off"}[run["ok"]]
        problems = (run["report"] or {}).get("problems") or ()
        lines.append(f"{run['name']:<10} {when(run['started_at'])}, {how}" + (f"; {problems[0]}" if problems else ""))
    return lines + [f"notice     {when(notice['at'])}: {notice['text']}" for notice in learning["notices"]]


def _lines(answer: dict[str, Any]) -> list[str]:
    if "error" in answer:
        return [f"pid {answer['pid']}: {answer['error']}"]
    counters, spool, skills = answer["counters"], answer["spool"], answer["skills"]
    hours, seconds = divmod(int(answer["uptime_s"]), 3600)
    lines = [
        f"proxy      pid {answer['pid']}, {', '.join(answer['listen']) or 'not listening'}, mode {answer['mode']}, "
        f"up {hours}h{seconds // 60:02}m" + (", BYPASSED" if answer["bypass"] else ""),
        f"skills     {_skills(skills)}",
        f"sessions   {answer['sessions']} known, {answer['sessions_active_10min']} in the last 10 minutes",
        f"exchanges  {counters.get('exchanges', 0)} recorded, {counters.get('injected', 0)} with skills, "
        f"{answer['open_requests']} open",
        f"added      {_added(answer)}",
        f"spool      {spool['queued']} queued, {spool['written']} written"
        + (f", {spool['dropped']} LOST" if spool["dropped"] else "")
        + (f", last error: {spool['last_error']}" if spool["last_error"] else ""),
    ]
    if route := answer.get("route"):
        lines += _route_lines(route, counters)
    for child in answer["children"]:
        state = f"pid {child['pid']}" if child["pid"] else "not running"
        lines.append(f"{child['name']:<10} {state}, {child['restarts']} restarts")
    if answer.get("last_error"):
        lines.append(f"last error {answer['last_error']} (see logs/proxy.log)")
    rest = {k: v for k, v in counters.items() if k not in ("exchanges", "injected", ROUTED)}
    lines += [f"           {name}: {count}" for name, count in rest.items()]
    return lines


def _route_lines(route: dict[str, Any], counters: dict[str, int]) -> list[str]:
    """Mode rl: who answers, and why if it isn't the own model."""
    failed = sum(n for name, n in counters.items() if name.startswith("the policy server failed"))
    asked = f"{counters.get(ROUTED, 0)} requests sent there, {failed} of them not answered"
    if route["working"] is None:
        return ["route      none yet: requests go to their own LLM"]
    versions = f"version {route['working']}" + (f", control share on {route['stable']}" if route["stable"] != route["working"] else "")
    problem = None
    if not route["enabled"]:
        problem = f"off: {route['reason'] or 'no reason given'}"
    elif not route["ready"]:
        said = route["problem"] or ("no sign of life; see logs/policy.log" if route["heartbeat_age_s"] is None else f"silent for {route['heartbeat_age_s']} s")
        problem = f"the policy server is not ready: {said}"
    elif route["breaker"] != "closed":
        problem = f"the breaker is {route['breaker']} after failures"
    return [
        f"route      {versions} (generation {route['generation']}); {asked}",
        *([f"           requests go to their own LLM, {problem}"] if problem else []),
    ]


def _skills(skills: dict[str, Any] | None) -> str:
    if skills is None:
        return "no index yet"
    if skills["generation"] is None:
        return f"{skills['count']} as read at the start; the worker's index is not there yet"
    return f"{skills['count']} in generation {skills['generation']}"


def _added(answer: dict[str, Any]) -> str:
    added = answer.get("added_ms")  # a proxy of an older version doesn't say
    return f"{added['p50']} ms to a request (median; 95 % under {added['p95']} ms)" if added else "nothing measured yet"


@click.command("bypass")
@click.argument("value", type=click.Choice(["on", "off"]))
def bypass(value: str) -> None:
    """on: requests pass every running proxy unchanged (and are still recorded). off: back to normal."""
    for answer in ask("bypass", value=value):
        click.echo(f"pid {answer['pid']}: {answer.get('error') or f'bypass {value}'}")
