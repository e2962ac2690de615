"""Keys and values of attention: a padded batch that grows in place, and what is kept to be used again.

Design: `Cache` holds rows of different length aligned at their *last* token, so one decode step writes one column.
It is allocated with room ahead; transformers' own cache copies everything at every token. Rows join and leave by
building the batch anew, which happens once per request and not once per token.
`PrefixStore` keeps the rows of finished requests, newest first, within a number of bytes. A new prompt starts from
the longest common prefix with any of them under the same weights: the segments of one reply, the turns of one
conversation and the samples of one prompt cost only what is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import CacheLayerMixin

ROOM = 256  # columns allocated ahead
_SHORTEST = 16  # a common prefix below this is not worth a copy


@dataclass(frozen=True)
class Row:
    """One sequence's keys and values, a (heads, tokens, dim) pair per layer."""

    layers: tuple[tuple[Tensor, Tensor], ...]

    def __len__(self) -> int:
        return int(self.layers[0][0].shape[1])

    def prefix(self, length: int) -> Row:
        return Row(tuple((k[:, :length], v[:, :length]) for k, v in self.layers))

    def copy(self) -> Row:
        return Row(tuple((k.clone(), v.clone()) for k, v in self.layers))

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.layers)


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.used = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        start, self.used = self.used, self.used + key_states.shape[2]
        if not self.is_initialized or self.used > self.keys.shape[2]:
            self.keys = _grown(self.keys if start else None, key_states, start, self.used + ROOM)
            self.values = _grown(self.values if start else None, value_states, start, self.used + ROOM)
            self.is_initialized = True
        self.keys[:, :, start : self.used] = key_states
        self.values[:, :, start : self.used] = value_states
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def get_seq_length(self) -> int:
        return self.used

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.used + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in older transformers


class Cache(TransformersCache):
    """The rows of one batch; `starts[i]` is the first column of row i that is no padding."""

    layers: list[_Layer]  # type: ignore[assignment]

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[_Layer() for _ in range(layers)])
        self.starts: list[int] = []

    @classmethod
    def of(cls, rows: Sequence[Row], layers: int) -> Cache:
        """A batch with a copy of `rows`. All rows empty, or none: an empty cache."""
        cache = cls(layers)
        length = max((len(row) for row in rows), default=0)
        cache.starts = [length - len(row) for row in rows]
        for index, layer in enumerate(cache.layers):
            for part in (0, 1):
                like = rows[0].layers[index][part]
                heads, _, dim = like.shape
                block = like.new_zeros(len(rows), heads, length + ROOM, dim)
                for row, start, target in zip(rows, cache.starts, block, strict=True):
                    target[:, start:length] = row.layers[index][part]
                if part:
                    layer.values = block
                else:
                    layer.keys = block
            layer.used, layer.is_initialized = length, True
        return cache

    @property
    def used(self) -> int:
        return self.layers[0].used

    def row(self, index: int) -> Row:
        """A view, valid until the batch is rebuilt."""
        start, end = self.starts[index], self.used
        return Row(tuple((layer.keys[index, :, start:end], layer.values[index, :, start:end]) for layer in self.layers))

    def mask(self, new: int) -> Tensor | None:
        """(rows, used + new) of what is no padding; None where there is no padding at all."""
        if not any(self.starts):
            return None
        columns = torch.arange(self.used + new, device=self.layers[0].keys.device)
        return columns[None] >= torch.tensor(self.starts, device=columns.device)[:, None]


def _grown(old: Tensor | None, like: Tensor, used: int, size: int) -> Tensor:
    block = like.new_zeros(like.shape[0], like.shape[1], size, like.shape[3])
    if old is not None:
        block[:, :, :used] = old[:, :, :used]
    return block


@dataclass(frozen=True, eq=False)
class _Kept:
    weights: int
    tokens: NDArray[np.int32]
    row: Row


class PrefixStore:
    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: list[_Kept] = []  # least recently used first
        self._bytes = 0

    def find(self, weights: int, tokens: NDArray[np.int32], most: int) -> Row | None:
        """The longest known prefix of `tokens`, at most `most` long; None if it is too short to matter."""
        best, length = None, _SHORTEST - 1
        for entry in self._kept:
            if entry.weights == weights and (common := min(_common(entry.tokens, tokens), most)) > length:
                best, length = entry, common
        if best is None:
            return None
        self._kept.remove(best)
        self._kept.append(best)
        return best.row.prefix(length)

    def keep(self, weights: int, tokens: NDArray[np.int32], row: Row) -> None:
        """Keep a copy of `row`, the keys and values of exactly `tokens`."""
        if row.nbytes > self._limit or tokens.size < _SHORTEST:
            return
        for entry in list(self._kept):
            if entry.weights == weights and _common(entry.tokens, tokens) in (entry.tokens.size, tokens.size):
                if entry.tokens.size >= tokens.size:
                    return  # already part of what is kept
                self._drop(entry)
        while self._kept and self._bytes + row.nbytes > self._limit:
            self._drop(self._kept[0])
        self._kept.append(_Kept(weights, tokens, row.copy()))
        self._bytes += row.nbytes

    def forget(self, weights: int) -> None:
        for entry in [entry for entry in self._kept if entry.weights == weights]:
            self._drop(entry)

    def clear(self) -> None:
        self._kept.clear()
        self._bytes = 0

    def _drop(self, entry: _Kept) -> None:
        self._kept.remove(entry)
        self._bytes -= entry.row.nbytes


def _common(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """Length of the common prefix."""
    size = min(a.size, b.size)
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if different.size else size
