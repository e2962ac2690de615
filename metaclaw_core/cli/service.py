"""``metaclaw service``: have the system keep the proxy running."""

from __future__ import annotations

import shlex
import sys
import time
from typing import TYPE_CHECKING

import click

from metaclaw_core.cli.output import json_line
from metaclaw_core.cli.wire import DRY_RUN, YES, carry_out
from metaclaw_core.errors import ConfigError
from metaclaw_core.settings import home, load_settings

if TYPE_CHECKING:
    from metaclaw_core.wiring.service import Manager

_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object.")


@click.group("service")
def command() -> None:
    """Keep the proxy running: a systemd user service, or a launchd agent on macOS.

    It starts when you log in and before OpenClaw's gateway, and comes back one second after any end.
    """


@command.command("install")
@DRY_RUN
@YES
@click.option("--wait", type=click.FloatRange(0, 600), default=20.0, show_default=True, help="Seconds to wait until it serves.")
@_JSON
def install(dry_run: bool, yes: bool, wait: float, as_json: bool) -> None:
    """Install the service and start it. Twice is once."""
    from metaclaw_core.cli.agentenv import current_environment
    from metaclaw_core.proxy.detach import live_proxies
    from metaclaw_core.wiring import service
    from metaclaw_core.wiring.openclaw import gateway_units

    load_settings()  # a service that can't start is worse than none
    manager = service.this_manager()
    problem = manager.problem()
    if problem and not dry_run:
        raise ConfigError(
            f"{problem}. Without a service: metaclaw start --detach, or let your own supervisor run "
            f"`METACLAW_HOME={shlex.quote(str(home().absolute()))} {shlex.join(service.command())}`."
        )
    by_hand = [live for live in live_proxies(home()) if not service.is_ours(live.pid)]
    if by_hand and not dry_run:
        raise ConfigError(f"A proxy that was started by hand runs {by_hand[0]}: `metaclaw stop` it first, the service takes its port.")
    notes = [f"{problem}: it can only be shown here."] if problem else []
    if ignored := service.left_behind(current_environment()):
        notes.append(f"The service does not see {', '.join(ignored)} of this shell; `metaclaw config` keeps settings for it.")
    if manager.lingers() is False:
        notes.append("The service ends when you log out of the last session; `loginctl enable-linger` keeps it.")
    steps = manager.install_steps(home(), gateway_units(manager.user_home))
    done = carry_out(
        steps, dry_run=dry_run, yes=yes, as_json=as_json, notes=notes, nothing="The service is installed and runs."
    )
    if done and not as_json:
        click.echo(_what_came(manager, wait))


def _what_came(manager: Manager, wait: float) -> str:
    from metaclaw_core.proxy.detach import live_proxies

    deadline = time.monotonic() + wait
    while manager.state().get("ActiveState") in ("active", "activating") and time.monotonic() < deadline:
        for live in live_proxies(home()):
            if live.addresses:
                return f"The proxy runs {live}. OpenClaw's gateway uses it after: metaclaw wire openclaw"
        time.sleep(0.2)
    return f"The service is installed, but the proxy does not answer yet: {manager.log_hint}, or try `metaclaw doctor`."


@command.command("remove")
@DRY_RUN
@YES
@_JSON
def remove(dry_run: bool, yes: bool, as_json: bool) -> None:
    """Stop the service and remove it."""
    from metaclaw_core.wiring.records import wirings
    from metaclaw_core.wiring.service import this_manager

    if (wired := wirings(home())) and not dry_run:
        raise ConfigError(f"{wired[0]} and would have no network without it: {wired[0].undo} first.")
    manager = this_manager()
    steps = manager.remove_steps()
    if carry_out(steps, dry_run=dry_run, yes=yes, as_json=as_json, nothing="No service is installed.") and not as_json:
        click.echo("The service is gone. `metaclaw start` runs the proxy by hand.")


@command.command("status")
@_JSON
def status(as_json: bool) -> None:
    """Whether it is installed and runs. Exit status 3 if it is not installed, 1 if it does not run."""
    from metaclaw_core.wiring.service import this_manager

    manager = this_manager()
    problem = manager.problem()
    state = manager.state() if problem is None else {}
    active = state.get("ActiveState") == "active"
    if as_json:
        json_line({"installed": manager.installed, "file": str(manager.file), "active": active, "manager": state, "problem": problem})
    elif not manager.installed:
        click.echo("No service is installed: metaclaw service install.")
    else:
        detail = problem or ", ".join(f"{name}={value}" for name, value in state.items()) or "the manager does not know it"
        click.echo(f"{manager.file}: {detail}")
        if not active:
            click.echo(f"It does not run: {manager.log_hint}.")
    sys.exit(3 if not manager.installed else 0 if active else 1)
