"""``metaclaw wire``: give an agent's own service the proxy, and take it away again.

Design: everything outside METACLAW_HOME is shown before it is done and done only after a yes. What was wired is
recorded, so that `stop` and `uninstall` can name it. Which steps those are is `metaclaw_core.wiring`'s business.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from metaclaw_core.cli.output import json_line
from metaclaw_core.errors import ConfigError
from metaclaw_core.settings import home, load_settings

if TYPE_CHECKING:
    from metaclaw_core.cli.agentenv import AgentEnv
    from metaclaw_core.wiring.plan import Step
    from metaclaw_core.wiring.records import Wiring

DRY_RUN = click.option("--dry-run", is_flag=True, help="Show what would be done outside METACLAW_HOME, and do nothing there.")
YES = click.option("--yes", "-y", is_flag=True, help="Don't ask.")


@click.command("wire")
@click.argument("agent", required=False, type=click.Choice(["openclaw"]))
@click.option("--undo", is_flag=True, help="Take away what `wire` put there, and nothing else.")
@click.option("--no-service", is_flag=True, help="The proxy is kept running by something of your own, not by `metaclaw service`.")
@click.option("--via-config", is_flag=True, help="Through OpenClaw's own setting proxy.proxyUrl instead of its service's environment.")
@click.option("--no-restart", is_flag=True, help="Leave the gateway running: it notices at its next start.")
@click.option("--unit", metavar="NAME", help="The gateway's unit, where there are several.")
@click.option("--system-proxy", is_flag=True, help="Print the lines that give a whole desktop session the proxy; changes nothing.")
@DRY_RUN
@YES
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(
    agent: str | None,
    undo: bool,
    no_service: bool,
    via_config: bool,
    no_restart: bool,
    unit: str | None,
    system_proxy: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Let an agent's service use the proxy.

    \b
    metaclaw wire                    which wirings are in force
    metaclaw wire openclaw           give OpenClaw's gateway service the proxy and its CA
    metaclaw wire openclaw --undo    take that away
    metaclaw wire --system-proxy     print lines for environment.d, launchctl and setx

    An agent that you start in a terminal needs none of it: metaclaw run -- COMMAND.
    """
    if system_proxy:
        if agent or undo:
            raise ConfigError("--system-proxy only prints lines: give it alone.")
        _system_proxy(as_json)
    elif agent is None:
        if undo:
            raise ConfigError("Name what to undo: metaclaw wire openclaw --undo.")
        _list(as_json)
    elif undo:
        undo_all(restart=not no_restart, dry_run=dry_run, yes=yes, as_json=as_json)
    else:
        _wire(unit, no_service=no_service, via_config=via_config, restart=not no_restart, dry_run=dry_run, yes=yes, as_json=as_json)


def _list(as_json: bool) -> None:
    from dataclasses import asdict

    from metaclaw_core.wiring.records import wirings

    known = wirings(home())
    if as_json:
        json_line({"wirings": [asdict(wiring) for wiring in known]})
    elif not known:
        click.echo("Nothing is wired. An agent in a terminal: metaclaw run -- COMMAND; OpenClaw's service: metaclaw wire openclaw.")
    for wiring in known if not as_json else ():
        click.echo(f"{wiring}; undo: {wiring.undo}")


def _wire(
    unit: str | None, *, no_service: bool, via_config: bool, restart: bool, dry_run: bool, yes: bool, as_json: bool
) -> None:
    from metaclaw_core.cli.agentenv import current_environment
    from metaclaw_core.wiring import openclaw
    from metaclaw_core.wiring.records import remember, wirings
    from metaclaw_core.wiring.service import this_manager
    from metaclaw_core.wiring.units import gateway_name

    manager, environment = this_manager(), current_environment()
    if not no_service and not manager.installed:
        raise ConfigError(
            "The gateway has no network while the proxy is down, and nothing keeps it up: run `metaclaw service install` first. "
            "If something of your own does, add --no-service."
        )
    user_home = manager.user_home
    gateway = None if manager.launchd else openclaw.find_gateway(user_home, environment, unit)
    proxy = _agent_env(gateway.environment if gateway else environment, live_port=no_service)
    if gateway is None and not via_config:
        if manager.launchd:
            words = " ".join(f"{name}={proxy.variables[name]}" for name in _FOR_LAUNCHD if name in proxy.variables)
            raise ConfigError(
                "On macOS OpenClaw writes its launchd job itself, and nothing can be laid beside it. OpenClaw keeps these two: "
                f"{words} openclaw gateway install --force. Or use --via-config."
            )
        raise ConfigError(openclaw.no_gateway(gateway_name(unit, environment, openclaw.gateway_units(user_home))))

    notes = list(proxy.notes)
    found: list[tuple[Wiring, list[Step]]] = []
    if gateway is not None:
        variables = {k: v for k, v in proxy.variables.items() if not via_config or k not in openclaw.PROXY_VARIABLES}
        found.append(openclaw.service_steps(gateway, home(), variables, after_service=not no_service, restart=restart))
        if (problem := manager.problem()) and found[0][1] and not dry_run:
            raise ConfigError(f"{problem}, so the gateway's service can't be told: run this where its user is logged in.")
    if via_config:
        file = openclaw.config_file(gateway.environment if gateway else environment, user_home)
        known = next((w for w in wirings(home()) if w.file == str(file)), None)
        found.insert(0, openclaw.config_steps(file, proxy.variables["HTTP_PROXY"], known))
        if gateway is None:
            ca = proxy.variables["NODE_EXTRA_CA_CERTS"]
            notes.append(f"OpenClaw must also trust the CA, by its environment before it starts: NODE_EXTRA_CA_CERTS={ca}")
        if "OPENCLAW_PROXY_URL" not in proxy.variables:
            notes.append("OpenClaw sends base URLs on this machine past proxy.proxyUrl; without --via-config they are seen too.")

    def record() -> None:
        for wiring, _ in found:
            remember(home(), wiring)

    steps = [step for _, some in found for step in some]
    done = carry_out(steps, dry_run=dry_run, yes=yes, as_json=as_json, notes=notes, nothing="OpenClaw is wired already.", before=record)
    if not steps and not dry_run:
        record()
    if done and not as_json:
        click.echo("OpenClaw uses the proxy" + (" from its next start on." if not restart else ".") + " Undo: metaclaw wire openclaw --undo")


