"""Cutting a streamed JSON array into its objects, each as soon as it is closed.

Design: only the bytes that can change the state are looked at (quotes, escapes, brackets), found by a
regular expression; what is between them is never parsed here. UTF-8 needs no decoding for that: none
of these bytes occurs inside a longer character. A body that is no array but one object, or several in
a row, gives these objects.

Limits: nothing is validated, an unfinished object is held back, and brackets of the wrong kind count as
brackets; whoever parses the object finds out.
"""

from __future__ import annotations

import re

_STEP = re.compile(rb'\\.?|["\[\]{}]', re.DOTALL)


class ObjectSplitter:
    """Chunks of any size in, the bytes of whole objects out."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0  # everything before it is scanned
        self._start = 0  # where the open object begins
        self._depth = 0
        self._base: int | None = None  # depth of the objects we want: 1 in an array, else 0
        self._quoted = False
        self.closed = False  # the array's own "]" was seen

    def feed(self, chunk: bytes) -> list[bytes]:
        self._buffer += chunk
        found: list[bytes] = []
        done = 0
        for step in _STEP.finditer(self._buffer, self._at):
            token = step[0]
            if token == b"\\":  # half an escape: look again with the next chunk
                self._at = step.start()
                break
            if token == b'"':
                self._quoted = not self._quoted
            elif self._quoted or token[:1] == b"\\":
                continue
            elif token in b"[{":
                if self._base is None:
                    self._base = 1 if token == b"[" else 0
                if self._depth == self._base:
                    self._start = step.start()
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth == self._base:
                    done = step.end()
                    found.append(bytes(self._buffer[self._start : done]))
                elif self._depth <= 0:
                    self._depth, self.closed = 0, True
        else:
            self._at = len(self._buffer)
        del self._buffer[:done]
        self._at -= done
        self._start -= done
        return found
