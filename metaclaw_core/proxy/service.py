"""What runs beside the hooks of a live proxy: skill index watch, worker child, control socket.

Design: started in `running` as a task and stopped synchronously in `done`, so that a reload of the
script and a shutdown take the same way. Nothing here is needed for traffic to flow: each part that
fails says so once and is left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mitmproxy import ctx

from metaclaw_core import __version__
from metaclaw_core.errors import MetaClawError
from metaclaw_core.proxy.children import Child
from metaclaw_core.proxy.control import ControlServer
from metaclaw_core.proxy.runtime import Runtime
from metaclaw_core.skills.index import Index
from metaclaw_core.skills.watch import IndexWatcher

if TYPE_CHECKING:
    from metaclaw_core.proxy.addon import MetaClaw

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0


class Service:
    def __init__(self, runtime: Runtime, addon: MetaClaw, *, worker: bool) -> None:
        self._runtime = runtime
        self._addon = addon
        self._watcher = IndexWatcher(runtime.home / "skills.index")
        self._children = [Child("metaclaw_core.worker", runtime.home, "--follow-stdin")] if worker else []
        self._control: ControlServer | None = None
        self._poll: asyncio.Task[None] | None = None

    @property
    def index(self) -> Index | None:
        return self._watcher.current

    async def start(self) -> None:
        await asyncio.to_thread(self._watcher.poll)
        self._poll = asyncio.ensure_future(self._watch())
        for child in self._children:
            child.start()
        handlers = {
            "status": self._status,
            "bypass": self._bypass,
            "flush": self.flush,
            "drain": self._drain,
            "reload": self._reload,
        }
        try:
            self._control = ControlServer(self._runtime.home, handlers)
            await self._control.start()
        except OSError as e:
            logger.warning("metaclaw: no control socket (%s): `metaclaw status` and `bypass` don't reach this proxy.", e)

    def stop(self) -> None:
        if self._poll is not None:
            self._poll.cancel()
        for child in self._children:
            child.stop()
        if self._control is not None:
            self._control.close()

    async def _watch(self) -> None:
        complained: str | None = None
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await asyncio.to_thread(self._watcher.poll)
            problem = self._watcher.problem
            if problem and problem != complained:
                logger.warning("metaclaw: %s. The last good index stays in use.", problem)
            complained = problem

    # --- what can be asked of a running proxy ---------------------------------------------------

    def status(self) -> dict[str, Any]:
        runtime, index = self._runtime, self._watcher.current
        return {
            "version": __version__,
            "pid": os.getpid(),
            "listen": [f"{host}:{port}" for host, port, *_ in _addresses()],
            "mode": self._addon.settings.mode if self._addon.settings else None,
            "uptime_s": round(time.time() - runtime.started_at, 1),
            "bypass": runtime.bypass,
            "sessions": len(runtime.sessions),
            "sessions_active_10min": runtime.sessions.active(600),
            "open_requests": len(runtime.flights),
            "spool": {
                "queued": runtime.spool.queued,
                "written": runtime.spool.written,
                "dropped": runtime.spool.dropped,
                "last_error": runtime.spool.last_error,
            },
            "skills": {"count": len(index), "generation": index.generation} if index is not None else None,
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

    async def _drain(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Wait until no LLM request is open, at most `seconds` (60), then flush."""
        deadline = time.monotonic() + float(message.get("seconds", 60))
        while self._runtime.flights and time.monotonic() < deadline:  # noqa: ASYNC110 - flows end in many places
            await asyncio.sleep(0.05)
        return {"open_requests": len(self._runtime.flights), **await self.flush(message)}

    async def _reload(self, message: Mapping[str, Any]) -> dict[str, Any]:
        from mitmproxy.exceptions import OptionsError

        try:
            self.reload_now()
        except (OptionsError, MetaClawError) as e:
            return {"error": str(e)}
        return {"reloaded": True}


def _addresses() -> list[tuple[Any, ...]]:
    with contextlib.suppress(AttributeError):
        return list(ctx.master.addons.get("proxyserver").listen_addrs())
    return []
