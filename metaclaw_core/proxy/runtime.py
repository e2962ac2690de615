"""What lives as long as the proxy process: spool, session state, open flows, counters.

Design: mitmproxy makes a new addon object each time the script is saved, but the package is not
imported again. So the state is kept here, in a table of this module, and handed from the old addon
to the new one: flows in the middle of an answer lose nothing. The last user closes it, after a short
grace on a reload and at once on shutdown.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from metaclaw_core.agents.base import Identity
from metaclaw_core.model import Hints, Injection
from metaclaw_core.proxy.capture import principal_key
from metaclaw_core.proxy.sessions import Sessions
from metaclaw_core.proxy.spool import Spool
from metaclaw_core.proxy.tee import Tee
from metaclaw_core.settings import private_dir
from metaclaw_core.wire.base import Dialect, Route


@dataclass(slots=True)
class Flight:
    """One LLM request between its first hook and its record."""

    dialect: Dialect
    route: Route
    hints: Hints
    principal: str
    body: bytes | None = None  # the client's own body as it arrived (encoded as it was); None: not seen yet
    tee: Tee | None = None
    injection: Injection | None = None
    identity: Identity | None = None
    session: str | None = None  # key of the session state


@dataclass(slots=True)
class Runtime:
    home: Path
    spool: Spool
    sessions: Sessions
    key: bytes
    flights: dict[str, Flight] = field(default_factory=dict)
    counters: Counter[str] = field(default_factory=Counter)
    started_at: float = field(default_factory=time.time)
    bypass: bool = False  # every request passes unchanged, still recorded
    users: int = 0

    def close(self) -> None:
        self.spool.close()
        _RUNTIMES.pop(self.home, None)


_RUNTIMES: dict[Path, Runtime] = {}


def acquire(home: Path) -> Runtime:
    """The runtime of `home` in this process, made if there is none. Raises OSError if the folder can't be made."""
    runtime = _RUNTIMES.get(home)
    if runtime is None:
        private_dir(home)
        spool_dir = private_dir(home / "spool")
        run_dir = private_dir(home / "run")
        spool = Spool(spool_dir / f"{os.getpid()}-{time.time_ns() // 1_000_000}.db", run_dir / "sessions.db")
        runtime = Runtime(home=home, spool=spool, sessions=Sessions.load(run_dir / "sessions.db"), key=principal_key(home))
        _RUNTIMES[home] = runtime
    runtime.users += 1
    return runtime


def release(runtime: Runtime) -> bool:
    """Give up one use; True if nobody uses it any more and it can be closed."""
    runtime.users -= 1
    return runtime.users <= 0


async def release_later(runtime: Runtime, seconds: float = 2.0) -> None:
    """Give up one use once a successor had the time to take over."""
    await asyncio.sleep(seconds)
    if release(runtime):
        runtime.close()
