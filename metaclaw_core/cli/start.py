"""``metaclaw start``: the proxy in the foreground."""

from __future__ import annotations

from typing import Any

import click

from metaclaw_core.errors import ConfigError
from metaclaw_core.settings import load_settings, nest


@click.command("start")
@click.option("--port", type=click.IntRange(1, 65535), help="Listen here; default: proxy.port, 30000.")
@click.option("--set", "sets", multiple=True, metavar="NAME=VALUE", help="A mitmproxy or metaclaw_* option, as for mitmdump.")
def command(port: int | None, sets: tuple[str, ...]) -> None:
    """Run the proxy on 127.0.0.1 until it is interrupted."""
    mitm: dict[str, Any] = {}
    for item in sets:
        name, separator, value = item.partition("=")
        if not separator:
            raise ConfigError(f"--set {item}: write NAME=VALUE.")
        mitm[name] = value
    settings = load_settings(*([nest(("proxy", "port"), port)] if port else []))
    from metaclaw_core.proxy.master import run

    run(settings, mitm)
