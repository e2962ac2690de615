"""The policy server's inner life: the connection to the sampler, the route it follows, its sign of life.

Design: three small loops. One keeps the connection: it loads the tokenizer, samples one token from the base model and
only then calls the server ready; after a failure it says in one sentence what is wrong, and tries again with a growing
pause. While nothing is asked it looks every `CHECK_SECONDS` whether the sampler still answers, at no cost. One follows
``route.json``. One writes the heartbeat. Rendering and parsing (the tokenizer) run in one thread of their own, in the
order they come in, for a tokenizer must not be used by two threads at once and the event loop must not wait for it.

Limits: without a route file version 1 is served, the base model. A route for another base model is not served: the
settings say which model this process has.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from metaclaw_core.errors import ConfigError, MetaClawError
from metaclaw_core.policy.asked import Defaults, load_defaults
from metaclaw_core.policy.memory import Memory
from metaclaw_core.policy.render import Renderer, RenderError
from metaclaw_core.policy.sampler import Sampler, SamplerError
from metaclaw_core.policy.tokens import decode
from metaclaw_core.routes import BEAT_SECONDS, ROUTE_FILE, Heartbeat, Route, Served, read_route, write_heartbeat
from metaclaw_core.settings import Settings
from metaclaw_core.store.samplefile import FILE

logger = logging.getLogger("metaclaw.policy")

ROUTE_SECONDS = 0.25
CHECK_SECONDS = 10.0
PRUNE_SECONDS = 3600.0
_LOOKS = 5  # for new versions, between two signs of life
_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
_LOADING = "The policy server is connecting to the sampler and loading the tokenizer."


class Policy:
    """Made per process. `run` until it is cancelled; everything else may be used meanwhile."""

    def __init__(self, settings: Settings, home: Path, port: int, sampler: Sampler | None = None) -> None:
        """`sampler`: None: as the settings say. Raises ConfigError or StoreError."""
        if not settings.rl.model:
            raise ConfigError("rl.model is not set: name the model that is to be trained, as the sampler calls it.")
        self.settings = settings
        self.home = home
        self.port = port
        rl = settings.rl
        self.sampler = sampler or Sampler(rl.model, base_url=rl.tinker_base_url or None, api_key=rl.tinker_api_key or None)
        self.memory = Memory(home / "run" / FILE, settings.store.url or home / "store.db")
        self.renderer: Renderer | None = None  # None: not loaded yet
        self.defaults = Defaults()
        self.max_context: int | None = None
        self.problem: str | None = _LOADING  # None: it can sample
        self.route = self._first_route()
        self._tokenizer: Any = None
        self._route_problem: str | None = None
        self._answered_at = 0.0
        self._failed = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "metaclaw-tokenizer")

    def _first_route(self) -> Route:
        return Route(0, self.settings.rl.model, 1, 1, (Served(1, None),))

    async def tokenizing[T](self, work: Callable[..., T], *args: Any) -> T:
        """`work` in the tokenizer's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    def decoded(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included. In the tokenizer's thread only."""
        return decode(self._tokenizer, ids)

    @property
    def unready(self) -> str | None:
        """Why it can't answer now, as a sentence; None: it can."""
        return self.problem or self._route_problem

    def succeeded(self) -> None:
        self._answered_at = time.monotonic()

    def failed(self, error: SamplerError) -> None:
        """A request could not be answered: nobody is sent here until a probe has succeeded."""
        if error.kind == "version" or self.problem is not None:
            return
        logger.warning("Sampling failed: %s", error)
        self.problem = str(error)
        self._failed.set()

    async def run(self) -> None:
        self._follow(first=True)
        self.sampler.serve(self._paths())
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._stay_connected())
                group.create_task(self._follow_route())
                group.create_task(self._beat())
        finally:
            self._thread.shutdown(wait=False)
            await self.sampler.close()
            await self.memory.close()

    # --- the connection -----------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        tries, connected = 0, False
        while True:
            if self.problem is None:
                connected = await self._is_well()
                continue
            try:
                if not connected:
                    await self._open()
                    connected = True
                await self._probe()
            except (SamplerError, RenderError) as e:
                connected = connected and e.kind == "timeout"
                if str(e) != self.problem:
                    logger.warning("The sampler can't be used: %s", e)
                self.problem = str(e)
                await asyncio.sleep(_PAUSES[min(tries, len(_PAUSES) - 1)])
                tries += 1
                continue
            tries = 0
            self._failed.clear()
            self.succeeded()
            self.problem = None
            logger.info("%s can be sampled from.", self.sampler.base_model)

    async def _is_well(self) -> bool:
        """Wait for a failure, or find one out. False: the connection should be made anew."""
        try:
            await asyncio.wait_for(self._failed.wait(), CHECK_SECONDS)
        except TimeoutError:
            self.sampler.serve(self._paths())  # a version that could not be loaded may be there now
            if time.monotonic() - self._answered_at > CHECK_SECONDS:
                try:
                    await self.sampler.check()
                except SamplerError as e:
                    self.failed(e)
        return True

    async def _open(self) -> None:
        model = await self.sampler.open()
        if self.renderer is None:
            self._tokenizer = model.tokenizer
            reasoning = self.settings.policy.reasoning
            self.renderer = await self.tokenizing(lambda: Renderer(model.tokenizer, reasoning=reasoning))
            if self.renderer.problem is not None:
                logger.warning("%s", self.renderer.problem)
            self.defaults = await asyncio.to_thread(load_defaults, str(model.tokenizer.name_or_path))
        limits = [limit for limit in (model.max_context, self.settings.max_context_tokens) if limit is not None]
        self.max_context = min(limits, default=None)

    async def _probe(self) -> None:
        """One token of the base model."""
        ids = await self.tokenizing(lambda: self._tokenizer.encode("Hello", add_special_tokens=False))
        limit = self.settings.policy.first_segment_timeout
        try:
            await asyncio.wait_for(self.sampler.probe(ids), limit)
        except TimeoutError:
            raise SamplerError("timeout", f"The sampler gave no token in {limit:g} s.") from None

    # --- the route ----------------------------------------------------------------------------

    def _paths(self) -> dict[int, str | None]:
        return {} if self._route_problem else {served.version: served.sampler_path for served in self.route.served}

    async def _follow_route(self) -> None:
        while True:
            await asyncio.sleep(ROUTE_SECONDS)
            if self._follow():
                self.sampler.serve(self._paths())

    def _follow(self, *, first: bool = False) -> bool:
        """Read the file if it has changed; whether it has. A stat and, rarely, a read of some hundred bytes."""
        try:
            stamp: tuple[int, int] | None = (stat := (self.home / "run" / ROUTE_FILE).stat()).st_mtime_ns, stat.st_ino
        except OSError:
            stamp = None
        if not first and stamp == self._stamp:
            return False
        self._stamp: tuple[int, int] | None = stamp
        route = read_route(self.home) if stamp is not None else self._first_route()
        if route is None:
            logger.warning("%s can't be read as a route; the one before stays in force.", ROUTE_FILE)
            return False
        self.route = route
        ours = self.sampler.base_model
        other = route.base_model != ours
        self._route_problem = f"The route is for {route.base_model}, but rl.model is {ours}." if other else None
        return True

    # --- sign of life -------------------------------------------------------------------------

    async def _beat(self) -> None:
        pruned = 0.0
        while True:
            beat = Heartbeat(
                time.time(), os.getpid(), self.port, self.sampler.base_model, self.unready is None, self.unready,
                self.sampler.versions, self.max_context,
            )  # fmt: skip
            try:
                await asyncio.to_thread(write_heartbeat, self.home, beat)
                prune = time.monotonic() - pruned > PRUNE_SECONDS
                pruned = time.monotonic() if prune else pruned
                await self.memory.look_after(time.time(), prune=prune)
            except (OSError, MetaClawError) as e:
                logger.warning("The heartbeat can't be written: %s", e)  # then nobody is sent here, which is right
            await self._next_beat(beat.versions)

    async def _next_beat(self, said: tuple[int, ...]) -> None:
        """Wait, but not once other versions can be sampled from than was said: no human turn should miss new weights."""
        for _ in range(_LOOKS):
            await asyncio.sleep(BEAT_SECONDS / _LOOKS)
            if self.sampler.versions != said:
                return
