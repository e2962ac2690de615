"""Cutting a byte stream into records: server-sent events and newline-delimited JSON.

Design: both splitters are fed chunks with arbitrary borders and yield the same records for any
chunking. SSE follows the WHATWG parsing rules (CR, LF and CRLF line ends, BOM, multi-line data,
comments); an event that is not closed by a blank line is dropped by `events`, as the standard says,
but `flush` gives it: the last event of a cut stream or of a sloppy server still carries tokens.

Limits: bytes are decoded per line with U+FFFD for invalid UTF-8; `id` and `retry` are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    event: str  # "message" if the stream named none
    data: str


class Lines:
    """Bytes in, complete lines out. `newlines` False splits at LF only (NDJSON)."""

    def __init__(self, *, sse: bool) -> None:
        self._tail = b""
        self._sse = sse
        self._start = True

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        data = self._tail + chunk if self._tail else chunk
        if self._sse:
            if self._start:
                if len(data) < 3 and b"\xef\xbb\xbf".startswith(data):
                    self._tail = data
                    return
                self._start = False
                data = data.removeprefix(b"\xef\xbb\xbf")
            if b"\r" in data:
                # A CR at the very end may be half of a CRLF: wait for the next byte.
                held = b"\r" if data.endswith(b"\r") else b""
                data = data[: len(data) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n") + held
        *lines, self._tail = data.split(b"\n")
        yield from lines

    def flush(self) -> bytes:
        """The unterminated rest, once the stream has ended."""
        tail, self._tail = self._tail, b""
        return tail.rstrip(b"\r")


class SSESplitter:
    """Server-sent events from chunks of any size."""

    def __init__(self) -> None:
        self._lines = Lines(sse=True)
        self._event = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[Event]:
        for line in self._lines.feed(chunk):
            event = self._line(line)
            if event is not None:
                yield event

    def flush(self) -> Iterator[Event]:
        """What a stream that ended without its last blank line still held; at most one event."""
        tail = self._lines.flush()
        if tail:
            self._line(tail)
        event = self._line(b"")
        if event is not None:
            yield event

    def _line(self, line: bytes) -> Event | None:
        if not line:
            if not self._data:
                self._event = ""
                return None
            event = Event(self._event or "message", "\n".join(self._data))
            self._event, self._data = "", []
            return event
        text = line.decode("utf-8", "replace")
        name, _, value = text.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        return None


class NDJSONSplitter:
    """One JSON text a line; blank lines are skipped."""

    def __init__(self) -> None:
        self._lines = Lines(sse=False)

    def feed(self, chunk: bytes) -> Iterator[str]:
        for line in self._lines.feed(chunk):
            if line.strip():
                yield line.decode("utf-8", "replace")

    def flush(self) -> Iterator[str]:
        tail = self._lines.flush()
        if tail.strip():
            yield tail.decode("utf-8", "replace")
