"""Content-encodings undone, for bodies that were recorded as they travelled.

Design: every decoder is a generator driven in small steps; it gives what it has when the data ends,
breaks or grows past `limit`, and says whether the end of the encoding was seen. So a stream that was
cut keeps its prefix, and a decompression bomb costs at most `limit` bytes of memory (plus one step).
Input is taken in slices by position, so many small gzip members don't copy the rest each time. Lists
("gzip, br") are undone from the right. brotli and zstandard are imported on first use: the proxy
imports this module.

Limits: an encoding we don't know raises WireError; its bytes can't be searched for secrets either.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

from metaclaw_core.errors import WireError

LIMIT = 256 * 1024 * 1024
_STEP = 64 * 1024
_ZSTD_STEP = 256  # zstandard has no bound on what one step gives; a block of 4 bytes can give 128 kB


def decode_body(data: bytes, encoding: str, limit: int = LIMIT) -> tuple[bytes, bool]:
    """`data` without its content-encoding, and whether it was complete.

    `encoding` is the header's value: a comma-separated list, "" or "identity" for none. Raises
    WireError for an unknown encoding only.
    """
    names = [n for n in (part.strip().lower() for part in encoding.split(",")) if n and n != "identity"]
    for name in names:
        if name not in _DECODERS:
            raise WireError(f"content-encoding {name[:40]!r} is not known")
    complete = True
    for name in reversed(names):
        data, whole = _collect(_DECODERS[name](data), limit)
        complete = complete and whole
    return (data, complete) if len(data) <= limit else (data[:limit], False)


def _collect(pieces: Iterator[bytes | None], limit: int) -> tuple[bytes, bool]:
    """The pieces joined. None, always the last, says that the end of the encoding was seen."""
    out: list[bytes] = []
    size = 0
    for piece in pieces:
        if piece is None:
            return b"".join(out), True
        out.append(piece)
        size += len(piece)
        if size > limit:
            break
    return b"".join(out)[:limit], False


def _inflate(data: bytes, wbits: int) -> Iterator[bytes | None]:
    """zlib, raw deflate, or gzip with any number of members."""
    at = 0
    while True:
        decoder = zlib.decompressobj(wbits)
        try:
            while at < len(data) and not decoder.eof:
                rest = data[at : at + _STEP]
                at += len(rest)
                while rest and not decoder.eof:
                    yield decoder.decompress(rest, _STEP)
                    rest = decoder.unconsumed_tail
            at -= len(decoder.unused_data)
            if not decoder.eof:
                yield decoder.flush()  # at most the rest of one match: the input is used up
        except zlib.error:
            return
        if not decoder.eof:
            return
        if wbits < 16 or data[at : at + 2] != b"\x1f\x8b":  # anything else after a member is padding
            yield None
            return


def _gzip(data: bytes) -> Iterator[bytes | None]:
    return _inflate(data, 31)


def _deflate(data: bytes) -> Iterator[bytes | None]:
    """RFC 9110 means zlib, but some servers send the raw format: the two header bytes tell."""
    zlib_header = len(data) >= 2 and data[0] & 0x0F == 8 and int.from_bytes(data[:2]) % 31 == 0
    return _inflate(data, 15 if zlib_header else -15)


def _brotli(data: bytes) -> Iterator[bytes | None]:
    import brotli

    decoder = brotli.Decompressor()
    while True:
        try:
            piece = decoder.process(data, output_buffer_limit=_STEP)
        except brotli.error:
            return
        data = b""
        yield piece
        if decoder.is_finished():
            yield None
            return
        if not piece and decoder.can_accept_more_data():  # it wants more, and there is no more
            return


def _zstd(data: bytes) -> Iterator[bytes | None]:
    """Any number of frames."""
    import zstandard

    at = 0
    while True:
        decoder = zstandard.ZstdDecompressor().decompressobj()
        while at < len(data) and not decoder.eof:
            step = data[at : at + _ZSTD_STEP]
            try:
                yield decoder.decompress(step)
            except zstandard.ZstdError:
                return
            at += len(step) - len(decoder.unused_data)
        if not decoder.eof:
            return
        if at >= len(data):
            yield None
            return


_DECODERS: dict[str, Callable[[bytes], Iterator[bytes | None]]] = {
    "gzip": _gzip,
    "x-gzip": _gzip,
    "deflate": _deflate,
    "br": _brotli,
    "zstd": _zstd,
}
