"""A store with answers that the engine's model really gave, each with a reward by rule."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from policy_help import RunningEngine
from sqlalchemy import insert, select

from metaclaw_core.learn.prices import Prices
from metaclaw_core.learn.trainer import TrainingServer
from metaclaw_core.learn.training import Trainer
from metaclaw_core.settings import Settings
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.samplefile import pack_ids, pack_logprobs
from metaclaw_core.store.tables import samples, sessions, turns

TURN = {
    "principal": "p", "kind": "main", "dialect": "openai_chat", "scheme": "http", "host": "h", "port": 80, "path": "/",
    "redacted": False, "retry": False, "attempts": 0, "live": True, "state": "scored", "agent": "openclaw",
}  # fmt: skip
SAMPLE = {
    "base_model": "m", "tokenizer": "t", "klass": "A", "sampling": {"temperature": 1.0}, "reused": 0, "segments": 1,
    "stop_reason": "stop", "malformed": False, "redacted": False,
}  # fmt: skip


def settings(engine: RunningEngine, **rl: Any) -> Settings:
    values = {"model": engine.model, "tinker_base_url": engine.url, "tinker_api_key": engine.key, "support_share": 0.0, "lora_rank": 4}
    values |= {"batch_size": 4, "min_sessions": 2, "warmup_turns": 0, "learning_rate": 1e-2}
    return Settings.model_validate({"mode": "rl", "rl": values | rl})


def server(settings: Settings, timeout_s: float = 60.0) -> TrainingServer:
    rl = settings.rl
    return TrainingServer(
        rl.model, base_url=rl.tinker_base_url, api_key=rl.tinker_api_key, lora_rank=rl.lora_rank, timeout_s=timeout_s
    )


def trainer(store: Store, settings: Settings, home: Path, **more: Any) -> Trainer:
    return Trainer(store, settings, home, more.pop("server", None) or server(settings), Prices(), **more)


def put(store: Store, n: int, prompt: Sequence[int], tokens: Sequence[int], logprobs: Sequence[float], **fields: Any) -> int:
    """One scored answer; `fields` of turns, samples and sessions."""
    session = fields.pop("session", f"s{n}")
    now = time.time()
    own = {name: fields.pop(name) for name in list(fields) if name in samples.c and name not in ("version", "redacted")}
    version = fields.pop("version", 1)
    with store.transaction() as db:
        if db.scalar(select(sessions.c.id).where(sessions.c.id == session)) is None:
            row = {"id": session, "principal": "p", "session_id": session, "generated": False, "agent": "openclaw", "first_at": now, "last_at": now}
            db.execute(insert(sessions).values(row))
        row = TURN | {"flow_id": f"f{n}", "content_key": f"k{n}", "session": session, "version": version, "started_at": float(n), "reward": 1.0}
        turn = int(db.execute(insert(turns).values(row | fields).returning(turns.c.id)).scalar_one())
        packed = {"prompt_ids": pack_ids(prompt), "tokens": pack_ids(tokens), "logprobs": pack_logprobs(logprobs)}
        sizes = {"prompt_length": len(prompt), "length": len(tokens)}
        db.execute(insert(samples).values(SAMPLE | packed | sizes | {"flow_id": f"f{n}", "created_at": float(n), "version": version} | own))
    return turn


async def answers(
    store: Store,
    where: TrainingServer,
    path: str | None,
    count: int,
    reward: Callable[[Sequence[int]], float | None],
    *,
    first: int = 0,
    version: int = 1,
    prompt: Sequence[int] = (10, 11, 12, 13),
    max_tokens: int = 4,
    sessions: int = 4,
    **fields: Any,
) -> list[float | None]:
    """`count` replies of the weights at `path`, put into the store; their rewards."""
    replies = await where.sample(path, prompt, n=count, max_tokens=max_tokens, stop_ids=())
    rewards = []
    for n, reply in enumerate(replies, first):
        rewards.append(reward(reply.tokens))
        values = {"reward": rewards[-1], "session": f"s{n % sessions}", "version": version, "base_model": where.base_model}
        put(store, n, prompt, reply.tokens, reply.logprobs.tolist(), **(values | fields))
    return rewards
