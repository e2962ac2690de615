"""``metaclaw start``: mitmproxy with our addon, in this process.

Design: mitmdump's master with options set for one purpose: it listens on loopback only, decrypts LLM
hosts only (``proxy.intercept``), keeps its CA in our own 0700 folder, and stores no flows. Everything
else is mitmproxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from pathlib import Path
from typing import Any

import click
from mitmproxy import exceptions, options
from mitmproxy.tools.dump import DumpMaster

from metaclaw_core.errors import ConfigError, MetaClawError
from metaclaw_core.proxy import hosts
from metaclaw_core.proxy.addon import addons_for_script
from metaclaw_core.settings import Settings, home, private_dir


def run(settings: Settings, mitm_options: dict[str, Any]) -> None:
    """Serve until SIGINT or SIGTERM. Raises ConfigError where the port is taken or an option is refused."""
    asyncio.run(_serve(settings, mitm_options))


async def _serve(settings: Settings, mitm_options: dict[str, Any]) -> None:
    port = settings.proxy.port
    _check_free(port)
    names = {*hosts.PROVIDERS, *hosts.configured_hosts(settings, hosts.agent_config_files(Path.home()))}
    ours: dict[str, Any] = {
        "listen_host": "127.0.0.1",
        "listen_port": port,
        "confdir": str(private_dir(home() / "mitmproxy")),
        "connection_strategy": "lazy",
        "allow_hosts": hosts.allow_hosts(names) if settings.proxy.intercept == "llm" else [],
    }
    master = DumpMaster(options.Options(), with_termlog=True, with_dumper=False)
    try:
        master.addons.add(*addons_for_script())
        master.options.update(**ours)
        for name, value in mitm_options.items():
            try:
                master.options.set(f"{name}={value}")
            except exceptions.OptionsError as e:
                raise ConfigError(f"--set {name}={value}: {e}") from e
    except exceptions.OptionsError as e:
        raise MetaClawError(str(e).removeprefix("metaclaw: ")) from e
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows
            loop.add_signal_handler(number, master.shutdown)
    logging.getLogger("mitmproxy.proxy.server").setLevel(logging.WARNING)
    ca = home() / "mitmproxy" / "mitmproxy-ca-cert.pem"
    click.echo(
        f"metaclaw listens on 127.0.0.1:{port} (mode {settings.mode}). Point your agent at it:\n"
        f"  export HTTPS_PROXY=http://127.0.0.1:{port} HTTP_PROXY=http://127.0.0.1:{port} NODE_EXTRA_CA_CERTS={ca}"
    )
    await master.run()


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as e:
            raise ConfigError(
                f"127.0.0.1:{port} can't be listened on ({e.strerror}): is metaclaw running already? "
                "Another port: metaclaw start --port N, or proxy.port in the configuration."
            ) from e
