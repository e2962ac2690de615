"""How far two bodies are the same, at memory speed.

Design: an agent sends its history again and again, so nearly all of a body is known from the one
before. `startswith` and `endswith` compare a stretch as memory does; the stretch is a slice of a size that
stays in the processor's cache, for `memoryview` compares forty times as slowly. Only inside the first
stretch that differs the place is searched, by halving, and in the last few bytes as the first bit of two numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

_STRETCH = 16 * 1024
_AS_NUMBER = 64  # bytes that are compared in one go


class Likeness(NamedTuple):
    """How many bytes of two bodies are the same, from the start and from the end; together no more than the shorter one has."""

    other: bytes
    prefix: int
    suffix: int

    @property
    def shared(self) -> int:
        return self.prefix + self.suffix


def likeness(other: bytes, body: bytes) -> Likeness:
    """Of `body` to `other`."""
    prefix = common_prefix(other, body)
    return Likeness(other, prefix, common_suffix(other, body, min(len(other), len(body)) - prefix))


def longest(bodies: Iterable[bytes], body: bytes) -> tuple[int, int]:
    """(place, length) of the longest common prefix that one of `bodies` has with `body`, the first of equals; (-1, 0) for no
    bodies. Of most one byte is looked at: the one behind what the best one so far shares."""
    best, length = -1, 0
    for place, other in enumerate(bodies):
        if best >= 0 and (len(other) <= length or other[length : length + 1] != body[length : length + 1]):
            continue
        prefix = common_prefix(other, body)
        if best < 0 or prefix > length:
            best, length = place, prefix
    return best, length


def common_prefix(a: bytes, b: bytes) -> int:
    """The number of leading bytes in which they are equal."""
    end = min(len(a), len(b))
    for at in range(0, end, _STRETCH):
        stretch = a[at : at + _STRETCH]
        if not b.startswith(stretch, at):
            return at + _same(stretch, b[at : at + _STRETCH])
    return end


def common_suffix(a: bytes, b: bytes, limit: int, known: int = 0) -> int:
    """The number of trailing bytes in which they are equal, at most `limit`; of `known` bytes it is known already."""
    end = min(len(a), len(b), limit)
    last = len(b)
    for at in range(known, end, _STRETCH):
        stretch = a[len(a) - min(at + _STRETCH, end) : len(a) - at]
        if not b.endswith(stretch, 0, last - at):
            return at + _same_at_end(stretch, b[max(0, last - at - _STRETCH) : last - at])
    return max(end, known)


def _same(a: bytes, b: bytes) -> int:
    low, high = 0, min(len(a), len(b))
    while high - low > _AS_NUMBER:
        middle = (low + high + 1) // 2
        if b.startswith(a[low:middle], low):
            low = middle
        else:
            high = middle - 1
    differ = int.from_bytes(a[low:high]) ^ int.from_bytes(b[low:high])
    return high - (differ.bit_length() + 7) // 8


def _same_at_end(a: bytes, b: bytes) -> int:
    low, high = 0, min(len(a), len(b))
    while high - low > _AS_NUMBER:
        middle = (low + high + 1) // 2
        if a[len(a) - middle : len(a) - low] == b[len(b) - middle : len(b) - low]:
            low = middle
        else:
            high = middle - 1
    differ = int.from_bytes(a[len(a) - high : len(a) - low]) ^ int.from_bytes(b[len(b) - high : len(b) - low])
    return low + ((differ & -differ).bit_length() - 1) // 8 if differ else high
