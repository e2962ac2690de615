"""How much better a reply did than was to be expected.

Design: live traffic has one reply per prompt, so there is no group to compare with, and a batch of strangers is none:
`single` keeps an expected reward per (task cluster, agent) instead, a count of successes and failures that is shrunk
to the mean of all and forgets as the policy moves (SPO, arXiv 2509.13232). The advantage is the reward less the
expectation from *before* the batch, over a running standard deviation that is also from before it: two constants, so
no turn's advantage depends on its neighbours in the batch. `grpo` compares fresh siblings of one prompt with their
mean, without a division by their spread, which would make the clearest groups count least.

The state is immutable and goes to and from JSON; it is written with the step that used it.

Limits: a key that is new has the mean of all as its value. Rewards are 0 to 1; the expectation of a reward that is not
binary is right, the pace of its learning is that of a binary one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

K0 = 2.0  # rewards that the mean of all counts for in each key
CLIP = 3.0
_DRIFT_HALVES = 0.06  # mean |logprob difference| that halves what a key remembers, within the next two
_LEAST_KEPT, _MOST_KEPT = 0.875, 0.96
_KEPT_OF_ALL = 0.99  # of the mean of all, per reward: about the last hundred count
_SCALE_FROM = 64  # rewards until the running scale is used
_SCALE_BEFORE = 0.5  # the standard deviation of a coin, the largest there is
_SCALE_FLOOR = 0.1
_SIGNAL = 1e-3  # advantages that are all smaller teach nothing

type Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Counts:
    """Successes and failures that are remembered of one key."""

    alpha: float = 0.0
    beta: float = 0.0
    drift: float = 0.0  # the tracker's, when the key was last seen


@dataclass(frozen=True, slots=True)
class Tracker:
    """What is expected of each key. Immutable: `moved` and `seen` give a new one."""

    keys: Mapping[str, Counts] = field(default_factory=dict)
    all: Counts = Counts()
    drift: float = 0.0  # how far the policy has moved since the start: sum of mean |logprob differences|
    square: float = 0.0  # running mean of (reward - expected)²
    rewards: int = 0

    @property
    def mean(self) -> float:
        """The mean reward of all keys; .5 before there is any."""
        return (self.all.alpha + 1.0) / (self.all.alpha + self.all.beta + 2.0)

    @property
    def scale(self) -> float:
        """What an advantage is divided by."""
        return _SCALE_BEFORE if self.rewards < _SCALE_FROM else max(_SCALE_FLOOR, float(np.sqrt(self.square)))

    def value(self, key: str, k0: float = K0) -> float:
        """The reward to expect of `key`, 0 to 1."""
        counts = self.keys.get(key, Counts())
        return (k0 * self.mean + counts.alpha) / (k0 + counts.alpha + counts.beta)

    def moved(self, distance: float) -> Tracker:
        """After a step that changed logprobs by `distance` on average. Raises ValueError below 0."""
        if not distance >= 0:
            raise ValueError(f"a distance can't be {distance}")
        return replace(self, drift=self.drift + distance)

    def seen(self, key: str, reward: float, k0: float = K0) -> Tracker:
        """With one more reward. Raises ValueError outside 0 to 1."""
        if not 0 <= reward <= 1:
            raise ValueError(f"a reward is 0 to 1, not {reward}")
        before = self.keys.get(key, Counts(drift=self.drift))
        kept = float(np.clip(2.0 ** (-(self.drift - before.drift) / _DRIFT_HALVES), _LEAST_KEPT, _MOST_KEPT))
        number = self.rewards + 1
        error = (reward - self.value(key, k0)) ** 2
        return replace(
            self,
            keys={**self.keys, key: _with(before, reward, kept, self.drift)},
            all=_with(self.all, reward, _KEPT_OF_ALL, self.drift),
            square=self.square + (error - self.square) / min(number, _SCALE_FROM),
            rewards=number,
        )

    def to_json(self) -> dict[str, Any]:
        keys = {key: [c.alpha, c.beta, c.drift] for key, c in self.keys.items()}
        everything = [self.all.alpha, self.all.beta, self.all.drift]
        return {"keys": keys, "all": everything, "drift": self.drift, "square": self.square, "rewards": self.rewards}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(
            keys={key: Counts(*counts) for key, counts in value["keys"].items()},
            all=Counts(*value["all"]),
            drift=value["drift"],
            square=value["square"],
            rewards=value["rewards"],
        )


def key_of(cluster: str, agent: str) -> str:
    return f"{cluster}\n{agent}"


def single(
    tracker: Tracker, keys: Sequence[str], rewards: Sequence[float], *, k0: float = K0
) -> tuple[Float64 | None, Tracker]:
    """Advantages (B,) of the rewards (B,) of `keys`, clipped to ±3, and the tracker that has seen them.

    None in place of the advantages: the batch has no signal, all went as expected. Only turns that are trained on may
    be handed in. Raises ValueError for lengths that differ and rewards outside 0 to 1.
    """
    expected = np.array([tracker.value(key, k0) for key in keys])
    advantages = np.clip((np.asarray(rewards, dtype=np.float64) - expected) / tracker.scale, -CLIP, CLIP)
    after = tracker
    for key, reward in zip(keys, rewards, strict=True):
        after = after.seen(key, reward, k0)
    return (advantages if _has_signal(advantages) else None), after


def grpo(groups: Sequence[Sequence[float | None]]) -> list[list[float | None] | None]:
    """Rewards of siblings, centred on the mean of their group; None in a group: no score, left out of the mean.

    None in place of a group: it has no signal (fewer than two scores, or all the same).
    """
    return [_centred(group) for group in groups]


def _centred(group: Sequence[float | None]) -> list[float | None] | None:
    scores = [score for score in group if score is not None]
    if not scores:
        return None
    mean = sum(scores) / len(scores)
    if not _has_signal(np.array(scores) - mean):
        return None
    return [None if score is None else score - mean for score in group]


def _has_signal(advantages: Float64) -> bool:
    return bool((np.abs(advantages) >= _SIGNAL).any())


def _with(counts: Counts, reward: float, kept: float, drift: float) -> Counts:
    return Counts(kept * counts.alpha + reward, kept * counts.beta + 1.0 - reward, drift)