_FOR_LAUNCHD = ("OPENCLAW_PROXY_URL", "NODE_EXTRA_CA_CERTS")


def undo_all(*, restart: bool, dry_run: bool, yes: bool, as_json: bool) -> bool:
    """Undo every wiring; False if the person said no."""
    from metaclaw_core.wiring import openclaw
    from metaclaw_core.wiring.records import forget, wirings

    known = wirings(home())
    known += openclaw.unrecorded(Path.home(), known)
    steps = [step for wiring in known for step in openclaw.undo_steps(wiring, home(), restart=restart)]
    nothing = "OpenClaw is not wired, so there is nothing to undo." if not known else "What was wired is gone already."
    done = carry_out(steps, dry_run=dry_run, yes=yes, as_json=as_json, nothing=nothing)
    if dry_run or (steps and not done):
        return dry_run
    for wiring in known:
        forget(home(), wiring)
    if steps and not as_json:
        click.echo("OpenClaw's files are without the proxy again." + ("" if restart else " A running gateway uses it until its next start."))
    return True


def _agent_env(environment: dict[str, str], *, live_port: bool) -> AgentEnv:
    from metaclaw_core.cli.agentenv import agent_env
    from metaclaw_core.proxy.ca import confdir, ensure_ca
    from metaclaw_core.proxy.detach import live_proxies

    settings = load_settings()
    live = next((found for found in live_proxies(home()) if found.port), None) if live_port else None
    port = live.port if live and live.port else settings.proxy.port
    ca = Path(live.status["ca"]) if live and live.status and live.status.get("ca") else ensure_ca(confdir())
    return agent_env(environment, settings, home(), port, ca)


def _system_proxy(as_json: bool) -> None:
    from metaclaw_core.cli.agentenv import current_environment
    from metaclaw_core.wiring.openclaw import PROXY_VARIABLES
    from metaclaw_core.wiring.units import system_lines

    environment = _agent_env(current_environment(), live_port=True)
    wanted = (*(name for name in PROXY_VARIABLES if name.isupper()), "NODE_EXTRA_CA_CERTS")
    lines = system_lines({name: value for name, value in environment.variables.items() if name in wanted})
    if as_json:
        json_line({"lines": lines, "notes": environment.notes})
        return
    for note in environment.notes:
        click.echo(f"metaclaw: {note}", err=True)
    for place, some in lines.items():
        click.echo(f"# {place}")
        click.echo("\n".join(some) + "\n")
    click.echo(
        "# Node, and so OpenClaw, ignores the proxy setting of the desktop (GNOME, macOS, Windows): it needs these variables.\n"
        "# Everything that is started with them loses its network while the proxy is down, unlike with `metaclaw run`."
    )


def carry_out(
    steps: Sequence[Step],
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    nothing: str,
    notes: Sequence[str] = (),
    before: Callable[[], None] = lambda: None,
) -> bool:
    """Show the steps, ask, do them; whether they were done. `before` runs first, once the answer is yes."""
    from metaclaw_core.wiring.plan import perform, show

    for note in notes if not as_json else ():
        click.echo(f"metaclaw: {note}", err=True)
    if not as_json:
        click.echo(f"This will\n{show(steps)}" if steps else nothing)
    done = False
    if steps and not dry_run and (yes or _agreed(as_json)):
        before()
        perform(steps)
        done = True
    if as_json:
        json_line({"steps": [step.lines() for step in steps], "done": done, "notes": list(notes)})
    return done


def _agreed(as_json: bool) -> bool:
    if as_json or not _can_ask():
        raise ConfigError("Nobody can be asked here: add --yes to do it, or --dry-run to only see it.")
    return click.confirm("Do it?", default=False)


def _can_ask() -> bool:
    return sys.stdin.isatty()
