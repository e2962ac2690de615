"""What one optimiser step sends to the trainer: importance weights, guards and the inputs of a loss.

Design: one forward gives the logprobs of the present weights. Their ratio to the sampler's says how far a token is off
policy; truncated, it is folded into the advantage here, w = min(ratio, 2) where the advantage is positive and
min(ratio, 1) where it is negative (a bad token that has become likelier is not pushed down twice as hard, TOPR,
arXiv 2503.14286), and the loss is plain importance_sampling with the present logprobs: its ratio is 1 and its gradient
w · A · ∇log p on any server that speaks the protocol. The alternatives leave the ratio to the server and get the
sampler's logprobs: `cispo` with {0, 2} is the same truncation but for negative advantages, `ppo` the usual clip.

Servers sum over tokens and datums. Every advantage is multiplied by scale / (tokens of the step), one constant, so
the step is the same however its turns are merged or split over calls, and no reply counts more for being short.

A turn with a ratio below 1e-4 anywhere is dropped: its logprobs are not those of this model, whatever the reason.
`Metrics.problem` says why the whole step should not be made.

Limits: a forward is paid for in addition to each step. Ratios are per token; the product over a long reply would be
the exact weight and has no usable variance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from metaclaw_core.learn.batch import Datum, Float32, Int32, LeftOut, Part

type LossName = Literal["importance_sampling", "cispo", "ppo"]
type Float64 = NDArray[np.float64]

VETO_RATIO = 1e-4
MOST_WEIGHT = 2.0
MOST_WEIGHT_NEGATIVE = 1.0
CONFIGS: Mapping[LossName, Mapping[str, float]] = {
    "importance_sampling": {},
    "cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": MOST_WEIGHT},
    "ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
}
_ROUNDING = 1e-3  # of a ratio: the same weights give slightly different logprobs when they sample and when they score
_MOST_LOG_RATIO = 60.0  # larger ones are not computed: e^60 is as impossible as e^600


@dataclass(frozen=True, slots=True)
class Limits:
    """Beyond these a step is not made."""

    kl: float = 0.01  # of sampler and present weights, nats per token
    least_ratio: float = 0.5  # mean over tokens
    most_ratio: float = 2.0
    least_ess: float = 0.3  # effective share of the tokens
    most_vetoed: float = 0.1  # share of the turns


@dataclass(frozen=True, slots=True)
class TurnRatio:
    turn: int
    mean: float | None  # ratio over its tokens; None: a logprob of the present weights is not finite
    left_out: LeftOut | None  # NOT_FINITE or VETO; None: it trains


@dataclass(frozen=True, slots=True)
class Metrics:
    """Over the tokens of all turns that are not vetoed; None where there are none."""

    turns: int
    vetoed: int
    tokens: int
    kl_k1: float | None  # mean(q - p): sampler less present, unbiased, may be negative
    kl_k2: float | None  # mean(½ (q - p)²)
    drift: float | None  # mean |q - p|
    mean_ratio: float | None
    most_ratio: float | None
    ess: float | None  # (Σw)² / (n Σw²), 1: all tokens weigh the same

    def problem(self, limits: Limits = Limits()) -> str | None:
        """Why no step should be made of this batch; None: it may be."""
        if self.turns == 0:
            return "the batch is empty"
        if self.vetoed > limits.most_vetoed * self.turns:
            return f"{self.vetoed} of {self.turns} turns hold tokens that the present weights give hardly any chance"
        if self.kl_k1 is None or self.kl_k2 is None or self.mean_ratio is None or self.ess is None:
            return "the batch is empty"
        if max(self.kl_k1, self.kl_k2) > limits.kl:
            kl = max(self.kl_k1, self.kl_k2)
            return f"the weights have moved too far from those that answered: KL {kl:.4f}, at most {limits.kl:g}"
        if not limits.least_ratio <= self.mean_ratio <= limits.most_ratio:
            allowed = f"{limits.least_ratio:g} to {limits.most_ratio:g}"
            return f"the mean ratio is {self.mean_ratio:.3f}, it must be {allowed}"
        if self.ess < limits.least_ess:
            return f"few tokens carry the step: the effective share is {self.ess:.2f}, at least {limits.least_ess:g}"
        return None


@dataclass(frozen=True, slots=True)
class Comparison:
    turns: tuple[TurnRatio, ...]
    metrics: Metrics


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """One datum as a loss takes it; all (N,)."""

    input_ids: Int32
    targets: NDArray[np.int64]
    logprobs: Float32
    advantages: Float32


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One forward_backward. It may be split over several: the gradients add up to the same."""

    loss: LossName
    config: Mapping[str, float]
    inputs: tuple[Inputs, ...]
    tokens: int  # that are trained on
    clipped: float  # share of those whose weight was cut


