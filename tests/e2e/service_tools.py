"""What a service manager does with a unit of ours, where there is none: as far as the unit asks for it.

Read are ExecStart=, Environment=, Restart=, RestartSec= and TimeoutStopSec= of [Service], quoted and with `%%` and `$$` as
systemd has them. `Restart=always` brings the process back whatever ended it, RestartSec later; KillMode=mixed is SIGTERM to
the process, then SIGKILL to all that is left of its group. What the unit does not ask for is not done.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self


class Supervisor:
    """``with Supervisor(unit, log, {"HOME": …}) as service: … service.pid``. `pid` is None between an end and the next start."""

    def __init__(self, unit: str, log: Path, environment: Mapping[str, str]) -> None:
        """`environment`: what the user's manager gives every service."""
        settings: dict[str, list[str]] = {}
        section = ""
        for line in unit.splitlines():
            if line.startswith("["):
                section = line
            elif section == "[Service]" and "=" in line and not line.startswith("#"):
                key, _, value = line.partition("=")
                settings.setdefault(key, []).append(value)
        (command,) = settings["ExecStart"]
        self._command = [word.replace("$$", "$").replace("%%", "%") for word in shlex.split(command)]
        words = [word.replace("%%", "%") for line in settings.get("Environment", ()) for word in shlex.split(line)]
        self._environment = dict(environment) | dict(word.split("=", 1) for word in words)
        self._restart = settings.get("Restart", ["no"])[-1]
        self._restart_s = float(settings.get("RestartSec", ["0.1"])[-1])
        self._stop_s = float(settings.get("TimeoutStopSec", ["90"])[-1])
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.starts = 0

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        deadline = time.monotonic() + self._stop_s
        if (pid := self.pid) is not None:
            os.kill(pid, signal.SIGTERM)
            while self.pid is not None and time.monotonic() < deadline:
                time.sleep(0.02)
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stopping.is_set():
            with self._log.open("ab") as out:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self._environment, cwd="/", start_new_session=True
                )
            self.starts += 1
            status = self._process.wait()
            if not (self._restart == "always" or (self._restart == "on-failure" and status != 0)):
                return
            self._stopping.wait(self._restart_s)
