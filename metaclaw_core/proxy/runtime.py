"""What lives as long as the proxy process: spool, session state, open flows, counters.

Design: mitmproxy makes a new addon object each time the script is saved, but the package is not
imported again. So the state is kept here, in a table of this module, and handed from the old addon
to the new one: flows in the middle of an answer lose nothing, the skill index stays loaded, and a
configuration that is broken at that moment leaves the last good one in use. The last user closes it,
after a short grace on a reload and at once on shutdown.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

from mitmproxy import http

from metaclaw_core.agents.base import Identity
from metaclaw_core.model import Hints, Injection
from metaclaw_core.prefix import Likeness
from metaclaw_core.proxy.capture import principal_key
from metaclaw_core.proxy.credentials import CallerKeys
from metaclaw_core.proxy.route import Routed
from metaclaw_core.proxy.sessions import Sessions
from metaclaw_core.proxy.spool import Spool
from metaclaw_core.proxy.tee import Tee
from metaclaw_core.settings import Settings, private_dir
from metaclaw_core.skills.watch import IndexWatcher
from metaclaw_core.wire.base import Dialect, Route


@dataclass(slots=True)
class Flight:
    """One LLM request between its first hook and its record."""

    flow: http.HTTPFlow
    dialect: Dialect
    route: Route
    hints: Hints
    principal: str
    body: bytes | None = None  # the client's own body as it arrived (encoded as it was); None: not seen yet
    encoding: str = ""  # the body's content-encoding; a rewritten request loses it
    bypass: str | None = None  # the header `x-metaclaw`
    like: Likeness | None = None  # of the body to one before it
    tee: Tee | None = None
    injection: Injection | None = None
    identity: Identity | None = None
    session: str | None = None  # key of the session state
    routed: Routed | None = None  # rl mode: to the policy server; None: to its upstream


@dataclass(slots=True)
class Runtime:
    home: Path
    spool: Spool
    sessions: Sessions
    key: bytes
    watcher: IndexWatcher
    settings: Settings | None = None  # the last that were in use
    callers: CallerKeys = field(default_factory=CallerKeys)
    flights: dict[str, Flight] = field(default_factory=dict)
    counters: Counter[str] = field(default_factory=Counter)
    added: deque[float] = field(default_factory=lambda: deque(maxlen=1000))  # seconds we took for each of the last requests
    last_error: str | None = None  # of our own hooks; the log has more
    started_at: float = field(default_factory=time.time)
    refuse_until: float = 0.0  # monotonic; drained: a new request would be cut by the end that is coming
    bypass: bool = False  # every request passes unchanged, still recorded
    users: int = 0
    leaving: int = 0  # of them, those that are only waiting for a successor
    closed: bool = False

    def close(self) -> None:
        self.closed = True
        _RUNTIMES.pop(self.home, None)
        self.spool.close()


_RUNTIMES: dict[Path, Runtime] = {}


def current(home: Path) -> Runtime | None:
    """The runtime of `home` in this process, if there is one."""
    return _RUNTIMES.get(home)


def acquire(home: Path) -> Runtime:
    """The runtime of `home` in this process, made if there is none. Raises OSError if the folder can't be used."""
    runtime = _RUNTIMES.get(home)
    if runtime is None:
        # The default of 5 ms is how long a streamed event may wait for the spool's thread, and that thread for the
        # loop at each of its steps.
        sys.setswitchinterval(min(sys.getswitchinterval(), 0.001))
        gc.collect()
        gc.freeze()
        private_dir(home)
        spool_dir = private_dir(home / "spool")
        run_dir = private_dir(home / "run")
        key = principal_key(home)
        watcher = IndexWatcher(home / "skills.index")
        watcher.poll()  # some milliseconds, once: the first request must find the skills
        runtime = Runtime(
            home=home,
            spool=Spool(spool_dir / f"{os.getpid()}-{time.time_ns() // 1_000_000}.db", run_dir / "sessions.db"),
            sessions=Sessions.load(run_dir / "sessions.db"),
            key=key,
            watcher=watcher,
        )
        _RUNTIMES[home] = runtime
    runtime.users += 1
    return runtime


def release(runtime: Runtime) -> bool:
    """Give up one use; True if nobody uses it any more and it can be closed."""
    runtime.users -= 1
    return runtime.users <= runtime.leaving and not runtime.closed


async def release_later(runtime: Runtime, seconds: float = 2.0) -> None:
    """Give up one use once a successor had the time to take over."""
    runtime.leaving += 1
    await asyncio.sleep(seconds)
    runtime.leaving -= 1
    if release(runtime):
        runtime.close()