def compare(datums: Sequence[Datum], present: Sequence[NDArray[Any]]) -> Comparison:
    """How far off policy each turn is. `present`: (N,) logprobs of the present weights, one array per datum.

    Raises ValueError where a length differs.
    """
    turns: list[TurnRatio] = []
    logs: list[Float64] = []
    for datum, logprobs in zip(datums, present, strict=True):
        for part in datum.parts:
            log = _log_ratio(datum, logprobs, part)
            finite = bool(np.isfinite(log).all())
            left_out = LeftOut.NOT_FINITE if not finite else LeftOut.VETO if log.min() < np.log(VETO_RATIO) else None
            turns.append(TurnRatio(part.sample.turn, float(np.exp(log).mean()) if finite else None, left_out))
            if left_out is None:
                logs.append(log)
    return Comparison(tuple(turns), _metrics(len(turns), logs))


def prepare(
    datums: Sequence[Datum],
    present: Sequence[NDArray[Any]],
    *,
    loss: LossName = "importance_sampling",
    scale: float = 1.0,
) -> Call | None:
    """The call for `datums`, whose advantages and masks are given; None: nothing in them is to be learnt.

    `present`: as for `compare`. All datums of a step must be handed in together: the scale needs all of its tokens.
    """
    tokens = int(sum(datum.mask.sum() for datum in datums))
    if not any(datum.advantages.any() for datum in datums):
        return None
    inputs: list[Inputs] = []
    clipped = 0
    for datum, logprobs in zip(datums, present, strict=True):
        if not datum.mask.any():
            continue
        given = datum.logprobs * datum.mask
        advantages = datum.advantages.astype(np.float64) * (scale / tokens)
        if loss == "importance_sampling":
            given = np.zeros_like(datum.logprobs)
            for part in datum.parts:
                if not datum.mask[part.start]:
                    continue
                ratio = np.exp(_log_ratio(datum, logprobs, part))
                most = np.where(advantages[part.span] < 0, MOST_WEIGHT_NEGATIVE, MOST_WEIGHT)
                advantages[part.span] *= np.minimum(ratio, most)
                given[part.span] = logprobs[part.span]
                clipped += int((ratio > most * (1 + _ROUNDING)).sum())
        inputs.append(Inputs(datum.input_ids, datum.targets, given, advantages.astype(np.float32)))
    return Call(loss, CONFIGS[loss], tuple(inputs), tokens, clipped / tokens)


def _log_ratio(datum: Datum, present: NDArray[Any], part: Part) -> Float64:
    """(T,) of one turn. Raises ValueError."""
    if present.shape != datum.targets.shape:
        raise ValueError(f"{present.shape} logprobs came back for a datum of {datum.targets.shape}")
    log: Float64 = present[part.span].astype(np.float64) - datum.logprobs[part.span].astype(np.float64)
    return np.minimum(log, _MOST_LOG_RATIO)


def _metrics(turns: int, logs: Sequence[Float64]) -> Metrics:
    vetoed = turns - len(logs)
    if not logs:
        return Metrics(turns, vetoed, 0, None, None, None, None, None, None)
    log = np.concatenate(logs)
    ratio = np.exp(log)
    return Metrics(
        turns=turns,
        vetoed=vetoed,
        tokens=int(log.size),
        kl_k1=float(-log.mean()),
        kl_k2=float(0.5 * (log**2).mean()),
        drift=float(np.abs(log).mean()),
        mean_ratio=float(ratio.mean()),
        most_ratio=float(ratio.max()),
        ess=float(ratio.sum() ** 2 / (log.size * (ratio**2).sum())),
    )
