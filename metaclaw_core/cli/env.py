"""``metaclaw env``: the lines that let a shell, or a service, use the proxy."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from metaclaw_core.cli.agentenv import agent_env, current_environment
from metaclaw_core.settings import home, load_settings

_SHELLS = ("bash", "fish", "powershell")


@click.command("env")
@click.option("--shell", type=click.Choice([*_SHELLS, "zsh", "sh"]), help="Default: what SHELL says, else bash.")
def command(shell: str | None) -> None:
    """Print the environment of the proxy for a shell: eval "$(metaclaw env)". Changes no file of yours.

    \b
    fish:        metaclaw env --shell fish | source
    powershell:  metaclaw env --shell powershell | Out-String | Invoke-Expression
    """
    from metaclaw_core.proxy.ca import CERTIFICATE, confdir, ensure_ca
    from metaclaw_core.proxy.detach import live_proxies

    settings, environment = load_settings(), current_environment()
    live = next((found for found in live_proxies(home()) if found.port), None)
    port = live.port if live and live.port else settings.proxy.port
    if live is not None and live.status is not None:
        ca = Path(live.status["ca"])
    else:
        ca = confdir() / CERTIFICATE
        if not ca.is_file():
            ensure_ca(confdir())
    found = agent_env(environment, settings, home(), port, ca)
    if live is None:
        click.echo("metaclaw: no proxy runs here yet: metaclaw start --detach", err=True)
    for note in found.notes:
        click.echo(f"metaclaw: {note}", err=True)
    if shell is None:
        name = Path(environment.get("SHELL", "")).name
        shell = name if name in _SHELLS else "bash"
    for name, value in found.variables.items():
        click.echo(line(shell, name, value))


def line(shell: str, name: str, value: str) -> str:
    """One assignment, quoted for `shell`."""
    if shell == "fish":
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"set -gx {name} '{escaped}'"
    if shell == "powershell":
        return "$env:{} = '{}'".format(name, value.replace("'", "''"))
    return f"export {name}={shlex.quote(value)}"
