"""Proxies as processes: start one in the background, find those that run, end one gently.

Design: a proxy is known by its control socket, not by a pid in a file: who answers on the socket is alive and ours, so
no signal ever goes to a stranger that got a dead proxy's pid. A start counts as done when the socket answers and
the port takes connections; until then every end of the new process is shown with what it wrote.

Limits: LLM requests that come between the end of the drain and the signal get a 503 that clients repeat; what is no
LLM request is cut by the signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaclaw_core.errors import ConfigError, MetaClawError
from metaclaw_core.proxy.control import RunningProxy, call, running_proxies
from metaclaw_core.proxy.startoptions import StartOptions, check_sets
from metaclaw_core.settings import private_dir

START_SECONDS = 40.0
END_SECONDS = 15.0
_LOG_LIMIT = 4 << 20


class StartError(MetaClawError):
    """The proxy did not come up; the message holds what it wrote."""


@dataclass(frozen=True, slots=True)
class Live:
    """A proxy that runs."""

    proxy: RunningProxy
    status: dict[str, Any] | None  # None: it takes connections on its socket and does not answer

    @property
    def pid(self) -> int:
        return self.proxy.pid

    @property
    def addresses(self) -> list[str]:
        return list(self.status["listen"]) if self.status else []

    @property
    def port(self) -> int | None:
        """Where it serves on 127.0.0.1."""
        for address in self.addresses:
            host, _, port = address.rpartition(":")
            if host in ("127.0.0.1", "0.0.0.0", "::", ""):  # noqa: S104 - what mitmdump may listen on
                return int(port)
        return None

    def __str__(self) -> str:
        where = f"on {', '.join(self.addresses)} " if self.addresses else ""
        return f"{where}(pid {self.pid})"


def live_proxies(home: Path) -> list[Live]:
    """The proxies of this home that really run."""
    return [found for proxy in running_proxies(home) if (found := _ask(proxy)) is not None]


def _ask(proxy: RunningProxy) -> Live | None:
    try:
        return Live(proxy, call(proxy, "status", timeout=3.0))
    except TimeoutError:
        return Live(proxy, None)  # somebody holds the socket: it hangs
    except (OSError, ValueError):
        return None  # nobody does: the pid is a stranger's by now


def start(home: Path, options: StartOptions, seconds: float = START_SECONDS) -> Live:
    """Start a proxy that outlives us and wait until it serves. Raises MetaClawError if it doesn't."""
    check_sets(options.sets)
    log = _open_log(home)
    try:
        begin = os.fstat(log).st_size
        process = subprocess.Popen(  # noqa: S603 - ourselves
            [sys.executable, "-P", "-m", "metaclaw_core.cli.main", "start", *options.arguments()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=_environment(home),
        )
    finally:
        os.close(log)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise StartError(f"The proxy did not start: {_said(home, begin)}")
            if (live := _serving(home, process.pid)) is not None:
                return live
            time.sleep(0.05)
        raise StartError(f"The proxy was not ready within {seconds:g} seconds and was ended. {_said(home, begin)}")
    except BaseException:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            if process.poll() is None:
                process.kill()
                process.wait()
        raise


def _serving(home: Path, pid: int) -> Live | None:
    proxy = next((p for p in running_proxies(home) if p.pid == pid), None)
    live = _ask(proxy) if proxy is not None else None
    if live is None or not live.addresses:
        return None
    for address in live.addresses:
        host, _, port = address.rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=1):
            return live
    return None


@dataclass(frozen=True, slots=True)
class Stopped:
    pid: int
    cut: int | None  # requests that were still open; None: it did not say
    killed: bool  # it did not end by itself


def stop(live: Live, grace: float) -> Stopped:
    """Wait up to `grace` seconds for open requests, then end the proxy. Raises MetaClawError if it can't be ended."""
    cut: int | None = None
    if live.status is not None:
        with contextlib.suppress(OSError, ValueError):
            cut = call(live.proxy, "drain", timeout=grace + 10.0, seconds=grace).get("open_requests")
    try:
        os.kill(live.pid, signal.SIGTERM)
        if _gone(live.pid, END_SECONDS):
            return Stopped(live.pid, cut, killed=False)
        os.kill(live.pid, signal.SIGKILL)
    except ProcessLookupError:
        return Stopped(live.pid, cut, killed=False)
    except PermissionError as e:
        raise MetaClawError(f"The proxy {live} belongs to another user: stop it as that user.") from e
    if not _gone(live.pid, 5.0):
        raise MetaClawError(f"The proxy {live} does not end, not even by SIGKILL; it hangs in the kernel.")
    return Stopped(live.pid, cut, killed=True)


def _gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # where it is a child of ours
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def log_file(home: Path) -> Path:
    return home / "logs" / "proxy.log"


def _open_log(home: Path) -> int:
    file = log_file(home)
    try:
        private_dir(home)
        private_dir(file.parent)
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_size > _LOG_LIMIT:
                file.replace(file.with_suffix(".log.1"))
        return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as e:
        raise ConfigError(f"{file} can't be written ({e.strerror}): make it yours, or name another folder with METACLAW_HOME.") from e


def _said(home: Path, begin: int) -> str:
    """What the proxy wrote since `begin`, its end if that is long."""
    with log_file(home).open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").strip().splitlines()
    if len(lines) == 1:
        return lines[0].removeprefix("metaclaw: ")
    return "\n".join(["it wrote", *(f"  {line}" for line in lines[-15:]), f"(in {log_file(home)})"]) if lines else "it wrote nothing."


def _environment(home: Path) -> dict[str, str]:
    environment = dict(os.environ)  # noqa: TID251 - for a child
    environment["METACLAW_HOME"] = str(home.absolute())
    # So that a checkout that is not installed works in the child too.
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    return environment
