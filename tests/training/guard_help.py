"""A store with answers for one step, and a trainer whose SDK asks the engine through a lane of `between_help`."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from between_help import Lane
from policy_help import RunningEngine
from sqlalchemy import insert, select, update
from training_help import TURN, put, server, settings

from metaclaw_core.learn.fastchecks import Bounds
from metaclaw_core.learn.losses import Limits
from metaclaw_core.learn.prices import Prices
from metaclaw_core.learn.trainer import TrainingServer
from metaclaw_core.learn.training import Trainer
from metaclaw_core.settings import Settings
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import step_turns, steps, turns, versions

PROMPT = (10, 11, 12, 13)
BOUNDS, LIMITS = Bounds(empty=1, malformed=1, length=1e9, kl=1e9), Limits(kl=1e9)  # chance must not decide here
SECONDS = 4.0  # that a call may take


@dataclass
class Lab:
    store: Store
    home: Path
    settings: Settings
    trainer: Trainer
    hooks: dict[str, Callable[[], Any]]  # what is to happen at a point of the step, once

    def states(self) -> set[str]:
        with self.store.reading() as db:
            return set(db.scalars(select(turns.c.state).where(turns.c.reward.is_not(None))))

    def steps(self) -> list[str]:
        with self.store.reading() as db:
            return list(db.scalars(select(steps.c.state).order_by(steps.c.id)))

    def trained(self) -> list[int]:
        """The turns of all steps that serve, as often as they were trained on."""
        with self.store.reading() as db:
            query = select(step_turns.c.turn).join(steps).where(steps.c.state == "routed", step_turns.c.reason.is_(None))
            return sorted(db.scalars(query))

    def request(self, minutes_ago: float) -> None:
        """The user's newest request was so long ago: there is one only."""
        at = time.time() - 60 * minutes_ago
        row = TURN | {"flow_id": "the user's", "content_key": "the user's", "state": "captured", "started_at": at}
        with self.store.transaction() as db:
            if db.execute(update(turns).where(turns.c.flow_id == "the user's").values(started_at=at)).rowcount == 0:
                db.execute(insert(turns).values(row))

    def soon(self) -> None:
        """All weights expire in a minute."""
        with self.store.transaction() as db:
            db.execute(update(versions).where(versions.c.expires_at.is_not(None)).values(expires_at=time.time() + 60))


def asking(engine: RunningEngine, proxy: Lane, seconds: float = SECONDS) -> TrainingServer:
    return TrainingServer(engine.model, base_url=proxy.url, api_key=engine.key, lora_rank=4, timeout_s=seconds)


def begin(engine: RunningEngine, home: Path) -> None:
    """Four answers of the base model, of four tokens each, for the store of `home`."""

    async def fill() -> None:
        where = server(settings(engine))
        drawn = await where.sample(None, PROMPT, n=16, max_tokens=4, stop_ids=())
        await where.aclose()
        with open_store(home / "store.db") as store:
            for n, reply in enumerate([one for one in drawn if len(one.tokens) == 4][:4]):
                put(store, n, PROMPT, reply.tokens, reply.logprobs.tolist(), session=f"s{n % 2}", reward=float(n % 2), base_model=engine.model)

    asyncio.run(fill())


@contextmanager
def labs(engine: RunningEngine, lane: Lane, begun: Path, folder: Path) -> Iterator[Callable[..., Lab]]:
    """Makes as many as are asked for, each with its own copy of the store in `begun`."""
    opened: list[Store] = []

    def make(*, proxy: Lane = lane, url: str | None = None, prices: Prices | None = None, retry_s: float = 0.0, **rl: Any) -> Lab:
        home = Path(shutil.copytree(begun, folder / f"lab-{len(opened)}"))
        store = open_store(home / "store.db")
        opened.append(store)
        asked = settings(engine, tinker_base_url=proxy.url if url is None else url, **rl)
        hooks: dict[str, Callable[[], Any]] = {}

        def at(name: str) -> None:
            if (hook := hooks.pop(name, None)) is not None:
                hook()

        bounds: dict[str, Any] = {"bounds": BOUNDS, "limits": LIMITS}
        trainer = Trainer(store, asked, home, asking(engine, proxy), prices or Prices(), at=at, retry_s=retry_s, **bounds)
        return Lab(store, home, asked, trainer, hooks)

    yield make
    for store in opened:
        store.close()
