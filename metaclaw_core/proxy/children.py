"""Child processes of the proxy: the worker, in rl mode the policy server. Kept alive, never in the way.

Design: a child is ``python -m MODULE``; what it must know and may not find on disk comes as JSON lines
on its stdin, and it ends when stdin closes, so no orphan survives a killed proxy. A child that ends is
started again after a pause that doubles up to a minute and shrinks back once it has lived a while. The
proxy works without any of them.

Limits: needs a Python executable; from a mitmproxy that was packed into one file there is none, and
`metaclaw worker` must be run by hand (said once).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FIRST_PAUSE = 0.5
MAX_PAUSE = 60.0
SETTLED_SECONDS = 60.0


class Child:
    """`run` keeps one process alive until `stop`."""

    def __init__(
        self,
        module: str,
        home: Path,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        greeting: Callable[[], Iterable[Mapping[str, Any]]] = tuple,
    ) -> None:
        """`environment`: variables on top of the proxy's own. `greeting`: what each new process is sent first."""
        self.name = module.rpartition(".")[2]
        self.restarts = 0
        self.last_exit: int | None = None
        # -P: the folder the proxy was started in, perhaps an agent's workspace, must not be imported from.
        self._command = [sys.executable, "-P", "-m", module, *arguments]
        self._home = home
        self._environment = dict(environment or {})
        self._greeting = greeting
        self._renewing = False
        self._process: Process | None = None
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.returncode is None else None

    def status(self) -> dict[str, Any]:
        return {"name": self.name, "pid": self.pid, "restarts": self.restarts, "last_exit": self.last_exit}

    def start(self) -> None:
        if getattr(sys, "frozen", False):
            logger.warning("metaclaw: this mitmproxy is a single file without Python: run `metaclaw worker` by hand.")
            return
        self._task = asyncio.ensure_future(self._run())

    def stop(self) -> None:
        """Close the child's stdin; it ends by itself. Returns at once."""
        self._stopping = True
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        if self._task is not None and self._process is None:
            self._task.cancel()

    def kill(self) -> None:
        """End a child that hangs; it is started again."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def send(self, message: Mapping[str, Any]) -> bool:
        """One JSON line on the child's stdin; False: there is no child now (the next one is greeted). Never logged."""
        pipe = self._process.stdin if self.pid is not None and self._process is not None else None
        if pipe is None or pipe.is_closing():
            return False
        pipe.write(json.dumps(dict(message)).encode() + b"\n")
        return True

    def renew(self, environment: Mapping[str, str]) -> None:
        """Let the child end and start again at once, with these variables."""
        self._environment = dict(environment)
        if self.pid is not None and self._process is not None and self._process.stdin is not None:
            self._renewing = True
            self._process.stdin.close()

    async def _run(self) -> None:
        pause = FIRST_PAUSE
        while not self._stopping:
            began = time.monotonic()
            try:
                self.last_exit = await self._once()
            except OSError as e:
                logger.warning("metaclaw: the %s can't be started: %s. Traffic goes on.", self.name, e)
            if self._stopping:
                return
            if self._renewing:
                self._renewing = False
                continue
            if time.monotonic() - began > SETTLED_SECONDS:
                pause = FIRST_PAUSE
            if self.restarts == 0:
                logger.warning(
                    "metaclaw: the %s ended (status %s); starting it again, see %s.", self.name, self.last_exit, self._log
                )
            self.restarts += 1
            await asyncio.sleep(pause)
            pause = min(pause * 2, MAX_PAUSE)

    async def _once(self) -> int:
        self._log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            if self._log.stat().st_size > 4 << 20:
                self._log.replace(self._log.with_suffix(".log.1"))
        descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=PIPE,
                stdout=DEVNULL,
                stderr=descriptor,
                env=child_environment(self._home) | self._environment,
                start_new_session=True,  # Ctrl-C in the terminal is the proxy's; the child ends by its stdin
            )
        finally:
            os.close(descriptor)
        for message in self._greeting():
            self.send(message)
        if self._stopping and self._process.stdin is not None:  # stopped while it was being started
            self._process.stdin.close()
        return await self._process.wait()

    @property
    def _log(self) -> Path:
        return self._home / "logs" / f"{self.name}.log"


def child_environment(home: Path) -> dict[str, str]:
    """Ours without the proxy variables: a child's own calls must not come back through us."""
    environment = {k: v for k, v in os.environ.items() if k.lower() not in _PROXY_VARIABLES}  # noqa: TID251
    package_root = str(Path(__file__).resolve().parents[2])
    environment["METACLAW_HOME"] = str(home)
    # So that a checkout that is not installed works in the child too.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, environment.get("PYTHONPATH")]))
    return environment


_PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
