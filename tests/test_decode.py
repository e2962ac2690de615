"""Content-encodings: whole, cut, broken, stacked, hostile."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib

import brotli
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from metaclaw_core.decode import decode_body
from metaclaw_core.errors import WireError

TEXT = b'{"messages":[{"role":"user","content":"' + b"abc def ghi " * 500 + b'"}]}'


def raw_deflate(data: bytes) -> bytes:
    coder = zlib.compressobj(wbits=-15)
    return coder.compress(data) + coder.flush()


CODERS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "br": brotli.compress,
    "zstd": zstandard.compress,
    "deflate": zlib.compress,
    "Deflate": raw_deflate,
}


@pytest.mark.parametrize("name", CODERS)
def test_each_encoding_gives_the_body_back(name: str) -> None:
    assert decode_body(CODERS[name](TEXT), name) == (TEXT, True)


@pytest.mark.parametrize("name", CODERS)
def test_an_empty_body_can_be_encoded(name: str) -> None:
    assert decode_body(CODERS[name](b""), name) == (b"", True)


@pytest.mark.parametrize("name", ["", "identity", " Identity , "])
def test_no_encoding_is_the_body_itself(name: str) -> None:
    assert decode_body(TEXT, name) == (TEXT, True)


def test_a_list_is_undone_from_the_right() -> None:
    assert decode_body(brotli.compress(gzip.compress(TEXT)), "gzip, br") == (TEXT, True)


@pytest.mark.parametrize("name", CODERS)
@settings(max_examples=40)
@given(data=st.binary(max_size=100_000), share=st.floats(0, 0.99))
def test_a_cut_stream_gives_its_prefix(name: str, data: bytes, share: float) -> None:
    coded = CODERS[name](data)
    decoded, complete = decode_body(coded[: int(len(coded) * share)], name)
    assert not complete
    assert data.startswith(decoded)


def test_a_stream_flushed_before_the_cut_loses_nothing() -> None:
    for name, coder in (("gzip", zlib.compressobj(wbits=31)), ("zstd", zstandard.ZstdCompressor().compressobj())):
        flush = zlib.Z_SYNC_FLUSH if name == "gzip" else zstandard.COMPRESSOBJ_FLUSH_BLOCK
        sent = coder.compress(b"data: one\n\n") + coder.flush(flush)
        coder.compress(b"data: two\n\n")
        assert decode_body(sent, name) == (b"data: one\n\n", False)


@pytest.mark.parametrize("name", ["gzip", "br", "zstd", "deflate"])
@given(data=st.binary(max_size=200))
def test_garbage_never_raises(name: str, data: bytes) -> None:
    decode_body(data, name)


def test_several_members_and_frames_are_one_body() -> None:
    assert decode_body(gzip.compress(b"a") + gzip.compress(b"b"), "gzip") == (b"ab", True)
    assert decode_body(zstandard.compress(b"a") + zstandard.compress(b"b"), "zstd") == (b"ab", True)
    assert decode_body(gzip.compress(b"") * 50_000, "gzip") == (b"", True)


def test_zeros_after_a_gzip_member_are_padding() -> None:
    assert decode_body(gzip.compress(b"a") + b"\0" * 9, "gzip") == (b"a", True)


@pytest.mark.parametrize("name", CODERS)
def test_a_bomb_stops_at_the_limit(name: str) -> None:
    bomb = CODERS[name](bytes(40_000_000))
    tracemalloc.start()
    decoded, complete = decode_body(bomb, name, limit=1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(decoded), complete) == (1_000_000, False)
    assert peak < 15_000_000


def test_a_plain_body_over_the_limit_is_cut() -> None:
    assert decode_body(b"abcdef", "", limit=4) == (b"abcd", False)


def test_an_unknown_encoding_is_named() -> None:
    with pytest.raises(WireError, match="content-encoding 'aws-chunked' is not known"):
        decode_body(b"x", "gzip, aws-chunked")
