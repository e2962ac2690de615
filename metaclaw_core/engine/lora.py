"""LoRA by hand: every adapted linear layer gets a wrapper that adds ``s·B·A·x`` of the adapter in use.

Design: one base model, any number of adapters, one in use at a time (all arithmetic is on one thread), so a
switch is an assignment per layer and costs microseconds. peft would copy every adapter into the module tree and
rename it there; this is shorter, and sampling and training run through exactly the same multiplication, unmerged,
which is what keeps their logprobs together. B starts at 0, so a new adapter is the base model. ``s = 32 / rank``.

Weights are float32 whatever the base model is and are rounded to its type at each use. Which layers: linear ones
whose name says attention or MLP, and the output layer. Expert weights that a model keeps as one 3-D parameter are no
linear layers and stay frozen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn import functional

from metaclaw_core.engine.errors import EngineError

ALPHA = 32.0
_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"(^|\.)(mlp|feed_forward|ffn|experts?|shared_experts?)(\.|$)")
_ROUTER = re.compile(r"\.(gate|router)$")
_serial = count()


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 32
    seed: int | None = None
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True

    @property
    def scale(self) -> float:
        return ALPHA / self.rank

    def wants(self, kind: str) -> bool:
        return {"attn": self.train_attn, "mlp": self.train_mlp, "unembed": self.train_unembed}[kind]


@dataclass(frozen=True, eq=False)
class Adapter:
    """One set of LoRA weights. Frozen in what it holds; training changes the tensors in place."""

    config: LoraConfig
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    """Layer name → (A of shape (rank, in), B of shape (out, rank))."""
    serial: int = field(default_factory=lambda: next(_serial))
    """Unique in this process: names the weights in caches."""

    def tensors(self) -> dict[str, Tensor]:
        return {f"{name}.{part}": t for name, pair in self.pairs.items() for part, t in zip("AB", pair, strict=True)}

    def snapshot(self, dtype: torch.dtype) -> Adapter:
        """A copy for sampling that later training doesn't change."""
        copies = {n: (a.detach().to(dtype, copy=True), b.detach().to(dtype, copy=True)) for n, (a, b) in self.pairs.items()}
        return Adapter(self.config, copies)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())


class LoraLinear(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.pair: tuple[Tensor, Tensor] | None = None
        self.scale = 1.0

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.base.weight, self.base.bias)
        if self.pair is None:
            return y
        a, b = self.pair
        if a.dtype != x.dtype:
            a, b = a.to(x.dtype), b.to(x.dtype)
        return torch.add(y, functional.linear(functional.linear(x, a), b), alpha=self.scale)


class Lora:
    """The wrappers of one model, and which adapter they add."""

    def __init__(self, model: nn.Module, unembed: nn.Module | None) -> None:
        found: dict[str, tuple[str, nn.Linear]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and (kind := _kind(name, module is unembed)):
                found[name] = (kind, module)
        self.kinds = {name: kind for name, (kind, _) in found.items()}
        self.layers: dict[str, LoraLinear] = {}
        for name, (_, module) in found.items():
            parent, _, leaf = name.rpartition(".")
            self.layers[name] = LoraLinear(module)
            setattr(model.get_submodule(parent), leaf, self.layers[name])
        self._in_use: Adapter | None = None

    def new(self, config: LoraConfig, device: torch.device) -> Adapter:
        """A fresh adapter; the same seed gives the same weights. Raises EngineError."""
        if config.rank < 1:
            raise EngineError(f"LoRA rank must be 1 or more, not {config.rank}.")
        generator = torch.Generator()
        if config.seed is None:
            generator.seed()
        else:
            generator.manual_seed(config.seed)
        pairs = {}
        for name, layer in self.layers.items():
            if config.wants(self.kinds[name]):
                bound = 1 / math.sqrt(layer.base.in_features)  # kaiming_uniform with a = √5, as peft has it
                a = torch.empty(config.rank, layer.base.in_features).uniform_(-bound, bound, generator=generator)
                pairs[name] = (a.to(device), torch.zeros(layer.base.out_features, config.rank, device=device))
        return self._complete(Adapter(config, pairs))

    def adopt(self, config: LoraConfig, tensors: Mapping[str, Tensor]) -> Adapter:
        """An adapter from saved tensors, checked against this model. Raises EngineError."""
        pairs = {}
        for name, layer in self.layers.items():
            if config.wants(self.kinds[name]):
                try:
                    a, b = tensors[f"{name}.A"], tensors[f"{name}.B"]
                except KeyError as e:
                    raise EngineError(f"The checkpoint has no weights for {name}: it is of another model.") from e
                if a.shape[1] != layer.base.in_features or b.shape[0] != layer.base.out_features:
                    raise EngineError(f"The checkpoint's {name} has another shape: it is of another model.")
                pairs[name] = (a, b)
        return self._complete(Adapter(config, pairs))

    def _complete(self, adapter: Adapter) -> Adapter:
        present = {self.kinds[name] for name in adapter.pairs}
        wanted = {kind for kind in ("attn", "mlp", "unembed") if adapter.config.wants(kind)}
        if missing := sorted(wanted - present):
            raise EngineError(
                f"This model has no linear layers of the kind {' or '.join(missing)} that can carry LoRA; "
                "create the training client without them."
            )
        return adapter

    @contextmanager
    def use(self, adapter: Adapter | None) -> Iterator[None]:
        """Inside, the model is base plus `adapter`. It stays so until another one is used."""
        if adapter is not self._in_use:
            for name, layer in self.layers.items():
                layer.pair = adapter.pairs.get(name) if adapter else None
                layer.scale = adapter.config.scale if adapter else 1.0
            self._in_use = adapter
        yield


def _kind(name: str, is_unembed: bool) -> str | None:
    if is_unembed:
        return "unembed"
    if _ROUTER.search(name):
        return None
    if _MLP.search(name):
        return "mlp"
    return "attn" if _ATTENTION.search(name) else None
