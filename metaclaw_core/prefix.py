"""How far two bodies are the same, at memory speed.

Design: an agent sends its history again and again, so nearly all of a body is known from the one
before. The known body is cut into chunks once; `startswith` at an offset compares a chunk without a
copy, and only inside the first chunk that differs the place is searched by halving.
"""

from __future__ import annotations

_CHUNK = 16 * 1024


class Known:
    """A body to compare later ones with."""

    __slots__ = ("_chunks", "body")

    def __init__(self, body: bytes) -> None:
        self.body = body
        self._chunks = [body[i : i + _CHUNK] for i in range(0, len(body), _CHUNK)]

    def common_prefix(self, other: bytes) -> int:
        """The number of leading bytes in which `other` equals this body."""
        at = 0
        for chunk in self._chunks:
            if not other.startswith(chunk, at):
                return at + _same(chunk, other[at : at + len(chunk)])
            at += len(chunk)
        return at

    def common_suffix(self, other: bytes, limit: int) -> int:
        """The number of trailing bytes in which they are equal, at most `limit`."""
        size = min(len(self.body), len(other), limit)
        low, high = 0, size
        while low < high:
            middle = (low + high + 1) // 2
            if other.endswith(self.body[len(self.body) - middle : len(self.body) - low], 0, len(other) - low):
                low = middle
            else:
                high = middle - 1
        return low


def _same(a: bytes, b: bytes) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
