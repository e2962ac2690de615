"""What runs beside the hooks of a live proxy: skill index watch, worker, control socket; in rl mode policy server and route.

Design: started in `running` as a task and stopped synchronously in `done`, so that a reload of the
script and a shutdown take the same way. It may be stopped before it has quite started, and then starts
nothing more. Nothing here is needed for traffic to flow: each part that fails says so once and is left
out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mitmproxy import ctx

from metaclaw_core import __version__
from metaclaw_core.errors import MetaClawError
from metaclaw_core.proxy.children import Child
from metaclaw_core.proxy.control import ControlServer
from metaclaw_core.proxy.options import prepare_routing
from metaclaw_core.proxy.route import POLL_SECONDS as ROUTE_SECONDS
from metaclaw_core.proxy.route import Router, RouteWatcher, base_route
from metaclaw_core.proxy.runtime import Runtime
from metaclaw_core.routes import Route
from metaclaw_core.settings import skills_settings
from metaclaw_core.skills.index import Index
from metaclaw_core.skills.library import open_library
from metaclaw_core.skills.patch import MOST, patched

if TYPE_CHECKING:
    from metaclaw_core.proxy.addon import MetaClaw

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
_REFUSE_SECONDS = 20.0  # then nobody has ended us, and traffic goes on
_SILENT_SECONDS = 15.0  # a policy server that beat twice a second and is silent for so long hangs, and its requests with it


class Service:
    def __init__(
        self, runtime: Runtime, addon: MetaClaw, *, worker: bool, policy: str | None, environment: Mapping[str, str]
    ) -> None:
        """`policy`: the module that answers in rl mode; None: none does. `environment`: for the children, on top of the
        proxy's own."""
        self.router: Router | None = None  # None: not rl mode, or no policy server
        self._policy_module = policy
        self._environment = environment
        self._policy: Child | None = None
        self._route_poll: asyncio.Task[None] | None = None
        self._runtime = runtime
        self._addon = addon
        self._watcher = runtime.watcher
        self._children = (
            [
                Child(
                    "metaclaw_core.worker",
                    runtime.home,
                    "--follow-stdin",
                    environment=environment,
                    greeting=runtime.callers.lines,
                )
            ]
            if worker
            else []
        )
        self._stopped = False
        self._first = Index()
        self._control: ControlServer | None = None
        self._poll: asyncio.Task[None] | None = None

    @property
    def index(self) -> Index | None:
        """None as long as there is none: a session then keeps the block it has."""
        index = self._watcher.current if self._watcher.current.generation else self._first
        return index if index.generation else None

    def prepare(self) -> None:
        """Have an index before the first request. Where the worker has not built one yet, it is put together here
        without scikit-learn: a few tens of milliseconds, once in the life of a home."""
        self._watcher.poll()
        if self._watcher.current.generation or self._addon.settings is None:
            return
        skills = open_library(skills_settings(self._addon.settings)).skills()
        self._first = patched(Index(), skills[:MOST]) or self._first  # of a larger library the worker's index has the rest

    async def start(self) -> None:
        self._poll = asyncio.ensure_future(self._watch())
        for child in self._children:
            child.start()
        self._follow_mode()
        handlers = {
            "status": self._status,
            "bypass": self._bypass,
            "flush": self.flush,
            "forget": self._forget,
            "drain": self._drain,
            "reload": self._reload,
        }
        try:
            control = ControlServer(self._runtime.home, handlers)
            await control.start()
            self._control = control
            if self._stopped:
                control.close()
        except OSError as e:
            logger.warning("metaclaw: no control socket (%s): `metaclaw status` and `bypass` don't reach this proxy.", e)

    def renew_children(self, environment: Mapping[str, str]) -> None:
        """The settings have changed: the children must read them again."""
        self._environment = environment
        for child in self._children:
            child.renew(environment)
        self._follow_mode()

    def _follow_mode(self) -> None:
        """Have a policy server in rl mode, and none else."""
        if self._stopped:
            return
        settings = self._addon.settings
        wanted = settings is not None and settings.mode == "rl" and self._policy_module is not None
        if settings is not None and wanted and not settings.rl.model:
            logger.warning("metaclaw: mode rl, but rl.model is not set: name the model to be trained. Requests go to their own LLM.")
            wanted = False
        if wanted and self._policy is None and self._policy_module is not None:
            prepare_routing(ctx.options)
            token = secrets.token_urlsafe(32)
            self._policy = Child(
                self._policy_module,
                self._runtime.home,
                "--follow-stdin",
                environment=self._environment,
                greeting=lambda: [{"token": token}],
            )
            self._children.append(self._policy)
            self.router = Router(RouteWatcher(self._runtime.home, self._policy_pid, self._base_route), token)
            self._policy.start()
            self._route_poll = asyncio.ensure_future(self._watch_route(self.router.watcher))
        elif not wanted and self._policy is not None:
            self._policy.stop()
            self._children.remove(self._policy)
            self._policy = self.router = None
            if self._route_poll is not None:
                self._route_poll.cancel()

    def _policy_pid(self) -> int | None:
        return self._policy.pid if self._policy is not None else None

    def _base_route(self) -> Route | None:
        return base_route(self._addon.settings.rl) if self._addon.settings else None

    def tell_worker(self, message: Mapping[str, Any]) -> None:
        for child in self._children:
            if child.name == "worker":
                child.send(message)

    def stop(self) -> None:
        self._stopped = True
        for task in (self._poll, self._route_poll):
            if task is not None:
                task.cancel()
        for child in self._children:
            child.stop()
        if self._control is not None:
            self._control.close()

    async def _watch(self) -> None:
        complained: str | None = None
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await asyncio.to_thread(self._watcher.poll)
                problem = self._watcher.problem
            except Exception as e:  # noqa: BLE001 - the boundary: the next file must still be looked at
                problem = f"{self._runtime.home / 'skills.index'} could not be taken over ({e!r})"
            if problem and problem != complained:
                logger.warning("metaclaw: %s. The last good index stays in use.", problem)
            complained = problem

    async def _watch_route(self, watcher: RouteWatcher) -> None:
        failed = False
        while True:
            await asyncio.sleep(ROUTE_SECONDS)
            try:
                await asyncio.to_thread(watcher.poll)
                if watcher.silent_seconds > _SILENT_SECONDS and self._policy is not None:
                    logger.warning("metaclaw: the policy server hangs; ending it, so that what waits for it goes to its own LLM.")
                    self._policy.kill()
            except Exception:  # the boundary: a heartbeat that is not read grows stale, which is safe
                if not failed:
                    logger.warning("metaclaw: route or heartbeat can't be read", exc_info=True)
                failed = True

    # --- what can be asked of a running proxy ---------------------------------------------------

    def status(self) -> dict[str, Any]:
        runtime, index = self._runtime, self.index
        return {
            "version": __version__,
            "pid": os.getpid(),
            "listen": [f"{host}:{port}" for host, port, *_ in _addresses()],
            "ca": str(Path(ctx.options.confdir).expanduser() / "mitmproxy-ca-cert.pem"),
            "mode": self._addon.settings.mode if self._addon.settings else None,
            "uptime_s": round(time.time() - runtime.started_at, 1),
            "bypass": runtime.bypass,
            "sessions": len(runtime.sessions),
            "sessions_active_10min": runtime.sessions.active(600),
            "open_requests": len(runtime.flights),
            "added_ms": _quantiles(runtime.added),
            "last_error": runtime.last_error,
            "spool": {
                "queued": runtime.spool.queued,
                "written": runtime.spool.written,
                "dropped": runtime.spool.dropped,
                "last_error": runtime.spool.last_error,
            },
            "skills": {"count": len(index), "generation": self._watcher.current.generation or None} if index is not None else None,
            "skills_problem": self._watcher.problem,
            "retrieval_note": self._addon.retrieval_note,
            "route": self.router.status() if self.router is not None else None,
            "children": [child.status() for child in self._children],
            "counters": dict(sorted(runtime.counters.items())),
        }

    def set_bypass(self, value: str) -> bool:
        """Raises ValueError unless `value` is on or off."""
        if value not in ("on", "off"):
            raise ValueError("bypass takes on or off")
        self._runtime.bypass = value == "on"
        logger.info("metaclaw: bypass %s", value)
        return self._runtime.bypass

    def reload_now(self) -> None:
        self._addon.reload_settings()
        self._watcher.poll()

    async def _status(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return self.status()

    async def _bypass(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return {"bypass": self.set_bypass(str(message.get("value")))}

    async def flush(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return {"flushed": await asyncio.to_thread(self._runtime.spool.flush, 5.0)}

    async def _forget(self, message: Mapping[str, Any]) -> dict[str, Any]:
        self._addon.forget()
        return {"forgotten": True}

    async def _drain(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Wait until no LLM request is open, at most `seconds` (60), then flush. Until then new ones are served; after
        it they get a 503 that clients repeat, since whoever drains ends this process next."""
        deadline = time.monotonic() + float(message.get("seconds", 60))
        while self._runtime.flights and time.monotonic() < deadline:  # noqa: ASYNC110 - flows end in many places
            await asyncio.sleep(0.05)
        self._runtime.refuse_until = time.monotonic() + _REFUSE_SECONDS
        return {"open_requests": len(self._runtime.flights), **await self.flush(message)}

    async def _reload(self, message: Mapping[str, Any]) -> dict[str, Any]:
        from mitmproxy.exceptions import OptionsError

        try:
            self.reload_now()
        except (OptionsError, MetaClawError) as e:
            return {"error": str(e)}
        return {"reloaded": True}


def _quantiles(seconds: Collection[float]) -> dict[str, float] | None:
    """Median and 95th percentile in milliseconds; None: nothing was measured."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    return {name: round(ordered[int(share * (len(ordered) - 1))] * 1000, 2) for name, share in (("p50", 0.5), ("p95", 0.95))}


def _addresses() -> list[tuple[Any, ...]]:
    with contextlib.suppress(AttributeError):
        return list(ctx.master.addons.get("proxyserver").listen_addrs())
    return []
