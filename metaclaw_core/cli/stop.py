"""``metaclaw stop`` and ``metaclaw restart``."""

from __future__ import annotations

import sys

import click

from metaclaw_core.cli.start import describe, start_options
from metaclaw_core.errors import ConfigError
from metaclaw_core.proxy import detach
from metaclaw_core.proxy.startoptions import StartOptions, check_sets, read_back
from metaclaw_core.settings import home, load_settings

_GRACE = click.option(
    "--grace", type=click.FloatRange(0, 3600), default=60.0, show_default=True, help="Seconds to let open answers end."
)


@click.command("stop")
@_GRACE
def stop(grace: float) -> None:
    """End the running proxies of this home, once their open answers are through. Exit status 3 if none runs."""
    running = detach.live_proxies(home())
    if not running:
        click.echo(f"metaclaw: no proxy runs in {home()}, so there is nothing to stop.", err=True)
        sys.exit(3)
    for live in running:
        end(live, grace)


@click.command("restart")
@start_options
@_GRACE
def restart(port: int | None, mode: str | None, sets: tuple[str, ...], lean: bool, grace: float) -> None:
    """Stop the proxy and start it again, detached, with the options it had; options given here win.

    Where none runs, one is started. A proxy of your own mitmdump is left alone.
    """
    check_sets(sets)
    load_settings()  # before the old one ends: a file that can't be read must not leave the agents without a proxy
    chosen = StartOptions(port=port, mode=mode, lean=lean, sets=sets)
    running = detach.live_proxies(home())
    known = [(live, old) for live in running if (old := read_back(home(), live.pid)) is not None]
    if running and not known:
        raise ConfigError(f"The proxy {running[0]} was not started by `metaclaw start`: restart it where you started it.")
    if len(known) > 1:
        raise ConfigError(f"More than one proxy runs: {'; '.join(str(live) for live, _ in known)}. Stop and start them by hand.")
    if known:
        live, old = known[0]
        chosen = chosen.over(old)
        if chosen.left_out:
            names = ", ".join(f"--set {name}=…" for name in chosen.left_out)
            raise ConfigError(f"The proxy was started with secrets, which are not kept on disk: give {names} again.")
        end(live, grace)
    click.echo(describe(detach.start(home(), chosen)))


def end(live: detach.Live, grace: float, *, quiet: bool = False) -> None:
    """Stop one proxy and say what happened."""
    still_open = live.status.get("open_requests") if live.status else None
    if still_open and grace and not quiet:
        click.echo(f"Waiting up to {grace:g} s for {still_open} open answer{'s' if still_open > 1 else ''} …", err=True)
    ended = detach.stop(live, grace)
    notes = []
    if ended.cut:
        notes.append(f"{ended.cut} open answer{'s were' if ended.cut > 1 else ' was'} cut")
    if ended.killed:
        notes.append("it did not end by itself and was killed; what it had finished is on disk")
    if not quiet or notes:
        click.echo(f"The proxy {live} has ended{': ' if notes else '.'}{'; '.join(notes)}{'.' if notes else ''}", err=quiet)
