"""From saved weights to weights that serve: the second half of a step, and what keeps versions alive between steps.

Design: `finish` takes a step up wherever the journal says it stands: publish, check, route, let the state before it go. Each part
is written down before the next begins, so it may be cut off anywhere and is carried on by the next run. `open` and `living` are
the only ways to a version's weights: what the server has lost is saved once more from the state, and where that is gone, too, the
error says what to do.

Limits: callers hold the lease of the job "train".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import select

from metaclaw_core.learn import journal
from metaclaw_core.learn.fastchecks import Bounds
from metaclaw_core.learn.guards import Guards
from metaclaw_core.learn.journal import StepState, Version
from metaclaw_core.learn.prices import Prices
from metaclaw_core.learn.publish import publish
from metaclaw_core.learn.trainer import ServerError, TrainingServer
from metaclaw_core.learn.trial import trial
from metaclaw_core.settings import Settings
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import steps

type At = Callable[[str], None]  # is told of each point between two effects


class Rounds:
    def __init__(
        self, store: Store, settings: Settings, home: Path, server: TrainingServer, prices: Prices, guards: Guards, bounds: Bounds, at: At
    ) -> None:
        self._store, self._settings, self._home, self._server, self._prices = store, settings, home, server, prices
        self._guards, self._bounds, self._at = guards, bounds, at
        self._kept: set[int] = set()  # versions whose state was told to stay, by this process

    @property
    def ttl(self) -> int:
        """Seconds that weights live from now on."""
        return max(3600, round(self._settings.rl.checkpoint_ttl_hours * 3600))

    async def finish(self, step: int, number: int) -> str | None:
        """From saved weights to a decision, from wherever it stands; why there is none yet, else None. Raises ServerError,
        StoreError."""
        version = journal.version(self._store, number)
        if version.base_model != self._settings.rl.model:
            journal.rejected(self._store, step, {}, f"rl.model is {self._settings.rl.model} now")
            return None
        if version.sampler_path is None:
            await self.open(version)
            ttl = self.ttl
            self._at("before publish")
            path = await self._server.save_weights(f"step-{step}", ttl)
            self._at("weights saved")
            journal.published(self._store, step, path, time.time() + ttl)
            self._at("published")
            version = journal.version(self._store, number)
        if (waits := self._guards.closed()) is not None:
            return waits
        version = await self.living(version)
        current = journal.in_force(self._store)
        stable = version if current is None else await self.living(journal.version(self._store, current.stable))
        self._at("before checks")
        checked = await trial(self._store, self._server, version, stable, self._bounds)
        self._at("checked")
        if checked.ok:
            journal.routed(self._store, step, checked.to_json(), f"step {step}")
        else:
            journal.rejected(self._store, step, checked.to_json(), checked.reason or "")
        self._at("decided")
        publish(self._store, self._settings, self._prices, self._home)
        self._at("route published")
        await self._let_go(step, number)
        self._at("done")
        return None

    async def open(self, version: Version) -> None:
        """Be at a version's state. Raises ServerError, "lost" where the server has it no more."""
        try:
            await self._server.open(version.state_path)
        except ServerError as e:
            if e.kind != "missing" or version.state_path is None:
                raise
            raise ServerError(
                "lost",
                f"The training server no longer has the weights of version {version.id} ({version.state_path}). Give it back its "
                "checkpoints, or go back to a version that it has: `metaclaw route rollback`, or rl.resume_from_ckpt.",
            ) from e

    async def begin_at(self, base: Version) -> None:
        """Be at the state that a step begins with; it stays until the step after it is done."""
        await self.open(base)
        if base.state_path is not None and base.id not in self._kept:
            await self._server.keep(base.state_path, None)
            self._kept.add(base.id)

    def stays(self, number: int) -> None:
        """The state of a version was saved without an end."""
        self._kept.add(number)

    async def living(self, version: Version) -> Version:
        """The version, its weights to sample from good for another while. Where the server lost them they are saved once more
        from its state. Raises ServerError, "lost" where that is gone, too."""
        if version.sampler_path is None:
            return version
        ttl, path = self.ttl, version.sampler_path
        try:
            await self._server.keep(path, ttl)
        except ServerError as e:
            if e.kind != "missing":
                raise
            await self.open(version)
            path = await self._server.save_weights(f"version-{version.id}", ttl)
        journal.expires(self._store, version.id, path, time.time() + ttl)
        return journal.version(self._store, version.id)

    async def stay(self) -> None:
        """What serves must not expire while nothing is trained."""
        current = journal.in_force(self._store)
        if current is None:
            return
        soon = time.time() + self.ttl / 2
        for number in sorted({current.working, current.stable}):
            version = journal.version(self._store, number)
            if version.expires_at is not None and version.expires_at < soon:
                await self.living(version)

    async def _let_go(self, step: int, number: int) -> None:
        """A state that training has left behind ends by itself, but every `rl.checkpoint_every`-th."""
        rl, current = self._settings.rl, journal.in_force(self._store)
        with self._store.reading() as db:
            row = db.execute(select(steps.c.base_version, steps.c.state).where(steps.c.id == step)).one()
        left = journal.version(self._store, number if row.state == StepState.REJECTED else row.base_version)
        serves = current is not None and left.id in (current.working, current.stable)
        if left.state_path is None or serves or (step - 1) % rl.checkpoint_every == 0:
            return
        self._kept.discard(left.id)
        try:
            await self._server.keep(left.state_path, self.ttl)
        except ServerError as e:
            if e.kind != "missing":  # then it is gone already
                raise
