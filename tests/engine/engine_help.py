"""What the engine's tests share: a running engine, an SDK session on it, token ids and data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tinker


@dataclass(frozen=True)
class RunningEngine:
    url: str
    key: str
    model: str
    root: Path

    def service(self) -> tinker.ServiceClient:
        import tinker

        return tinker.ServiceClient(base_url=self.url, api_key=self.key)

    def rest(self) -> tinker.RestClient:
        import tinker

        return tinker.RestClient(base_url=self.url, api_key=self.key)


@dataclass(frozen=True)
class Client:
    """One SDK session on the engine, and short ways to say what tests say often."""

    service: tinker.ServiceClient
    model: str

    def train(self, seed: int = 1, rank: int = 4) -> tinker.TrainingClient:
        return self.service.create_lora_training_client(self.model, rank=rank, seed=seed).result(60)

    def sampler(self, path: str | None = None) -> tinker.SamplingClient:
        if path is None:
            return self.service.create_sampling_client(base_model=self.model).result(60)
        return self.service.create_sampling_client(model_path=path).result(60)


def ids(text: str) -> list[int]:
    """Token ids of ASCII `text` for the tiny tokenizer: special tokens come first, then the bytes in order."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [3 + alphabet.index({" ": "Ġ", "\n": "Ċ"}.get(char, char)) for char in text]


def datum(text: str, **inputs: list[float]) -> tinker.Datum:
    """`text` as a sequence to learn; cross_entropy with weight 1 everywhere, or with the inputs given."""
    import numpy as np
    from tinker import types

    full = ids(text)
    given = {name: np.asarray(values, dtype=np.float32) for name, values in inputs.items()}
    rest = given or {"weights": np.ones(len(full) - 1, dtype=np.float32)}
    target = {"target_tokens": np.asarray(full[1:], dtype=np.int64)}
    return types.Datum(model_input=types.ModelInput.from_ints(full[:-1]), loss_fn_inputs={**target, **rest})
