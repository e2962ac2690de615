"""Whether new weights (or skills) are better, worse, or not yet known: tests that may be looked at after every session.

Design: testing by betting. Money is put against a hypothesis, fairly if it is true; a fortune of 1/α then comes with
probability α at most, however often one looks (Ville). The stakes are a mixture over small and large effects, so none
has to be guessed. Scores are bounded, 0 to 1; nothing else is assumed of them, not even that the new weights stay the
same, so all versions since the last stable one are one line with one test.

`paired` bets on differences of the same task. Live sessions have no pairs: `unpaired` bets, for every mean m that the
stable weights might have, that it is not theirs and that the others are not beyond it, and takes the least favourable
m. That is valid for any sizes of the two groups, hence also for a control share of a tenth. But a tenth of 30 sessions
shows nothing: harm is therefore looked for against the stable weights' scores of before the line as well. Those hold
only while the tasks stay as they were; where the control sessions contradict them they are not used, and a part of α is
kept for the comparison with the control sessions alone. Promotion never uses them.

Weights that spoil after a hundred good sessions must not have to work off that credit: harm is tested from the start of
every version on, with weights 1/(j(j+1)) that sum to one. What a promotion may err, α, is spent over the candidates
since the last one in the same way.

Limits: sessions are taken to be independent. A rollback errs in at most α of all lines, each anew. The smallest drop
that is named is what would show half of the time, if all scores were 0 or 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

ALPHA = 0.05
_DRIFTED_SHARE = 0.2  # of α, for harm seen against the control sessions alone
_LATEST = 20  # sessions of the line that must not be worse than the control when it is promoted
_PAIRED_STAKES = np.linspace(0.1, 0.8, 8)
_STAKES = np.array([0.07, 0.15, 0.35, 0.7])  # of what may be lost at most
_SHARES = np.array([0.15, 0.2, 0.3, 0.35])  # of the fortune, for each stake
_KEPT = 0.1  # of the fortune that is not put on the reference
_MEANS = np.linspace(0.0, 1.0, 101)
_EDGE = 0.02  # a mean closer to 0 or 1 than this allows no larger stakes than it does

type Float64 = NDArray[np.float64]
type Verdict = Literal["promote", "rollback", "undecided"]


# --- e-values, as natural logarithms: evidence against a hypothesis, log(1/α) is enough at level α ----------------------


def paired(differences: ArrayLike) -> Float64:
    """(n,): against "the differences, -1 to 1, have no mean above 0", after each of them in their order.

    The largest so far may be compared with log(1/α) at any time; only the last may be added to other evidence.
    Raises ValueError outside -1 to 1.
    """
    d = np.asarray(differences, dtype=np.float64)
    if not (np.abs(d) <= 1).all():
        raise ValueError("a difference of two scores is -1 to 1")
    fortunes = np.cumsum(np.log1p(_PAIRED_STAKES * d[:, None]), axis=0)
    return _mixed(fortunes, np.full(_PAIRED_STAKES.size, 1 / _PAIRED_STAKES.size))


def unpaired(reference: ArrayLike, others: ArrayLike, *, better: bool) -> float:
    """Against "the others are no better (else: no worse) than the reference on average", scores 0 to 1 in any order.

    Raises ValueError outside 0 to 1.
    """
    a, b = _scores(reference), _scores(others)
    if a.size == 0 or b.size == 0:
        return 0.0
    return float(unpaired_counts(*_counted(a), *_counted(b), better=better))


def unpaired_counts(
    reference: Float64, reference_counts: Float64, others: Float64, others_counts: Float64, *, better: bool
) -> Float64:
    """`unpaired` for values (k,) and how often each was seen (..., k), many cases at once: (...)."""
    if better:  # the mirror image: what is no better is, turned round, no worse
        reference, others = 1.0 - reference, 1.0 - others
    against_mean = np.logaddexp(np.log1p(-_KEPT) + _wealth(reference, reference_counts, up=True), np.log(_KEPT))
    against_others = _wealth(others, others_counts, up=False)
    least: Float64 = (against_mean + against_others).min(axis=-1)
    return least


def _wealth(values: Float64, counts: Float64, *, up: bool) -> Float64:
    """(..., M): log of the fortune from bets that the mean is above (else below) each of _MEANS."""
    mean = _MEANS[:, None, None]
    room = np.maximum(mean if up else 1.0 - mean, _EDGE)  # how far a value can lie on the losing side
    gain = (values - mean) if up else (mean - values)  # (M, 1, k)
    logs = np.log1p(_STAKES[:, None] / room * gain)  # (M, S, k)
    return _mixed(np.tensordot(counts, logs, axes=([-1], [-1])), _SHARES)


def _mixed(logs: Float64, shares: Float64) -> Float64:
    """Log of the fortune over all stakes, the last axis."""
    top = logs.max(axis=-1)
    total: Float64 = top + np.log(np.exp(logs - top[..., None]) @ shares)
    return total


# --- a line of weights --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """What was seen since the working weights left the stable ones; a session or a replayed task counts once.

    Raises ValueError for scores outside their range.
    """

    candidate: int  # 1: the first since the last promotion
    history: tuple[float, ...] = ()  # the stable weights' last scores before the line began
    control: tuple[float, ...] = ()  # theirs since
    working: tuple[tuple[int, tuple[float, ...]], ...] = ()  # (version, its scores), in order of versions
    replay: tuple[float, ...] = ()  # differences of replayed tasks, working less stable

    def __post_init__(self) -> None:
        for scores in (self.history, self.control, *(s for _, s in self.working)):
            _scores(scores)
        if not all(abs(d) <= 1 for d in self.replay):
            raise ValueError("a difference of two scores is -1 to 1")

    def to_json(self) -> dict[str, Any]:
        return {
            "candidate": self.candidate,
            "history": list(self.history),
            "control": list(self.control),
            "working": [[version, list(scores)] for version, scores in self.working],
            "replay": list(self.replay),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(
            candidate=value["candidate"],
            history=tuple(value["history"]),
            control=tuple(value["control"]),
            working=tuple((version, tuple(scores)) for version, scores in value["working"]),
            replay=tuple(value["replay"]),
        )


@dataclass(frozen=True, slots=True)
class Judgement:
    verdict: Verdict
    reason: str
    better: float  # log evidence for the line
    worse: float  # log evidence against it
    history_used: bool  # the control sessions do not contradict what was before


def judge_line(line: Line, *, alpha: float = ALPHA) -> Judgement:
    """What to do with the line now. `alpha`: how often each of the two verdicts may be wrong."""
    all_working = tuple(score for _, scores in line.working for score in scores)
    better = unpaired(line.control, all_working, better=True) + (paired(line.replay)[-1] if line.replay else 0.0)
    contradicts = max(
        unpaired(line.history, line.control, better=True), unpaired(line.history, line.control, better=False)
    ) >= np.log(1 / ALPHA)
    tests = [(line.control, alpha * _DRIFTED_SHARE)]
    if line.history and not contradicts:
        tests.append((line.history + line.control, alpha * (1 - _DRIFTED_SHARE)))
    # Each less what it needs, so that 0 is enough for any; then in the terms of `alpha` again.
    excess = max(_harm(stable, line.working) - np.log(1 / share) for stable, share in tests)
    worse = float(excess + np.log(1 / alpha))
    verdict, reason = _decide(line, all_working, better, worse, alpha)
    return Judgement(verdict, reason, float(better), worse, not contradicts)


def spent(alpha: float, candidate: int) -> float:
    """The part of `alpha` for the n-th candidate, from 1; all of them together have `alpha`."""
    return alpha / (candidate * (candidate + 1))


def smallest_drop(stable: Sequence[float], sessions: int, *, alpha: float = ALPHA) -> float | None:
    """The smallest drop of the mean score below that of `stable` which `sessions` sessions of the others would show
    half of the time; None: not even a drop to 0 would."""
    if not stable or not sessions:
        return None
    mean = float(np.mean(stable))
    n = len(stable)
    drops = np.arange(0.01, mean + 1e-9, 0.01)
    if drops.size == 0:
        return None
    others = sessions * np.stack((1 - (mean - drops), mean - drops), axis=-1)  # (D, 2): of zeros and ones
    values = np.array([0.0, 1.0])
    known = np.broadcast_to(n * np.array([1 - mean, mean]), others.shape)
    enough = unpaired_counts(values, known, values, others, better=False) >= np.log(1 / alpha)
    return round(float(drops[np.argmax(enough)]), 2) if enough.any() else None


def _decide(line: Line, working: Sequence[float], better: float, worse: float, alpha: float) -> tuple[Verdict, str]:
    if worse >= np.log(1 / alpha):
        return "rollback", f"the scores fell: evidence {np.exp(min(worse, 50)):.3g} to 1 after {len(working)} sessions"
    needed = np.log(1 / spent(alpha, line.candidate))
    if better < needed:
        return "undecided", f"no evidence of improvement yet: {np.exp(better):.3g} to 1 of {np.exp(needed):.3g} needed"
    if line.control and working and np.mean(working[-_LATEST:]) < np.mean(line.control):
        return "undecided", "it was better as a whole, but its latest sessions are not"
    return "promote", f"the scores rose: evidence {np.exp(min(better, 50)):.3g} to 1 after {len(working)} sessions"


def _harm(stable: Sequence[float], working: Sequence[tuple[int, Sequence[float]]]) -> float:
    """Log evidence that the line has been worse than `stable` since one of its versions."""
    if not stable or not working:
        return 0.0
    values = np.unique([score for _, scores in working for score in scores])
    counts = np.stack([[np.count_nonzero(np.equal(scores, v)) for v in values] for _, scores in working])
    since = np.cumsum(counts[::-1], axis=0)[::-1].astype(np.float64)  # (versions, k)
    logs = unpaired_counts(*_counted(np.asarray(stable)), values, since, better=False)
    start = np.arange(1, len(working) + 1)
    return float(np.logaddexp.reduce(logs - np.log(start * (start + 1))))


def _scores(values: ArrayLike) -> Float64:
    array = np.asarray(values, dtype=np.float64)
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError("a score is 0 to 1")
    return array


def _counted(scores: Float64) -> tuple[Float64, Float64]:
    values, counts = np.unique(scores, return_counts=True)
    return values, counts.astype(np.float64)
