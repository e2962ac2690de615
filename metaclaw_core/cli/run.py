"""``metaclaw run -- COMMAND``: a child that uses the proxy and trusts its CA; nothing else on the machine changes.

Design: the child's environment is made by `agentenv`. Where no proxy runs, one is started for the command and ends
with it. The child keeps our terminal and process group, so Ctrl-C and Ctrl-Z reach it from the terminal itself; a
signal that is sent to us alone is passed on. Our exit status is the child's, 128 + n where a signal ended it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from metaclaw_core.cli.agentenv import AgentEnv, agent_env, current_environment
from metaclaw_core.settings import home, load_settings

if TYPE_CHECKING:
    from metaclaw_core.proxy.detach import Live

_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
_GRACE = 10.0


@click.command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND…")
def command(words: tuple[str, ...]) -> None:
    """Run COMMAND with the proxy and its CA in its environment, and end as it ends.

    Starts a proxy for the time of the command if none runs. Changes no file of yours.
    """
    if shutil.which(words[0]) is None:  # before a proxy is started for nothing
        exists = Path(words[0]).exists()
        click.echo(f"metaclaw: {words[0]} {'is not executable' if exists else 'is no command that can be found'}.", err=True)
        sys.exit(126 if exists else 127)

    with proxy_for_a_command() as environment:
        status = _child(words, environment)
    sys.exit(status)


@contextmanager
def proxy_for_a_command() -> Iterator[AgentEnv]:
    """What a command needs to use the proxy that runs, or one that is started now and ends with the block."""
    from metaclaw_core.cli.stop import end
    from metaclaw_core.proxy import detach

    live = next((found for found in detach.live_proxies(home()) if found.port), None)
    started = live is None
    if live is None:
        live = _start()
    try:
        environment = _environment(live)
        for note in environment.notes:
            click.echo(f"metaclaw: {note}", err=True)
        yield environment
    finally:
        if started:
            end(live, _GRACE, quiet=True)


def _start() -> Live:
    from metaclaw_core.proxy import detach
    from metaclaw_core.proxy.startoptions import StartOptions

    wanted = load_settings().proxy.port
    live = detach.start(home(), StartOptions(port=_free_port(wanted)))
    click.echo(f"metaclaw: no proxy was running; this command gets one of its own {live}. `metaclaw start -d` keeps one.", err=True)
    return live


def _free_port(wanted: int) -> int:
    """`wanted`, or another where that is taken: the child is told, nobody else has to know."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(live: Live) -> AgentEnv:
    from metaclaw_core.proxy.ca import CERTIFICATE, confdir

    ca = Path(live.status["ca"]) if live.status and live.status.get("ca") else confdir() / CERTIFICATE
    return agent_env(current_environment(), load_settings(), home(), live.port or 0, ca)


def _child(words: tuple[str, ...], environment: AgentEnv) -> int:
    early: list[int] = []  # signals that came before there was a child
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        if number in _FROM_TERMINAL and _in_foreground():
            return  # the terminal has sent it to the child as well
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)  # does nothing where the child has ended

    for known in _FORWARDED:
        signal.signal(known, forward)
    try:
        process = subprocess.Popen(words, env=environment.over(current_environment()))  # noqa: S603 - what the user typed
    except OSError as e:
        click.echo(f"metaclaw: {words[0]} can't be run: {e.strerror}.", err=True)
        return 126
    for number in early:
        process.send_signal(number)
    code = process.wait()
    return code if code >= 0 else 128 - code


def _in_foreground() -> bool:
    """Whether Ctrl-C of the terminal reaches our process group."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False
