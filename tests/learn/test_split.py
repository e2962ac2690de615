"""The split between the evolver and training leaves training an unbiased share of the traffic.

Planted: the evolver writes a skill of a task when a session of its own failed at it, and whoever has the task later succeeds far
more often, so what the evolver saw, how old a session is, how long it is and how it ended all hang together. Batches are made as the
trainer makes them. What is compared: the success rate of all that was trained on, and of all query traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pytest
from rl_tools import sample

from metaclaw_core.learn.batch import Sample, lags_of, select, why_left_out
from metaclaw_core.learn.evolve import is_support

SHARE, TASKS, SESSIONS, BATCH = 0.25, 40, 3_000, 32
KNOWN, UNKNOWN = 0.9, 0.4  # chances of success, with a skill of the task and without


@dataclass(frozen=True)
class Session:
    id: str
    skilled: bool
    rewards: tuple[float, ...]  # of its turns


def traffic(seed: int, takes: Callable[[str, float], bool]) -> list[Session]:
    """Sessions in the order of their start; `takes` says of a session's id and last reward whether the evolver reads it."""
    rng = np.random.default_rng(seed)
    known: set[int] = set()
    found = []
    for n in range(SESSIONS):
        task = int(rng.integers(TASKS * (n + 1) // SESSIONS + 1))  # new kinds of tasks come up all the time
        chance = KNOWN if task in known else UNKNOWN
        rewards = [float(rng.random() < chance)]
        while rewards[-1] == 0.0 and len(rewards) < 6:  # people ask again until it works: failure makes sessions long
            rewards.append(float(rng.random() < chance))
        session = Session(f"{rng.integers(2**63):x}", task in known, tuple(rewards))
        if takes(session.id, session.rewards[0]) and session.rewards[0] == 0.0:
            known.add(task)
        found.append(session)
    return found


def by_hash(session_id: str, reward: float) -> bool:
    return is_support(session_id, SHARE)


def samples_of(sessions: Iterable[Session]) -> list[Sample]:
    made: list[Sample] = []
    for session in sessions:
        for reward in session.rewards:
            made.append(sample(len(made) + 1, session=session.id, split_by=session.id, reward=reward, agent=str(session.skilled)))
    return made


def trained(samples: Iterable[Sample]) -> list[Sample]:
    """What the trainer takes as the traffic comes in: a step is made as soon as there is a batch, and the next answers are of its weights."""
    parents: dict[int, int | None] = {1: None}
    pool: list[Sample] = []
    taken: list[Sample] = []
    for _, turns in groupby(samples, key=lambda s: s.session):
        present = max(parents)
        pool += [sample(s.turn, session=s.session, split_by=s.split_by, reward=s.reward, agent=s.agent, version=present) for s in turns]
        lags = lags_of(parents, present)
        good = [s for s in pool if why_left_out(s, lags, max_staleness=2, support_share=SHARE) is None]
        batch = select(good, batch_size=BATCH, min_sessions=4)
        if batch is not None:
            gone = {s.turn for s in batch}
            taken += batch
            pool = [s for s in good if s.turn not in gone]
            parents[present + 1] = present
    return taken


def rate(samples: Iterable[Sample]) -> float:
    return float(np.mean([s.reward for s in samples]))


def apart(a: float, b: float, n: int) -> float:
    """How many standard errors of a share of `n` lie between two rates."""
    return abs(a - b) / float(np.sqrt(b * (1 - b) / n))


@pytest.mark.parametrize("seed", range(5))
def test_the_success_rate_of_what_is_trained_on_is_that_of_the_query_traffic(seed: int):
    all_ = traffic(seed, by_hash)
    query = samples_of(session for session in all_ if not is_support(session.id, SHARE))
    batch = trained(samples_of(all_))
    # The correlation is there: with a skill far more succeed, and skills come from what the evolver saw.
    skilled = [s for s in query if s.agent == "True"]
    assert rate(skilled) > rate(s for s in query if s.agent == "False") + 0.3
    assert 0.1 < len(skilled) / len(query) < 0.9
    assert not any(is_support(s.split_by, SHARE) for s in batch)
    assert len(batch) > 0.98 * len(query)  # nothing is starved
    assert apart(rate(batch), rate(query), len(batch)) < 1
    # Nor do skills decide who is trained on, nor the hash who succeeds.
    assert apart(np.mean([s.agent == "True" for s in batch]), len(skilled) / len(query), len(batch)) < 1
    firsts = {support: [s.rewards[0] for s in all_ if is_support(s.id, SHARE) is support] for support in (True, False)}
    assert apart(float(np.mean(firsts[True])), float(np.mean(firsts[False])), len(firsts[True])) < 3


@pytest.mark.parametrize("seed", range(5))
def test_a_split_by_outcome_or_by_the_newest_skill_would_show(seed: int):
    """The two other ways to split, which the design does without, fail the same comparison: five standard errors and more apart, not one."""
    by_outcome = traffic(seed, lambda _, reward: reward == 0.0)
    everything = samples_of(by_outcome)
    succeeded = samples_of(session for session in by_outcome if session.rewards[0] == 1.0)
    assert apart(rate(succeeded), rate(everything), len(succeeded)) > 5
    all_ = traffic(seed, by_hash)
    query = [session for session in all_ if not is_support(session.id, SHARE)]
    newest = samples_of(session for session in query if session.skilled)
    assert apart(rate(newest), rate(samples_of(query)), len(newest)) > 5
