"""Steps through the real SDK on the real engine: what moves in the weights, in the store, in the route."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from policy_help import RunningEngine
from sqlalchemy import select
from training_help import answers, put, server, settings, trainer

from metaclaw_core.learn import journal
from metaclaw_core.routes import read_route
from metaclaw_core.store.db import open_store
from metaclaw_core.store.tables import step_turns, steps, turns

pytestmark = [pytest.mark.local, pytest.mark.slow]
PROMPT = (10, 11, 12, 13)


@pytest.fixture
def store(tmp_path: Path):
    with open_store(tmp_path / "store.db") as opened:
        yield opened


async def test_a_step_makes_good_answers_likelier_and_serves_the_new_weights(engine: RunningEngine, store, tmp_path: Path):
    rl = settings(engine)
    where = server(rl)
    train = trainer(store, rl, tmp_path, server=where)
    await train.begin()
    assert read_route(tmp_path).working == 1
    await answers(store, where, None, 4, lambda tokens: float(tokens[0] % 2))
    put(store, 100, PROMPT, (50, 51), (-5.0, -5.0), klass="C", klass_reason="top_p")
    with store.reading() as db:
        rewards = {row.flow_id: row.reward for row in db.execute(select(turns.c.flow_id, turns.c.reward).where(turns.c.flow_id != "f100"))}
    if len(set(rewards.values())) == 1:
        pytest.skip("four draws with one reward: nothing to learn")
    report = await train.run_once()
    assert (report.made, report.version, report.skipped) == (True, 2, 1), report
    route = read_route(tmp_path)
    assert (route.working, route.stable) == (2, 1)
    with store.reading() as db:
        states = dict(tuple(row) for row in db.execute(select(turns.c.flow_id, turns.c.state)))
        reasons = dict(tuple(row) for row in db.execute(select(turns.c.flow_id, turns.c.reason)))
        step = db.execute(select(steps)).one()
        told = db.execute(select(step_turns).order_by(step_turns.c.turn)).all()
    assert states == {"f0": "trained", "f1": "trained", "f2": "trained", "f3": "trained", "f100": "skipped"}
    assert reasons["f100"] == "training: not class A"
    assert (step.state, step.version, step.metrics["turns"]) == ("routed", 2, 4)
    assert abs(step.metrics["ratio_mean"] - 1) < 1e-4  # sampled from the very weights
    assert abs(step.metrics["kl"]) < 1e-4
    assert all(np.sign(row.advantage) == (1 if row.reward else -1) for row in told)
    version = journal.version(store, 2)
    # The step went where the advantages point.
    with store.reading() as db:
        kept = db.execute(select(turns.c.reward, turns.c.flow_id).where(turns.c.state == "trained").order_by(turns.c.id)).all()
    moved = []
    from metaclaw_core.store.samplefile import unpack_ids
    from metaclaw_core.store.tables import samples

    for row in kept:
        with store.reading() as db:
            tokens = unpack_ids(db.scalar(select(samples.c.tokens).where(samples.c.flow_id == row.flow_id))).tolist()
        before = (await where.logprobs(None, [*PROMPT, *tokens], len(tokens))).sum()
        after = (await where.logprobs(version.sampler_path, [*PROMPT, *tokens], len(tokens))).sum()
        moved.append((row.reward, float(after - before)))
    good, bad = [m for r, m in moved if r], [m for r, m in moved if not r]
    assert np.mean(good) > np.mean(bad)
    await train.aclose()
