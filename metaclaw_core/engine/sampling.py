"""Sampling: prefill one prompt at a time, decode all running sequences together.

Design: a `Batch` belongs to one set of weights. A request joins it between two steps: its prompt is run alone (from
the longest known prefix), then its row is added; one step gives every row one token; a row leaves when it ends. So
requests that arrive at different times share steps, and none waits for another's end.

Returned logprobs are log_softmax(logits / temperature) of the chosen token over the whole vocabulary, before top_k and
top_p cut it; at temperature 0 (greedy) they are those of temperature 1. Prompt logprobs are always those of
temperature 1. A token is drawn by inverting the distribution at one uniform number of the row's own generator, so a
seed gives the same tokens in whatever company it runs (up to rounding of the logits).
A stop token is part of the result, as is the token that completes a stop string.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaclaw_core.engine.kv import Cache, PrefixStore, Row
from metaclaw_core.engine.lora import Adapter
from metaclaw_core.engine.model import BaseModel

_STOP_WINDOW = 8  # tokens decoded beyond the stop string's own length, for what a token may split


@dataclass(frozen=True)
class SampleRequest:
    prompt: NDArray[np.int32]
    samples: int
    max_tokens: int
    temperature: float
    top_k: int
    """-1: no limit."""
    top_p: float
    stop_ids: frozenset[int]
    stop_texts: tuple[str, ...]
    seed: int | None
    """None: drawn anew."""
    score_from: int | None
    """First prompt position whose logprob is wanted, at least 1; None: none is."""
    top_prompt: int = 0
    """How many of the likeliest tokens to give for each scored prompt position."""
    top_sampled: int = 0
    on_token: Callable[[int, int, float], None] | None = None
    """Called on the compute thread with (sample, token, logprob)."""


@dataclass
class Sequence_:
    """One sample in the making."""

    request: SampleRequest
    index: int
    random: random.Random
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[Top] = field(default_factory=list)
    stop_reason: str | None = None
    """"stop", "length", or None while it runs."""


@dataclass
class Sampled:
    """The answer to one request."""

    request: SampleRequest
    sequences: list[Sequence_]
    prompt_logprobs: NDArray[np.float32] | None
    """One per prompt token; NaN where not scored, and always at position 0."""
    prompt_top: Top | None
    """Ids and logprobs (scored positions, k)."""
    reused: int
    """Prompt tokens whose keys and values were known already."""

    @property
    def done(self) -> bool:
        return all(sequence.stop_reason for sequence in self.sequences)


type Top = tuple[NDArray[np.int32], NDArray[np.float32]]
type Listener = Callable[[Sampled | Exception], None]


class Batch:
    def __init__(self, base: BaseModel, adapter: Adapter | None, prefixes: PrefixStore) -> None:
        self.base = base
        self.adapter = adapter
        self.weights = adapter.serial if adapter else -1
        self._prefixes = prefixes
        self._running: list[tuple[Sequence_, Sampled, Listener]] = []
        self._cache: Cache | None = None
        self._next = torch.empty(0, 1, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._running)

    def add(self, request: SampleRequest, listener: Listener) -> None:
        """Run the prompt and draw the first token of each sample; `listener` is called when all have ended."""
        with self.base.lora.use(self.adapter), torch.inference_mode():
            sampled, row, logits = self._prefill(request)
            sequences = sampled.sequences
            chosen = self._choose(logits.expand(len(sequences), -1), sequences)
            live = [sequence for sequence in sequences if not sequence.stop_reason]
            if sampled.done:
                self._prefixes.keep(self.weights, request.prompt, row)
                listener(sampled)
                return
            old = [self._cache.row(i) for i in range(len(self._running))] if self._cache else []
            self._cache = Cache.of([*old, *[row] * len(live)], self.base.layers)
            self._running += [(sequence, sampled, listener) for sequence in live]
            alive = torch.tensor([not sequence.stop_reason for sequence in sequences])
            self._next = torch.cat([self._next, chosen[alive][:, None]])

    def step(self) -> None:
        """One token for every running sequence."""
        if self._cache is None:
            return
        with self.base.lora.use(self.adapter), torch.inference_mode():
            device = self.base.device
            lengths = [self._cache.used - start for start in self._cache.starts]
            positions = torch.tensor(lengths, device=device)[:, None]
            states = self.base.hidden(self._next.to(device), self._cache, self._cache.mask(1), positions)
            chosen = self._choose(self.base.logits(states[:, -1]), [sequence for sequence, _, _ in self._running])
            self._next = chosen[:, None]
            if any(sequence.stop_reason for sequence, _, _ in self._running):
                self._part(self._cache)

    def fail(self) -> list[Listener]:
        """Drop everything; who was waiting."""
        waiting = {id(sampled): listener for _, sampled, listener in self._running}
        self._running, self._cache, self._next = [], None, torch.empty(0, 1, dtype=torch.int64)
        return list(waiting.values())

    def drop(self, listener: Listener) -> None:
        """Forget a request whose client is gone."""
        self._leave([i for i, (_, _, other) in enumerate(self._running) if other is not listener])

    def _part(self, cache: Cache) -> None:
        """Let the ended rows go: keep what they know, tell their listeners, rebuild the batch without them."""
        staying, told = [], {}
        for i, (sequence, sampled, listener) in enumerate(self._running):
            if not sequence.stop_reason:
                staying.append(i)
                continue
            row = cache.row(i)
            tokens = np.concatenate([sampled.request.prompt, np.asarray(sequence.tokens[:-1], dtype=np.int32)])
            self._prefixes.keep(self.weights, tokens, row)
            if sampled.done:
                told[id(sampled)] = (sampled, listener)
        self._leave(staying)
        for sampled, listener in told.values():
            listener(sampled)

    def _leave(self, staying: list[int]) -> None:
        if len(staying) == len(self._running) or self._cache is None:
            return
        rows = [self._cache.row(i) for i in staying]
        self._cache = Cache.of(rows, self.base.layers) if rows else None
        self._running = [self._running[i] for i in staying]
        self._next = self._next[staying]

    def _prefill(self, request: SampleRequest) -> tuple[Sampled, Row, Tensor]:
        """Everything known after the prompt, its keys and values, and the logits (1, V) of what follows."""
        prompt, device = request.prompt, self.base.device
        # States are needed from the position before the first scored one, and always of the last.
        first = prompt.size - 1 if request.score_from is None else request.score_from - 1
        known = self._prefixes.find(self.weights, prompt, first)
        cache = Cache.of([known], self.base.layers) if known else Cache(self.base.layers)
        reused = len(known) if known else 0
        ids = torch.from_numpy(prompt[reused:].astype(np.int64)).to(device)[None]
        positions = torch.arange(reused, prompt.size, device=device)[None]
        states = self.base.hidden(ids, cache, None, positions)[0]
        cache.starts = [0]
        scores, top = None, None
        if request.score_from is not None:
            wanted = states[first - reused : -1]
            targets = torch.from_numpy(prompt[first + 1 :].astype(np.int64)).to(device)
            scores = np.full(prompt.size, np.nan, dtype=np.float32)
            scores[first + 1 :] = self.base.target_logprobs(wanted, targets).cpu().numpy()
            if request.top_prompt:
                top = self._top_of_prompt(wanted, request.top_prompt)
        seed = random.getrandbits(64) if request.seed is None else request.seed
        sequences = [Sequence_(request, i, random.Random(f"{seed}/{i}")) for i in range(request.samples)]  # noqa: S311
        return Sampled(request, sequences, scores, top, reused), cache.row(0), self.base.logits(states[-1:])

    def _top_of_prompt(self, states: Tensor, k: int) -> Top:
        ids, values = [], []
        for block in torch.split(states, 256):
            best = self.base.logits(block).log_softmax(-1).topk(k)
            ids.append(best.indices.cpu().numpy().astype(np.int32))
            values.append(best.values.cpu().numpy())
        return np.concatenate(ids), np.concatenate(values)

    def _choose(self, logits: Tensor, sequences: Sequence[Sequence_]) -> Tensor:
        """Draw, record and check for the end; the tokens drawn, on the CPU."""
        temperatures = [sequence.request.temperature for sequence in sequences]
        if any(t not in (0.0, 1.0) for t in temperatures):
            logits = logits / torch.tensor([t or 1.0 for t in temperatures], device=logits.device)[:, None]
        logprobs = logits.log_softmax(-1)
        chosen = _draw(_cut(logprobs, sequences), sequences)
        if 0.0 in temperatures:
            greedy = torch.tensor([t == 0.0 for t in temperatures], device=logits.device)
            chosen = torch.where(greedy, logprobs.argmax(-1), chosen)
        values = logprobs.gather(-1, chosen[:, None])[:, 0].tolist()
        tokens: list[int] = chosen.tolist()
        wide = max(sequence.request.top_sampled for sequence in sequences)
        best = logprobs.topk(wide) if wide else None
        for i, (sequence, token, value) in enumerate(zip(sequences, tokens, values, strict=True)):
            sequence.tokens.append(token)
            sequence.logprobs.append(value)
            if best is not None and (k := sequence.request.top_sampled):
                ids, scores = best.indices[i, :k].cpu().numpy(), best.values[i, :k].cpu().numpy()
                sequence.top.append((ids.astype(np.int32), scores))
            sequence.stop_reason = _ended(sequence, self.base.tokenizer)
            if sequence.request.on_token:
                sequence.request.on_token(sequence.index, token, value)
        return chosen.cpu()


def _cut(logprobs: Tensor, sequences: Sequence[Sequence_]) -> Tensor:
    """Probabilities with what top_k and top_p exclude at 0; not normalised."""
    probabilities = logprobs.exp()
    requests = [sequence.request for sequence in sequences]
    if all(r.top_k <= 0 and r.top_p >= 1.0 for r in requests):
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    ranks = torch.arange(ordered.shape[-1], device=ordered.device)
    top_k = torch.tensor([r.top_k if r.top_k > 0 else ordered.shape[-1] for r in requests], device=ordered.device)
    top_p = torch.tensor([min(r.top_p, 1.0) for r in requests], device=ordered.device)
    kept = (ranks < top_k[:, None]) & ((before < top_p[:, None]) | (ranks == 0))
    return torch.zeros_like(probabilities).scatter(-1, order, ordered * kept)


def _draw(probabilities: Tensor, sequences: Sequence[Sequence_]) -> Tensor:
    # float64: a running float32 sum over 150,000 words would be off by more than rare words are likely.
    cumulative = probabilities.double().cumsum(-1)
    uniform = torch.tensor([[sequence.random.random()] for sequence in sequences], dtype=torch.float64)
    drawn = torch.searchsorted(cumulative, uniform.to(cumulative.device) * cumulative[:, -1:], right=True)
    return drawn[:, 0].clamp_max(probabilities.shape[-1] - 1)


def _ended(sequence: Sequence_, tokenizer: Any) -> str | None:
    request = sequence.request
    if sequence.tokens[-1] in request.stop_ids:
        return "stop"
    if request.stop_texts:
        window = max(len(text.encode()) for text in request.stop_texts) + _STOP_WINDOW
        tail = tokenizer.decode(sequence.tokens[-window:], skip_special_tokens=False)
        if any(text in tail for text in request.stop_texts):
            return "stop"
    return "length" if len(sequence.tokens) >= request.max_tokens else None
