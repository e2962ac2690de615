from __future__ import annotations

import httpx
import httpx_sse
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaclaw_core.wire.sse import Event, NDJSONSplitter, SSESplitter


def split(chunks: list[bytes]) -> list[Event]:
    splitter = SSESplitter()
    events = [event for chunk in chunks for event in splitter.feed(chunk)]
    return [*events, *splitter.flush()]


def cut(data: bytes, borders: list[int]) -> list[bytes]:
    places = sorted({b % (len(data) + 1) for b in borders})
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def test_lines_of_one_event_are_joined_and_its_name_is_kept():
    assert split([b"event: ping\ndata: a\ndata:b\ndata:  c\n\n"]) == [Event("ping", "a\nb\n c")]


def test_an_event_without_a_name_is_a_message_and_names_do_not_leak_to_the_next():
    assert split([b"event: x\ndata: 1\n\ndata: 2\n\n"]) == [Event("x", "1"), Event("message", "2")]


def test_a_block_without_data_is_no_event_and_takes_its_name_along():
    assert split([b"event: x\nid: 3\n\ndata: 1\n\n"]) == [Event("message", "1")]


def test_an_empty_data_line_is_an_event_with_empty_data():
    assert split([b"data\n\n", b"data:\n\n"]) == [Event("message", ""), Event("message", "")]


def test_comments_ids_and_unknown_fields_are_ignored():
    assert split([b": keep-alive\n\nid: 7\nretry: 5\nfoo: bar\ndata: x\n\n"]) == [Event("message", "x")]


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_each_line_end_of_the_standard_ends_a_line_at_any_border(end: bytes):
    data = end.join([b"event: a", b"data: 1", b"", b"data: 2", b"", b""])
    for at in range(len(data) + 1):
        assert split([data[:at], data[at:]]) == [Event("a", "1"), Event("message", "2")]


def test_a_line_separator_of_unicode_ends_no_line():
    text = "a\u2028b\u2029c\x85d\x0be"
    assert split([f"data: {text}\n\n".encode()]) == [Event("message", text)]


def test_a_byte_order_mark_is_dropped_at_the_start_only():
    data = "\ufeffdata: 1\n\n\ufeffdata: 2\n\ndata: \ufeff3\n\n".encode()
    for at in range(len(data) + 1):
        assert split([data[:at], data[at:]]) == [Event("message", "1"), Event("message", "\ufeff3")]


def test_the_event_of_a_stream_that_ends_without_a_blank_line_is_given_by_flush():
    splitter = SSESplitter()
    assert list(splitter.feed(b"data: 1\n\ndata: 2\ndata: 3")) == [Event("message", "1")]
    assert list(splitter.flush()) == [Event("message", "2\n3")]
    assert list(splitter.flush()) == []


def test_invalid_utf8_becomes_replacement_characters():
    assert split([b"data: a\xffb\n\n"]) == [Event("message", "a\ufffdb")]


VALUE = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=6) | st.sampled_from(
    ["\u2028", "\ufeff", "{}", "[DONE]", ":", " a", "\x85", "\x0b", "\x1c"]
)
LINE = st.one_of(
    st.builds(
        "{}{}{}".format, st.sampled_from(["data", "event", "id", "retry", "x", ""]), st.sampled_from([":", ": "]), VALUE
    ),
    st.sampled_from(["data", "event", ":", "", "", ""]),
    VALUE,
)
STREAM = st.tuples(
    st.lists(st.tuples(LINE, st.sampled_from(["\n", "\r", "\r\n"])), max_size=14), st.just("") | LINE, st.booleans()
).map(lambda s: ("\ufeff" if s[2] else "") + "".join(line + end for line, end in s[0]) + s[1])


def oracle(text: str) -> list[Event]:
    """httpx-sse, plus what the standard says and it leaves to others: the BOM, and that an event has data.

    It also gives blocks without data and keeps no trace of an empty data line, so events with empty
    data are left out of the comparison on both sides. `flush` is imitated with two more line ends.
    """
    body = (text.removeprefix("\ufeff") + "\n\n").encode()
    answer = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=body)
    return [Event(e.event or "message", e.data) for e in httpx_sse.EventSource(answer).iter_sse() if e.data]


@given(STREAM, st.lists(st.integers(0, 400), max_size=8))
def test_any_stream_in_any_chunks_gives_the_events_of_httpx_sse(text: str, borders: list[int]):
    assert [e for e in split(cut(text.encode(), borders)) if e.data] == oracle(text)


@given(st.binary(max_size=80), st.lists(st.integers(0, 80), max_size=6))
def test_any_bytes_in_any_chunks_give_the_same_events(data: bytes, borders: list[int]):
    assert split(cut(data, borders)) == split([data])


@given(st.binary(max_size=80), st.lists(st.integers(0, 80), max_size=6))
def test_ndjson_is_cut_at_line_feeds_only_and_skips_blank_lines(data: bytes, borders: list[int]):
    splitter = NDJSONSplitter()
    lines = [line for chunk in cut(data, borders) for line in splitter.feed(chunk)] + list(splitter.flush())
    expected = [line.decode("utf-8", "replace") for line in data.split(b"\n") if line.strip()]
    assert [line.rstrip("\r") for line in lines] == [line.rstrip("\r") for line in expected]
