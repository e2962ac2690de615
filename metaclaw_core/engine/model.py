"""The base model: loaded once, frozen, with its tokenizer, its LoRA wrappers and its output layer in reach.

Design: training and sampling both want hidden states first and logits only where needed (a 150,000-word vocabulary
times 30,000 positions is 18 GB), so the decoder and the output layer are called apart. What some families do to the
logits afterwards (soft-capping, scaling) is done here too, and checked at start: if the two halves don't give what
the whole model gives, the model is refused.

Attention layers with a KV cache only. A model with recurrent or linear-attention layers is refused: its state can't
be cut back to a prefix or padded, which batching and prefix reuse need.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from metaclaw_core.engine.errors import EngineError
from metaclaw_core.engine.lora import Lora

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_LOGITS_AT_ONCE = 2**27  # elements of one block of logits: 512 MB in float32


class BaseModel:
    name: str
    """What clients call it: by default the hub id or the full path, from which the SDK can load the tokenizer."""
    path: str
    """Where it and its tokenizer were loaded from; clients load the tokenizer from here."""
    max_context: int
    """Tokens, prompt and reply together."""
    eos: frozenset[int]
    """Ids that end a reply when the request names no stop; may be empty."""
    batch_tokens: int
    """Padded tokens that one backward pass may hold in memory, estimated once at start."""

    def __init__(self, path: str, name: str | None = None, *, device: str = "auto", dtype: str = "auto") -> None:
        """Load from a folder or a hub id. Raises EngineError."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = torch.device(_device(device))
        self.dtype = _dtype(dtype, self.device)
        local = Path(path).expanduser()
        self.path = str(local.resolve()) if local.is_dir() else path
        self.name = name or self.path
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(self.path)
            model: Any = AutoModelForCausalLM.from_pretrained(self.path, dtype=self.dtype)
        except (OSError, ValueError) as e:
            raise EngineError(f"The model {path} can't be loaded: {e}") from e
        self._hf: Any = model.to(self.device).eval().requires_grad_(False)
        config = model.config.get_text_config()
        if odd := set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES:
            raise EngineError(f"{self.name} has layers of the type {', '.join(sorted(odd))}; the engine serves attention only.")
        self.layers: int = config.num_hidden_layers
        self.vocab_size: int = config.vocab_size
        self.max_context = int(getattr(config, "max_position_embeddings", None) or 2**20)
        self.arch: str = config.model_type
        self.eos = _ids(model.generation_config.eos_token_id) or _ids(config.eos_token_id)
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        self._factor = _logit_factor(config)
        self._decoder: Any = model.base_model
        parameters = inspect.signature(self._decoder.forward).parameters
        self._cache_word = "cache" if "cache" in parameters else "past_key_values"  # renamed in transformers 5
        self._check_halves()
        self.lora = Lora(model, model.get_output_embeddings())
        self._head: Any = model.get_output_embeddings()
        self.batch_tokens = max(256, int(self._memory() / self._bytes_per_token(config)))

    def hidden(self, ids: Tensor, cache: object = None, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Last hidden states (B, T, D) of `ids` (B, T). `mask` (B, past + T) marks what is no padding."""
        extra = {self._cache_word: cache, "use_cache": cache is not None}
        output = self._decoder(input_ids=ids, attention_mask=mask, position_ids=positions, **extra)
        states: Tensor = output.last_hidden_state
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, D) → (…, V) in float32."""
        logits: Tensor = self._head(hidden).float()
        if self._factor != 1.0:
            logits = logits * self._factor
        if self._cap:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits

    def target_logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """log p of `targets`, (N,) or (N, K), after the states (N, D). Differentiable; logits live in blocks."""
        rows = max(1, _LOGITS_AT_ONCE // self.vocab_size)
        if hidden.shape[0] <= rows:
            return self._block(hidden, targets)
        parts = []
        for start in range(0, hidden.shape[0], rows):
            block = hidden[start : start + rows], targets[start : start + rows]
            parts.append(
                checkpoint(self._block, *block, use_reentrant=False) if torch.is_grad_enabled() else self._block(*block)
            )
        return torch.cat(parts)

    def _block(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(hidden)
        if targets.ndim == 1:
            return -functional.cross_entropy(logits, targets, reduction="none")
        return logits.log_softmax(-1).gather(-1, targets)

    def checkpoint_activations(self, on: bool) -> None:
        """Trade time for memory in the passes that follow: for one sequence that is too long otherwise."""
        word = "activation" if hasattr(self._hf, "activation_checkpointing_enable") else "gradient"  # renamed in 5
        if on:
            getattr(self._hf, f"{word}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(self._hf, f"{word}_checkpointing_disable")()
        self._hf.train(on)  # transformers recomputes in training mode only

    def empty_cache(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_halves(self) -> None:
        ids = torch.arange(min(4, self.vocab_size), device=self.device)[None]
        self._head = self._hf.get_output_embeddings()
        with torch.inference_mode():
            whole = self._hf(input_ids=ids, use_cache=False).logits.float()
            halves = self.logits(self.hidden(ids))
        if not torch.allclose(whole, halves, atol=1e-2 if self.dtype != torch.float32 else 1e-4, rtol=1e-3):
            raise EngineError(f"{self.name} ({self.arch}) does something to its logits that the engine doesn't know.")

    def _memory(self) -> float:
        if self.device.type == "cuda":
            return float(torch.cuda.mem_get_info(self.device)[0]) / 2
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 8

    def _bytes_per_token(self, config: Any) -> float:
        """Activations kept for backward, roughly: the residual stream and what a block saves, and its logits twice."""
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        per_layer = 16 * config.hidden_size + 4 * inner
        itemsize = torch.finfo(self.dtype).bits // 8
        return float(self.layers * per_layer * itemsize + 2 * 4 * self.vocab_size)


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has its own type; the CPU allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "cuda"
    return "cpu"


def _dtype(wanted: str, device: torch.device) -> torch.dtype:
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    known = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp32": torch.float32, "float32": torch.float32}
    if wanted not in known:
        raise EngineError(f"The type {wanted} is not served; take bf16 or fp32.")
    return known[wanted]


def _ids(value: int | list[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)


def _logit_factor(config: Any) -> float:
    if scale := getattr(config, "logit_scale", None):  # Cohere multiplies
        return float(scale)
    if scaling := getattr(config, "logits_scaling", None):  # Granite divides
        return 1.0 / float(scaling)
    return 1.0


def use_threads(count: int) -> None:
    """CPU threads for everything torch does in this process."""
    torch.set_num_threads(count)
