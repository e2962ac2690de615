"""``metaclaw start``: the proxy, in the foreground or detached."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from metaclaw_core.cli.optimised import optimise
from metaclaw_core.errors import ConfigError
from metaclaw_core.proxy.startoptions import StartOptions, check_sets
from metaclaw_core.settings import home, load_settings


def start_options[F: Callable[..., Any]](function: F) -> F:
    """The options that say how the proxy runs, shared with restart."""
    for option in (
        click.option("--lean/--no-lean", default=True, help="Leave out the parts of mitmproxy that have nothing to do here (default)."),
        click.option("--set", "sets", multiple=True, metavar="NAME=VALUE", help="A mitmproxy or metaclaw_* option, as for mitmdump."),
        click.option("--mode", type=click.Choice(["skills_only", "rl"]), help="Default: mode of the settings. rl serves and trains nothing yet."),
        click.option("--port", type=click.IntRange(1, 65535), help="Listen here; default: proxy.port, 30000."),
    ):
        function = option(function)
    return function


@click.command("start")
@start_options
@click.option("--detach", "-d", is_flag=True, help="Run in the background; returns when the proxy serves.")
def command(port: int | None, mode: str | None, sets: tuple[str, ...], lean: bool, detach: bool) -> None:
    """Run the proxy on 127.0.0.1 until it is interrupted, or with --detach in the background."""
    if lean and not detach:
        optimise(sets)
    options = StartOptions(port=port, mode=mode, lean=lean, sets=sets)
    check_sets(sets)
    configured = load_settings().proxy.port  # here, so that what is wrong in them is said before anything starts
    wanted = port or configured
    from metaclaw_core.proxy import detach as processes

    running = processes.live_proxies(home())
    if port is None or any(live.port == wanted for live in running):
        for live in running:
            raise ConfigError(
                f"The proxy runs already, {live}. `metaclaw status` shows it, `metaclaw restart` starts it anew; "
                "a second one beside it needs a port of its own: metaclaw start --port N."
            )
    if detach:
        live = processes.start(home(), options)
        click.echo(describe(live))
        return
    from metaclaw_core.proxy.master import run

    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # a log shows it at once
    run(options)


def describe(live: Any) -> str:
    from metaclaw_core.proxy.detach import log_file

    skills = live.status["skills"]
    count = f", {skills['count']} skills" if skills else ""
    return (
        f"The proxy runs {live}, mode {live.status['mode']}{count}; log: {log_file(home())}\n"
        "  metaclaw run -- COMMAND    lets a command use it; `metaclaw env` prints what a shell or service needs"
    )
