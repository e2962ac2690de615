"""What a writer wrote, read by its own dialect, is what was said."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from answer_tools import BODIES, DIALECTS, GEMINI_PATH, write, writer
from hypothesis import given, settings
from hypothesis import strategies as st
from json_fuzz import chunked, feed

from metaclaw_core.errors import WireError
from metaclaw_core.model import Part, Reasoning, Response, StopReason, Text, ToolCall, Usage
from metaclaw_core.wire import by_name
from metaclaw_core.wire.answer import Call, Event, ReasoningDelta, TextDelta, answer_writer, error_body, joined
from metaclaw_core.wire.answer_anthropic import SIGNATURE
from metaclaw_core.wire.jsonio import dumps

pieces = st.text(max_size=6) | st.sampled_from(("\n\n", "\r", "data: ", " ", "\u2028", "}", '"', "\\", "</think>", "é", "日本"))
numbers = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | pieces,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(pieces, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def arguments(draw: st.DrawFn) -> str:
    """JSON of an object as a model may space and escape it."""
    value = draw(st.dictionaries(pieces, values, max_size=3))
    indent, ascii_only = draw(st.sampled_from((None, 1))), draw(st.booleans())
    return draw(st.sampled_from(("", " ", "\n"))) + json.dumps(value, indent=indent, ensure_ascii=ascii_only)


calls = st.builds(Call, st.from_regex(r"[a-z_]{1,12}", fullmatch=True), arguments(), st.from_regex(r"call_[a-z0-9]{6}", fullmatch=True))
events = st.lists(st.builds(TextDelta, pieces) | st.builds(ReasoningDelta, pieces) | calls, max_size=10)
stops = st.sampled_from((StopReason.STOP, StopReason.LENGTH, StopReason.CONTENT_FILTER))


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    read, written = draw(st.integers(0, 200_000)), draw(st.integers(0, 9_000))
    cached, thought = draw(st.none() | st.integers(0, read)), draw(st.none() | st.integers(0, written))
    return Usage(read, written, cached_tokens=cached, reasoning_tokens=thought)


def parts_of(dialect: str, said: list[Event], *, stream: bool) -> list[Part]:
    """What the dialect can tell of `said`: with or without order, arguments as a string or as an object."""
    raw = dialect.startswith("openai") or (dialect == "anthropic" and stream)
    opaque = {"signature": SIGNATURE} if dialect == "anthropic" else None
    if dialect in ("openai_chat", "ollama"):  # fields, not ordered parts
        said = sorted(said, key=lambda e: (ReasoningDelta, TextDelta, Call).index(type(e)))
    parts: list[Part] = []
    for event in joined(said):
        if isinstance(event, Call):
            told = event.arguments if raw else dumps(json.loads(event.arguments))
            parts.append(ToolCall(event.name, told, event.id))
        else:
            parts.append(Text(event.text) if isinstance(event, TextDelta) else Reasoning(event.text, opaque))
    return parts


def usage_of(dialect: str, usage: Usage) -> Usage:
    if dialect == "ollama":
        return Usage(usage.input_tokens, usage.output_tokens)
    return replace(usage, reasoning_tokens=None) if dialect == "anthropic" else usage


def stop_of(dialect: str, said: list[Event], stop: StopReason) -> StopReason:
    if dialect == "ollama" and stop is StopReason.CONTENT_FILTER:
        stop = StopReason.STOP
    called = any(isinstance(e, Call) for e in said)
    return StopReason.TOOL_CALLS if called and stop is StopReason.STOP else stop


def check(dialect: str, response: Response, said: list[Event], stop: StopReason, usage: Usage, *, stream: bool) -> None:
    assert response.error is None
    assert response.complete
    told = response.message.parts if response.message is not None else ()  # no item, no message: Responses
    assert list(told) == parts_of(dialect, said, stream=stream)
    assert response.stop_reason is stop_of(dialect, said, stop)
    assert response.usage == usage_of(dialect, usage)
    assert response.model == "m"
    assert response.id == (None if dialect == "ollama" else "resp_7")


@pytest.mark.parametrize("dialect", DIALECTS)
@given(said=events, stop=stops, usage=usages(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_stream_of_any_chunks_reads_as_what_was_said(dialect: str, said: list[Event], stop: StopReason, usage: Usage, data: st.DataObject):
    path = data.draw(st.sampled_from((GEMINI_PATH, f"{GEMINI_PATH}?alt=sse"))) if dialect == "gemini" else None
    to = writer(dialect, stream=True, path=path)
    body = to.start()
    for event in said:
        body += to.feed(event)
        if data.draw(st.booleans()):
            body += to.keep_alive()
    body += to.finish(stop, usage)
    assert body.isascii()
    check(dialect, feed(by_name(dialect), *data.draw(chunked(body))), said, stop, usage, stream=True)


@pytest.mark.parametrize("dialect", DIALECTS)
@given(said=events, stop=stops, usage=usages())
@settings(max_examples=60, deadline=None)
def test_a_whole_answer_reads_as_what_was_said(dialect: str, said: list[Event], stop: StopReason, usage: Usage):
    to = writer(dialect, stream=False)
    assert (to.media_type, to.start(), to.keep_alive(), [b for e in said if (b := to.feed(e))]) == ("application/json", b"", b"", [])
    check(dialect, by_name(dialect).parse_response(to.finish(stop, usage)), said, stop, usage, stream=False)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_comes_after_a_whole_answer_reads_as_its_replay(dialect: str, stream: bool):
    """The same parts whether the client streams or not, but for the spelling of arguments."""
    said: list[Event] = [ReasoningDelta("Hm."), TextDelta("So."), Call("read", '{"path":"a"}', "call_1")]
    body = write(writer(dialect, stream=stream), said)
    response = feed(by_name(dialect), body) if stream else by_name(dialect).parse_response(body)
    assert response.message is not None
    assert list(response.message.parts) == parts_of(dialect, said, stream=stream)
    assert response.stop_reason is StopReason.TOOL_CALLS


# --- words for the end --------------------------------------------------------------------------

WORDS = {
    "openai_chat": ("stop", "length", "tool_calls", "content_filter", "stop"),
    "openai_responses": ("completed", "max_output_tokens", "completed", "content_filter", "completed"),
    "anthropic": ("end_turn", "max_tokens", "tool_use", "refusal", "end_turn"),
    "gemini": ("STOP", "MAX_TOKENS", "STOP", "SAFETY", "OTHER"),
    "ollama": ("stop", "length", "stop", "stop", "stop"),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_reasons_have_the_words_of_the_form(dialect: str, stream: bool):
    found = []
    for stop in StopReason:
        body = write(writer(dialect, stream=stream), [TextDelta("Yes.")], stop)
        found.append((feed(by_name(dialect), body) if stream else by_name(dialect).parse_response(body)).raw_stop_reason)
    assert tuple(found) == WORDS[dialect]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_unknown_counts_are_not_made_up(dialect: str, stream: bool):
    body = write(writer(dialect, stream=stream), [TextDelta("Yes.")], usage=Usage())
    usage = (feed(by_name(dialect), body) if stream else by_name(dialect).parse_response(body)).usage
    # Anthropic's `message_start` can't do without a count, and nothing takes its 0 back.
    assert usage in (None, Usage()) if (dialect, stream) != ("anthropic", True) else usage == Usage(input_tokens=0)


# --- what was not asked for ---------------------------------------------------------------------

SILENT: list[tuple[str, dict[str, Any]]] = [
    ("anthropic", {"thinking": {"type": "disabled"}}),
    ("anthropic", {"thinking": None}),
    ("anthropic", {"thinking": {"type": "adaptive", "display": "omitted"}}),
    ("gemini", {"generationConfig": {"thinkingConfig": {"thinkingBudget": 100}}}),
    ("gemini", {"generationConfig": {}}),
    ("ollama", {"think": False}),
    ("openai_responses", {"store": True}),
    ("openai_responses", {"store": None, "reasoning": {"summary": "auto"}}),
    ("openai_responses", {"include": ["reasoning.encrypted_content"]}),
]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("dialect", "more"), SILENT)
def test_reasoning_that_was_not_asked_for_is_not_told(dialect: str, more: dict[str, Any], stream: bool):
    said = [TextDelta("a"), ReasoningDelta("secret"), TextDelta("b")]
    body = write(writer(dialect, stream=stream, **more), said)
    assert b"secret" not in body
    response = feed(by_name(dialect), body) if stream else by_name(dialect).parse_response(body)
    assert response.message is not None
    assert response.message.parts == (Text("ab"),)


@pytest.mark.parametrize("dialect", ["openai_chat", "ollama"])
def test_other_forms_tell_it_unasked(dialect: str):
    path, body = BODIES[dialect]
    bare = {k: v for k, v in body.items() if k in ("model", "messages")}
    asked = by_name(dialect).parse_request(json.dumps(bare).encode(), path)
    to = answer_writer(dialect, asked, model="m", response_id="r", created=0.0, stream=True)
    assert b"thought" in to.feed(ReasoningDelta("thought"))


def test_a_chat_stream_counts_only_where_it_is_asked_to():
    asked, not_asked = writer("openai_chat", stream=True), writer("openai_chat", stream=True, stream_options=None)
    assert b'"usage":{"prompt_tokens":10' in write(asked, [])
    assert b"usage" not in write(not_asked, [])


# --- what can't be said -------------------------------------------------------------------------


@pytest.mark.parametrize(("dialect", "stream"), [("anthropic", False), ("gemini", False), ("gemini", True), ("ollama", True)])
def test_arguments_that_are_no_object_are_refused_where_an_object_is_carried(dialect: str, stream: bool):
    with pytest.raises(WireError, match=r"^arguments of read is "):
        write(writer(dialect, stream=stream), [Call("read", "[1", "call_1")])


class _ReadsOnly:
    name = "reads_only"


def test_a_dialect_that_can_only_read_says_so(monkeypatch: pytest.MonkeyPatch):
    from metaclaw_core import wire

    known = wire.load(wire.BUILT_IN)
    monkeypatch.setattr(wire, "dialects", lambda: (*known, _ReadsOnly()))
    words = r"^dialect 'reads_only' can read requests but not answer them; its package has no `answers`$"
    with pytest.raises(WireError, match=words):
        error_body("reads_only", 400, "no", "invalid_request_error")


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_error_in_the_middle_of_a_stream_keeps_what_was_said(dialect: str):
    to = writer(dialect, stream=True)
    body = to.start() + to.feed(TextDelta("Hel")) + to.feed(TextDelta("lo")) + to.fail("The sampler is gone.")
    response = feed(by_name(dialect), body)
    assert response.error is not None
    assert response.error.message == "The sampler is gone."
    assert response.message is not None
    assert response.message.text == "Hello"
    assert response.complete is (dialect == "openai_responses")  # its response.failed is a last word


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_failure_before_a_whole_answer_is_an_error_body(dialect: str):
    to = writer(dialect, stream=False)
    to.feed(TextDelta("Hel"))
    assert by_name(dialect).parse_error(to.fail("The sampler is gone.")).message == "The sampler is gone."


ERRORS = {
    "openai_chat": {"error": {"message": "Busy.", "type": "server_error", "param": None, "code": "unready"}},
    "openai_responses": {"error": {"message": "Busy.", "type": "server_error", "param": None, "code": "unready"}},
    "anthropic": {"type": "error", "error": {"type": "overloaded_error", "message": "Busy."}},
    "gemini": {"error": {"code": 503, "message": "Busy.", "status": "UNAVAILABLE"}},
    "ollama": {"error": "Busy."},
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_error_has_the_shape_of_its_dialect(dialect: str):
    assert json.loads(error_body(dialect, 503, "Busy.", "server_error", "unready")) == ERRORS[dialect]


@pytest.mark.parametrize(
    ("status", "anthropic", "gemini"),
    [
        (400, "invalid_request_error", "INVALID_ARGUMENT"),
        (401, "authentication_error", "UNAUTHENTICATED"),
        (422, "invalid_request_error", "INVALID_ARGUMENT"),
        (429, "rate_limit_error", "RESOURCE_EXHAUSTED"),
        (500, "api_error", "INTERNAL"),
        (502, "api_error", "INTERNAL"),
    ],
)
def test_a_status_has_its_word(status: int, anthropic: str, gemini: str):
    assert json.loads(error_body("anthropic", status, "m", "k"))["error"]["type"] == anthropic
    assert json.loads(error_body("gemini", status, "m", "k"))["error"]["status"] == gemini
