"""10,000 turns of mixed classes: what the engine's HTTP endpoint receives is traced back to the turn it is of.

Every prompt holds its turn's number, so that a datum says by itself whose it is. Turns of class B and C have ids, logprobs and a
score like all others: nothing but their class keeps them out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from between_help import Lane
from guard_help import BOUNDS, asking
from policy_help import RunningEngine
from sqlalchemy import func, insert, select
from training_help import SAMPLE, TURN, settings

from metaclaw_core.learn.evolve import is_support
from metaclaw_core.learn.losses import Limits
from metaclaw_core.learn.prices import Prices
from metaclaw_core.learn.training import Trainer
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.samplefile import pack_ids, pack_logprobs
from metaclaw_core.store.tables import samples, sessions, turns

pytestmark = [pytest.mark.local, pytest.mark.slow]
TURNS, SESSIONS, BATCH = 10_000, 400, 256
CLASSES = "BACCBCABCC"  # of ten turns in a row: 2 of class A, 3 of B, 5 of C
LIMITS = Limits(kl=1e9, least_ratio=0.0, most_ratio=1e9, least_ess=0.0, most_vetoed=1.0)  # the logprobs are made up


def klass(number: int) -> str:
    return CLASSES[number % 10]


def session(number: int) -> str:
    return f"s{number // 10 % SESSIONS}"


def prompt(number: int) -> list[int]:
    """It says whose it is: each digit is a token of its own, from 20 on."""
    return [5, *(20 + int(digit) for digit in f"{number:05}"), 6]


def whose(tokens: np.ndarray) -> int:
    assert (tokens[0], tokens[6]) == (5, 6)
    return int("".join(str(token - 20) for token in tokens[1:6]))


def answer(number: int) -> list[int]:
    return [40 + number % 7, 60 + number % 11, 2]


@pytest.fixture
def store(engine: RunningEngine, tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "store.db") as opened:
        own = {"principal": "p", "generated": False, "agent": "openclaw", "first_at": 0.0, "last_at": 0.0}
        logprobs = pack_logprobs([-5.5] * 3)  # an even chance of the tiny model's 259 tokens
        with opened.transaction() as db:
            db.execute(insert(sessions), [own | {"id": f"s{n}", "session_id": f"client-{n}"} for n in range(SESSIONS)])
            db.execute(insert(turns), [
                TURN | {"flow_id": f"f{n}", "content_key": f"k{n}", "session": session(n), "version": 1, "started_at": float(n), "reward": float(n // 10 % 2)}
                for n in range(TURNS)
            ])  # fmt: skip
            db.execute(insert(samples), [
                SAMPLE | {"flow_id": f"f{n}", "created_at": float(n), "version": 1, "klass": klass(n), "base_model": engine.model,
                          "klass_reason": None if klass(n) == "A" else "top_p", "prompt_ids": pack_ids(prompt(n)),
                          "tokens": pack_ids(answer(n)), "logprobs": logprobs, "prompt_length": 7, "length": 3}
                for n in range(TURNS)
            ])  # fmt: skip
        yield opened


async def test_of_10_000_turns_of_mixed_classes_not_one_of_class_b_or_c_is_in_any_call(engine: RunningEngine, store: Store, proxy: Lane, tmp_path: Path):
    from metaclaw_core.engine.protocol import parse_training, training_data

    rl = settings(engine, tinker_base_url=proxy.url, batch_size=BATCH, min_sessions=4, support_share=0.25, max_staleness=100, learning_rate=1e-4)
    trainer = Trainer(store, rl, tmp_path, asking(engine, proxy, 60), Prices(), bounds=BOUNDS, limits=LIMITS, retry_s=0)
    made = 0
    while (report := await trainer.run_once()).made or report.skipped:
        assert report.problems == ()
        made += report.made
    await trainer.aclose()

    query = {n for n in range(TURNS) if klass(n) == "A" and not is_support(f"client-{n // 10 % SESSIONS}", 0.25)}
    assert made == len(query) // BATCH == 5
    sent: Counter[str] = Counter()
    for call in proxy.asked:
        if "forward_backward" in call.path:
            request = parse_training(call.body)
            for datum in training_data(request, 259)[0]:
                number = whose(datum.tokens)
                assert klass(number) == "A", f"turn {number} of class {klass(number)} was sent"
                assert number in query
                assert [*datum.tokens, datum.targets[-1]] == prompt(number) + answer(number)
                sent[request.loss_fn] += 1
        elif call.path == "asample":  # the new weights' trial: logged prompts, and replies to them
            number = whose(np.array(json.loads(call.body)["prompt"]["chunks"][0]["tokens"]))
            assert klass(number) == "A", f"turn {number} of class {klass(number)} was asked again"
            sent["asample"] += 1
    trial = sent.pop("asample")
    assert sent == {"cross_entropy": 5 * BATCH, "importance_sampling": 5 * BATCH}
    assert trial >= 5 * 16  # eight prompts for each of two versions
    with store.reading() as db:
        ends = {tuple(row)[:2]: row.n for row in db.execute(select(turns.c.state, turns.c.reason, func.count().label("n")).group_by(turns.c.state, turns.c.reason))}
    assert ends == {
        ("trained", None): 5 * BATCH,
        ("scored", None): len(query) - 5 * BATCH,
        ("skipped", "training: not class A"): 8_000,
        ("skipped", "training: support session"): 2_000 - len(query),
    }
