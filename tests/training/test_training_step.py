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
from metaclaw_core.store.samplefile import unpack_ids
from metaclaw_core.store.tables import samples, step_turns, steps, turns

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
    given = iter([1.0, 0.0, 1.0, 0.0])
    await answers(store, where, None, 4, lambda _: next(given))
    put(store, 100, PROMPT, (50, 51), (-5.0, -5.0), klass="C", klass_reason="top_p")
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
    for row in kept:
        with store.reading() as db:
            tokens = unpack_ids(db.scalar(select(samples.c.tokens).where(samples.c.flow_id == row.flow_id))).tolist()
        before = (await where.logprobs(None, [*PROMPT, *tokens], len(tokens))).sum()
        after = (await where.logprobs(version.sampler_path, [*PROMPT, *tokens], len(tokens))).sum()
        moved.append((row.reward, float(after - before)))
    good, bad = [m for r, m in moved if r], [m for r, m in moved if not r]
    assert np.mean(good) > np.mean(bad)
    await train.aclose()


async def test_on_policy_cispo_and_ppo_make_the_same_step_as_importance_sampling(engine: RunningEngine, lab, lanes):
    """Where the answers are of the very weights every ratio is 1, nothing is clipped, and the three gradients are one."""
    from metaclaw_core.engine.protocol import parse_training, training_data

    where, moved, configs = server(settings(engine)), {}, {}
    for loss in ("importance_sampling", "cispo", "ppo"):
        with lanes.lane() as proxy:
            one = lab(proxy=proxy, loss=loss)
            report = await one.trainer.run_once()
            assert (report.made, report.waits, one.trained()) == (True, None, [1, 2, 3, 4])
            calls = [parse_training(call.body) for call in proxy.asked if call.path == "forward_backward"]
            assert [call.loss_fn for call in calls] == ["cross_entropy", loss]
            _, _, configs[loss] = training_data(calls[1], 259)
            version = journal.version(one.store, 2)
            with one.store.reading() as db:
                rows = db.execute(select(turns.c.reward, samples.c.tokens).join(samples, samples.c.flow_id == turns.c.flow_id).order_by(turns.c.id)).all()
                metrics = db.scalar(select(steps.c.metrics))
            assert (metrics["loss"], metrics["tokens"], metrics["clipped"]) == (loss, 16, 0.0)
            change = []
            for row in rows:
                ids = [*PROMPT, *unpack_ids(row.tokens).tolist()]
                change.append((await where.logprobs(version.sampler_path, ids, 4)) - (await where.logprobs(None, ids, 4)))
            good, bad = (np.mean([c.sum() for c, row in zip(change, rows, strict=True) if row.reward == r]) for r in (1.0, 0.0))
            assert good > bad + 0.01
            moved[loss] = np.concatenate(change)
            await one.trainer.aclose()
    assert configs == {
        "importance_sampling": {},
        "cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 2.0},
        "ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    }
    for loss in ("cispo", "ppo"):
        assert np.abs(moved[loss] - moved["importance_sampling"]).max() < 1e-4
    assert np.abs(moved["ppo"]).max() > 1e-2
    await where.aclose()
