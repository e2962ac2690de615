"""One model in training: its adapter, the gradients gathered so far, its AdamW state.

Design: `forward_backward` either adds the gradient of the whole call or nothing: gradients come from
``torch.autograd.grad`` per padded batch, are summed aside, and join the model's only when the last batch is done. So
a call that runs out of memory or gets a NaN leaves no half. Sequences are packed by length into padded batches under
a budget of tokens. Padding is on the right, where causal attention never looks, so no mask is needed and a datum's
values don't depend on its neighbours beyond rounding.

A batch that doesn't fit is halved and tried again; one sequence alone is tried with recomputed activations.
Gradients gathered but not yet applied are not part of a saved state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaclaw_core.engine.errors import EngineError, OutOfMemoryError
from metaclaw_core.engine.lora import Adapter
from metaclaw_core.engine.losses import Config, Loss
from metaclaw_core.engine.model import BaseModel, is_out_of_memory

type Array = NDArray[np.float32]


@dataclass(frozen=True)
class Datum:
    tokens: NDArray[np.int32]
    """Model input, shape (N,)."""
    targets: NDArray[np.int64]
    """Next tokens, shape (N,), or (N, K) for a soft target."""
    inputs: Mapping[str, Array]
    """The loss's other inputs, each of the shape of `targets`."""


@dataclass(frozen=True)
class Outcome:
    """Results in the order of the data given."""

    loss: float
    """Sum over all tokens of all datums."""
    logprobs: list[Array]
    losses: list[Array]
    """Loss of each token, each of the shape of the datum's targets."""


@dataclass(frozen=True)
class AdamStep:
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float
    """Limit of the global gradient norm; 0: none."""


class Trainee:
    def __init__(self, base: BaseModel, adapter: Adapter) -> None:
        self.base = base
        self.adapter = adapter
        self._names = list(adapter.tensors())
        self._weights = list(adapter.tensors().values())
        for weight in self._weights:
            weight.requires_grad_(True)
        self._gradients: list[Tensor] | None = None
        self._optimizer = torch.optim.AdamW(self._weights, fused=True)

    def forward_backward(self, data: Sequence[Datum], loss: Loss, config: Config, *, backward: bool) -> Outcome:
        """Raises EngineError; then nothing has changed."""
        gathered: list[Tensor] | None = None
        logprobs: dict[int, Array] = {}
        losses: dict[int, Array] = {}
        total = 0.0
        with self.base.lora.use(self.adapter), torch.set_grad_enabled(backward):
            for batch in _pack([datum.tokens.size for datum in data], self.base.batch_tokens):
                for part, lp, per_token, gradients in self._run([(i, data[i]) for i in batch], loss, config):
                    total += float(per_token.sum(dtype=torch.float64))
                    for (index, datum), own, cost in zip(part, _split(part, lp), _split(part, per_token), strict=True):
                        logprobs[index] = own.reshape(datum.targets.shape)
                        losses[index] = cost.reshape(datum.targets.shape)
                    if gathered is None:
                        gathered = gradients
                    elif gradients is not None:
                        torch._foreach_add_(gathered, gradients)
        if not np.isfinite(total):
            raise EngineError(f"The loss is {total}: check logprobs and advantages. No gradient of this call was kept.")
        if backward and gathered is not None:
            if self._gradients is None:
                self._gradients = gathered
            else:
                torch._foreach_add_(self._gradients, gathered)
        order = range(len(data))
        return Outcome(total, [logprobs[i] for i in order], [losses[i] for i in order])

    def optim_step(self, step: AdamStep) -> dict[str, float]:
        """Apply the gathered gradients and forget them. Raises EngineError where there are none."""
        if self._gradients is None:
            raise EngineError("There are no gradients to apply: call forward_backward before optim_step.")
        for weight, gradient in zip(self._weights, self._gradients, strict=True):
            weight.grad = gradient
        norm = torch.nn.utils.get_total_norm(self._gradients)
        if step.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self._weights, step.clip_norm, norm)
        self._optimizer.param_groups[0].update(
            lr=step.learning_rate, betas=(step.beta1, step.beta2), eps=step.eps, weight_decay=step.weight_decay
        )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._gradients = None
        return {"grad_norm:mean": float(norm)}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """What AdamW remembers, by name of the weight; empty before the first step."""
        return {
            f"{name}.{key}": value
            for name, weight in zip(self._names, self._weights, strict=True)
            for key, value in self._optimizer.state.get(weight, {}).items()
        }

    def restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        for name, weight in zip(self._names, self._weights, strict=True):
            state = {key: tensors[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in tensors}
            if state:
                self._optimizer.state[weight] = state

    def _run(self, batch: Batch, loss: Loss, config: Config, *, recompute: bool = False) -> Iterator[Result]:
        try:
            result = self._pass(batch, loss, config, recompute=recompute or self._padded(batch) > self.base.batch_tokens)
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            if recompute:
                raise OutOfMemoryError(
                    f"A sequence of {batch[0][1].tokens.size} tokens doesn't fit into the memory of {self.base.device}."
                ) from e
        else:
            yield result
            return
        self.base.empty_cache()  # outside the handler: its traceback holds the failed pass alive
        half = len(batch) // 2
        for part in (batch[:half], batch[half:]):
            if part:
                yield from self._run(part, loss, config, recompute=len(batch) == 1)

    def _padded(self, batch: Batch) -> int:
        return len(batch) * max(datum.tokens.size for _, datum in batch)

    def _pass(self, batch: Batch, loss: Loss, config: Config, *, recompute: bool) -> Result:
        device = self.base.device
        lengths = [datum.tokens.size for _, datum in batch]
        ids = torch.zeros(len(batch), max(lengths), dtype=torch.int64)
        for row, (_, datum) in enumerate(batch):
            ids[row, : datum.tokens.size] = torch.from_numpy(datum.tokens)
        recompute = recompute and torch.is_grad_enabled()
        if recompute:
            self.base.checkpoint_activations(True)
        try:
            states = self.base.hidden(ids.to(device))
            if min(lengths) == max(lengths):
                flat = states.flatten(0, 1)
            else:
                flat = torch.cat([states[row, :length] for row, length in enumerate(lengths)])
            targets = torch.from_numpy(np.concatenate([datum.targets for _, datum in batch])).to(device)
            logprobs = self.base.target_logprobs(flat, targets)
            inputs = {
                name: torch.from_numpy(np.concatenate([datum.inputs[name] for _, datum in batch])).to(device)
                for name in loss.inputs
            }
            per_token = loss.per_token(logprobs, inputs, config)
            gradients = None
            if torch.is_grad_enabled():
                found = torch.autograd.grad(per_token.sum(), self._weights, allow_unused=True)
                gradients = [
                    torch.zeros_like(w) if g is None else g for w, g in zip(self._weights, found, strict=True)
                ]
        finally:
            if recompute:
                self.base.checkpoint_activations(False)
        return batch, logprobs.detach().cpu(), per_token.detach().cpu(), gradients


type Batch = list[tuple[int, Datum]]
type Result = tuple[Batch, Tensor, Tensor, list[Tensor] | None]


def _pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches of similar length, each at most `budget` tokens when padded; one alone may be longer.

    >>> _pack([3, 9, 4, 9], 18)
    [[1, 3], [2, 0]]
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _split(batch: Batch, values: Tensor) -> list[Array]:
    ends = np.cumsum([datum.tokens.size for _, datum in batch])[:-1]
    return np.split(values.numpy().astype(np.float32), ends)
