"""A tee for streamed answers: every byte goes on untouched, a copy stays here.

Design: mitmproxy loses a chunk silently when a stream callable raises, so nothing in `__call__` can:
it appends to a list and returns its argument. The copy is bounded; past the limit it is dropped whole
and `overflow` says so, since half an answer is no rollout.
"""

from __future__ import annotations


class Tee:
    def __init__(self, limit: int) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._limit = limit
        self.overflow = False
        self.ended = False  # mitmproxy sent the final empty chunk

    def __call__(self, data: bytes) -> bytes:
        if not data:
            self.ended = True
        elif not self.overflow:
            self._size += len(data)
            if self._size > self._limit:
                self.overflow = True
                self._parts.clear()
            else:
                self._parts.append(data)
        return data

    def body(self) -> bytes:
        """What passed so far; b"" after an overflow."""
        return b"".join(self._parts)
