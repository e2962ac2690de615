"""What holds for every dialect and any input: it is read or refused in one sentence, and no chunking changes an answer.

The samples are those of each dialect's own tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import test_anthropic
import test_gemini
import test_ollama
import test_openai_chat
import test_openai_responses
from hypothesis import given, settings
from hypothesis import strategies as st
from json_fuzz import chunked, feed, json_values, mutated, refusal

from metaclaw_core.wire import by_name
from metaclaw_core.wire.base import Dialect


@dataclass(frozen=True, repr=False)
class Sample:
    name: str
    path: str
    request: dict[str, Any]
    answer: dict[str, Any]
    events: list[Any]
    forms: tuple[Callable[..., bytes], ...]  # how a stream of events is written

    @property
    def dialect(self) -> Dialect:
        return by_name(self.name)


def data_lines(*events: Any) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events)


SAMPLES = (
    Sample(
        "openai_chat",
        "/v1/chat/completions",
        test_openai_chat.REQUEST,
        test_openai_chat.ANSWER,
        test_openai_chat.CHUNKS,
        (test_openai_chat.sse,),
    ),
    Sample(
        "openai_responses",
        "/v1/responses",
        test_openai_responses.REQUEST,
        test_openai_responses.ANSWER,
        test_openai_responses.EVENTS,
        (data_lines,),
    ),
    Sample("anthropic", test_anthropic.PATH, test_anthropic.BODY, test_anthropic.ANSWER, test_anthropic.EVENTS, (data_lines,)),
    Sample(
        "gemini",
        test_gemini.PATH,
        test_gemini.BODY,
        test_gemini.ANSWER,
        test_gemini.CHUNKS,
        (test_gemini.sse, test_gemini.array),
    ),
    Sample("ollama", test_ollama.PATH, test_ollama.BODY, test_ollama.ANSWER, test_ollama.LINES, (test_ollama.ndjson,)),
)
every_dialect = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


@every_dialect
@given(data=st.data(), value=json_values)
def test_any_value_in_any_field_is_parsed_or_refused(sample: Sample, data: st.DataObject, value: Any) -> None:
    field = data.draw(st.sampled_from(sorted(sample.request)))
    assert refusal(lambda: sample.dialect.parse_request(dump({**sample.request, field: value}), sample.path)) != ""
    field = data.draw(st.sampled_from(sorted(sample.answer)))
    assert refusal(lambda: sample.dialect.parse_response(dump({**sample.answer, field: value}))) != ""


@every_dialect
@given(data=st.data())
def test_any_damage_inside_a_body_or_a_stream_is_parsed_or_refused(sample: Sample, data: st.DataObject) -> None:
    request, answer, events = (data.draw(mutated(whole)) for whole in (sample.request, sample.answer, sample.events))
    assert refusal(lambda: sample.dialect.parse_request(dump(request), sample.path)) != ""
    assert refusal(lambda: sample.dialect.parse_response(dump(answer))) != ""
    for form in sample.forms:
        feed(sample.dialect, form(*events))  # never raises


@every_dialect
@given(body=st.binary() | json_values.map(dump))
def test_any_bytes_are_parsed_or_refused(sample: Sample, body: bytes) -> None:
    assert refusal(lambda: sample.dialect.parse_request(body, sample.path)) != ""
    assert refusal(lambda: sample.dialect.parse_response(body)) != ""


@every_dialect
@given(chunks=st.lists(st.binary(max_size=40), max_size=5), first=st.sampled_from([b"", b"[", b"{", b"data: "]))
def test_bytes_that_are_no_stream_never_raise(sample: Sample, chunks: list[bytes], first: bytes) -> None:
    response = feed(sample.dialect, first, *chunks)
    assert not response.complete or sample.name == "gemini"  # whose stream may be a JSON array, and "[]" is a whole one


@every_dialect
@settings(max_examples=60)
@given(data=st.data(), end=st.sampled_from([b"\n", b"\r\n"]))
def test_any_chunking_of_a_whole_cut_or_damaged_stream_gives_the_same_response(
    sample: Sample, data: st.DataObject, end: bytes
) -> None:
    events = data.draw(st.just(sample.events) | mutated(sample.events))
    events = events[: data.draw(st.integers(0, len(events)))]
    for form in sample.forms:
        body = form(*events).replace(b"\n", end)
        # repr: a NaN is not equal to itself
        assert repr(feed(sample.dialect, *data.draw(chunked(body)))) == repr(feed(sample.dialect, body))


@every_dialect
@given(body=st.binary() | json_values.map(dump) | json_values.map(lambda v: dump({"error": v})) | json_values.map(lambda v: dump([{"error": v}])))
def test_any_error_body_gives_a_message_of_bounded_length(sample: Sample, body: bytes) -> None:
    assert len(sample.dialect.parse_error(body).message) <= 2000
