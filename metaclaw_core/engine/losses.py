"""The built-in losses: what each needs, and its value per token.

Every loss is a sum over tokens and datums, never a mean, as in the cloud; the caller scales. With
l = log p(target), q = the sampler's logprob, A = advantage, ρ = exp(l − q), sg = no gradient:

    cross_entropy        −w·l
    importance_sampling  −ρ·A
    ppo                  −min(ρ·A, clip(ρ, low, high)·A)
    cispo                −sg(clip(ρ, low, high))·l·A
    dro                  −(l·A − ½·β·(l − q)²)

All inputs have the length of the model input and are next-token aligned. cross_entropy also takes K targets
per position, shape (N, K): a soft target. Prompt positions are masked by zero weights or advantages; a loss
that would not be zero there (dro) needs q = l, so it is masked by advantage 0 and logprob 0 together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metaclaw_core.engine.errors import EngineError

type Inputs = Mapping[str, Tensor]
type Config = Mapping[str, float]


@dataclass(frozen=True)
class Loss:
    name: str
    inputs: tuple[str, ...]
    """Names of loss_fn_inputs besides ``target_tokens``; all are required, none other is allowed."""
    per_token: Callable[[Tensor, Inputs, Config], Tensor]
    """(logprobs (T,), inputs (T,), config) → loss of each token (T,); differentiable in the logprobs."""
    defaults: Mapping[str, float | None] = field(default_factory=dict)
    """Keys of loss_fn_config; None means the caller must give it."""

    def config(self, given: Mapping[str, float]) -> Config:
        """`given` over the defaults. Raises EngineError."""
        if unknown := sorted(set(given) - set(self.defaults)):
            raise EngineError(f"{self.name} has no loss_fn_config {_names(unknown)}; it takes {_names(self.defaults)}.")
        merged = {**self.defaults, **given}
        if missing := [name for name, value in merged.items() if value is None]:
            raise EngineError(f"{self.name} needs loss_fn_config {_names(missing)}.")
        return {name: float(value) for name, value in merged.items() if value is not None}


def _ratio(logprobs: Tensor, inputs: Inputs) -> Tensor:
    return torch.exp(logprobs - inputs["logprobs"])


def _cross_entropy(logprobs: Tensor, inputs: Inputs, _: Config) -> Tensor:
    return -logprobs * inputs["weights"]


def _importance_sampling(logprobs: Tensor, inputs: Inputs, _: Config) -> Tensor:
    return -_ratio(logprobs, inputs) * inputs["advantages"]


def _ppo(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    ratio = _ratio(logprobs, inputs)
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -torch.minimum(ratio * inputs["advantages"], clipped * inputs["advantages"])


def _cispo(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    ratio = _ratio(logprobs.detach(), inputs)
    return -ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"]) * logprobs * inputs["advantages"]


def _dro(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    # Where the sampler's logprob is exactly 0 and so is the advantage, the position is a masked prompt position.
    live = (inputs["logprobs"] != 0) | (inputs["advantages"] != 0)
    penalty = 0.5 * config["beta"] * (logprobs - inputs["logprobs"]) ** 2
    return torch.where(live, -(logprobs * inputs["advantages"] - penalty), torch.zeros_like(logprobs))


_RL = ("logprobs", "advantages")
LOSSES: Mapping[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("cross_entropy", ("weights",), _cross_entropy),
        Loss("importance_sampling", _RL, _importance_sampling),
        Loss("ppo", _RL, _ppo, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
        Loss("cispo", _RL, _cispo, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
        Loss("dro", _RL, _dro, {"beta": None}),
    )
}


def find_loss(name: str) -> Loss:
    """Raises EngineError that lists the names."""
    if name not in LOSSES:
        raise EngineError(f"The loss {name!r} is not served here; known are {_names(LOSSES)}.")
    return LOSSES[name]


def _names(names: Mapping[str, object] | list[str]) -> str:
    return ", ".join(names) or "none"
