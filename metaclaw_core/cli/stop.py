"""``metaclaw stop`` and ``metaclaw restart``."""

from __future__ import annotations

import contextlib
import sys

import click

from metaclaw_core.cli.start import describe, start_options
from metaclaw_core.cli.wire import undo_all
from metaclaw_core.errors import ConfigError
from metaclaw_core.proxy import detach
from metaclaw_core.proxy.control import call
from metaclaw_core.proxy.startoptions import StartOptions, check_sets, read_back
from metaclaw_core.settings import home, load_settings
from metaclaw_core.wiring import service
from metaclaw_core.wiring.records import wirings

_GRACE = click.option(
    "--grace", type=click.FloatRange(0, 3600), default=60.0, show_default=True, help="Seconds to let open answers end."
)


@click.command("stop")
@_GRACE
def stop(grace: float) -> None:
    """End the running proxies of this home, once their open answers are through. Exit status 3 if none runs.

    An agent that was wired to the proxy (`metaclaw wire`) has no LLM while it is stopped: that is said, with the command
    that undoes it.
    """
    running = detach.live_proxies(home())
    if not running:
        click.echo(f"metaclaw: no proxy runs in {home()}, so there is nothing to stop.", err=True)
        sys.exit(3)
    for live in running:
        if service.is_ours(live.pid):
            drain(live, grace)
            service.stop()  # ended by a signal alone it would be back within a second
            click.echo(f"The service's proxy {live} has ended; it starts again at the next login or by `metaclaw restart`.")
        else:
            end(live, grace)
    wired = wirings(home())
    for wiring in wired:
        click.echo(f"metaclaw: {wiring}, and has no LLM until the proxy runs again. Undo it: {wiring.undo}", err=True)
    if wired and sys.stdin.isatty() and click.confirm("Undo it now?", default=False):
        undo_all(restart=True, dry_run=False, yes=True, as_json=False)


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
    serving = [live for live in running if service.is_ours(live.pid)]
    if serving or (not running and service.this_manager().serves(home())):
        if chosen != StartOptions():
            raise ConfigError(
                "The proxy runs as a service, which takes its options from the configuration: `metaclaw config KEY VALUE`, "
                "then `metaclaw restart` without options."
            )
        for live in serving:
            drain(live, grace)
        service.restart()
        click.echo("The service's proxy was started anew; `metaclaw status` shows it.")
        return
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


def drain(live: detach.Live, grace: float) -> None:
    """Let open answers end, for a proxy that somebody else stops."""
    if live.status is not None:
        with contextlib.suppress(OSError, ValueError):  # it is ended all the same
            call(live.proxy, "drain", timeout=grace + 10.0, seconds=grace)


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
