from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from json_fuzz import feed, identity, recorded, refusal

from metaclaw_core.errors import WireError
from metaclaw_core.model import (
    ApiError,
    Message,
    Opaque,
    Reasoning,
    Response,
    Role,
    StopReason,
    Text,
    Tool,
    ToolCall,
    ToolResult,
    Usage,
)
from metaclaw_core.wire.anthropic import ANTHROPIC
from metaclaw_core.wire.splice import insert

CACHE = {"cache_control": {"type": "ephemeral"}}
PATH = "/v1/messages?beta=true"
BODY: dict[str, Any] = {
    "model": "claude-opus-4-6",
    "messages": [
        {"role": "user", "content": "Hello"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "He greets.", "signature": "c2ln"},
                {"type": "redacted_thinking", "data": "ZGF0YQ=="},
                {"type": "text", "text": "Reading."},
                {"type": "tool_use", "id": "toolu_1", "name": "read", "input": {"path": "n.txt", "é": 1}},
                {"type": "tool_use", "id": "toolu_2", "name": "now", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "milk\n", "is_error": False, **CACHE},
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_2",
                    "is_error": True,
                    "content": [
                        {"type": "text", "text": "no"},
                        {"type": "image", "source": {"type": "base64"}},
                        {"type": "text", "text": "clock"},
                    ],
                },
                {"type": "text", "text": "And now?", **CACHE},
                {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}},
            ],
        },
        {"role": "user", "content": [{"type": "text", "text": "<<<carrier>>>"}]},
    ],
    "max_tokens": 32000,
    "stream": True,
    "system": [{"type": "text", "text": "STABLE", **CACHE}, {"type": "text", "text": "DYNAMIC"}],
    "tools": [
        {"name": "read", "description": "Read a file", "input_schema": {"type": "object"}},
        {"type": "web_search_20250305", "name": "web_search"},
    ],
    "thinking": {"type": "adaptive"},
    "output_config": {"effort": "high"},
    "tool_choice": {"type": "auto"},
    "metadata": {"user_id": "u"},
    "context_management": {"edits": []},
    "service_tier": "standard_only",
}
ANSWER: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-opus-4-6",
    "content": [
        {"type": "thinking", "thinking": "He greets.", "signature": "c2ln"},
        {"type": "text", "text": "Reading.", "citations": None},
        {"type": "tool_use", "id": "toolu_1", "name": "read", "input": {"path": "n.txt"}},
    ],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": {
        "input_tokens": 10,
        "cache_creation_input_tokens": 200,
        "cache_read_input_tokens": 3000,
        "output_tokens": 42,
        "service_tier": "standard",
    },
}


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def sse(*events: dict[str, Any]) -> bytes:
    return b"".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in events)


def start(index: int, **block: Any) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def delta(index: int, kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **fields}}


def stop(index: int) -> dict[str, Any]:
    return {"type": "content_block_stop", "index": index}


BEGIN = {
    "type": "message_start",
    "message": {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-opus-4-6",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": 10,
            "cache_creation_input_tokens": 200,
            "cache_read_input_tokens": 3000,
            "output_tokens": 1,
        },
    },
}
END = [
    {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use", "stop_sequence": None},
        "usage": {"output_tokens": 42, "service_tier": "standard"},
    },
    {"type": "message_stop"},
]
EVENTS = [
    BEGIN,
    start(0, type="thinking", thinking="", signature=""),
    {"type": "ping"},
    delta(0, "thinking_delta", thinking="He "),
    delta(0, "thinking_delta", thinking="greets."),
    delta(0, "signature_delta", signature="c2ln"),
    stop(0),
    start(1, type="text", text=""),
    delta(1, "text_delta", text="Read"),
    delta(1, "text_delta", text="ing."),
    stop(1),
    start(2, type="tool_use", id="toolu_1", name="read", input={}),
    delta(2, "input_json_delta", partial_json=""),
    delta(2, "input_json_delta", partial_json='{"path": '),
    delta(2, "input_json_delta", partial_json='"n.txt"}'),
    stop(2),
    *END,
]


# --- route --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages?beta=true", "/api/anthropic/v1/messages"])
def test_it_answers_messages_under_any_base_path(path: str) -> None:
    route = ANTHROPIC.route("POST", path)
    assert route is not None
    assert (route.dialect, route.model, route.stream) == ("anthropic", None, None)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/messages"),
        ("POST", "/v1/messages/count_tokens"),
        ("POST", "/v1/messages/batches"),
        ("POST", "/v1/models?next=/v1/messages"),
        ("POST", "/v1/chat/completions"),
    ],
)
def test_it_leaves_other_calls_alone(method: str, path: str) -> None:
    assert ANTHROPIC.route(method, path) is None


# --- requests -----------------------------------------------------------------------------------


def test_a_request_becomes_messages_in_wire_order() -> None:
    request = ANTHROPIC.parse_request(dump(BODY), PATH)
    assert request.messages == (
        Message(Role.SYSTEM, (Text("STABLE", CACHE), Text("DYNAMIC"))),
        Message(Role.USER, (Text("Hello"),)),
        Message(
            Role.ASSISTANT,
            (
                Reasoning("He greets.", {"signature": "c2ln"}),
                Reasoning("", {"type": "redacted_thinking", "data": "ZGF0YQ=="}),
                Text("Reading."),
                ToolCall("read", '{"path":"n.txt","\\u00e9":1}', "toolu_1"),
                ToolCall("now", "{}", "toolu_2"),
            ),
        ),
        Message(Role.TOOL, (ToolResult("milk\n", "toolu_1", is_error=False, extra=CACHE),)),
        Message(
            Role.TOOL,
            (
                ToolResult(
                    "no\nclock",
                    "toolu_2",
                    is_error=True,
                    extra={"blocks": [{"type": "image", "source": {"type": "base64"}}]},
                ),
            ),
        ),
        Message(
            Role.USER,
            (
                Text("And now?", CACHE),
                Opaque("image", {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}),
            ),
        ),
        Message(Role.USER, (Text("<<<carrier>>>"),)),
    )
    assert request.system == "STABLE\nDYNAMIC"


def test_a_request_keeps_every_field_somewhere() -> None:
    request = ANTHROPIC.parse_request(dump(BODY), PATH)
    assert (request.dialect, request.model, request.stream) == ("anthropic", "claude-opus-4-6", True)
    assert request.sampling == {
        "max_tokens": 32000,
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "high"},
        "tool_choice": {"type": "auto"},
    }
    assert request.tools == (
        Tool("read", "Read a file", {"name": "read", "description": "Read a file", "input_schema": {"type": "object"}}),
        Tool("web_search", None, {"type": "web_search_20250305", "name": "web_search"}),
    )
    assert request.metadata == {"user_id": "u"}
    assert request.extra == {"context_management": {"edits": []}, "service_tier": "standard_only"}


def test_a_small_request_has_no_system_no_tools_and_no_stream() -> None:
    body = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}], "system": None}
    request = ANTHROPIC.parse_request(dump(body), PATH)
    assert request.messages == (Message(Role.USER, (Text("Hi"),)),)
    assert (request.system, request.stream, request.tools) == (None, False, ())


def test_a_system_string_and_system_blocks_are_the_same_message() -> None:
    for system in ("Be brief.", [{"type": "text", "text": "Be brief."}]):
        request = ANTHROPIC.parse_request(dump({"model": "m", "messages": [], "system": system}), PATH)
        assert request.messages == (Message(Role.SYSTEM, (Text("Be brief."),)),)


def test_words_before_a_tool_result_stay_before_it() -> None:
    content = [
        {"type": "text", "text": "look:"},
        {"type": "tool_result", "tool_use_id": "t"},
        {"type": "text", "text": "ok"},
    ]
    request = ANTHROPIC.parse_request(dump({"messages": [{"role": "user", "content": content, "id": 7}]}), PATH)
    assert request.messages == (
        Message(Role.USER, (Text("look:"), Text("ok")), {"id": 7}),
        Message(Role.TOOL, (ToolResult("", "t"),)),
    )


def test_server_tools_and_unknown_blocks_are_kept_as_they_are() -> None:
    blocks = [
        {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "x"}},
        {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []},
        {"type": "from_the_future", "n": 1},
    ]
    request = ANTHROPIC.parse_request(dump({"messages": [{"role": "assistant", "content": blocks}]}), PATH)
    assert request.messages[0].parts == tuple(Opaque(b["type"], b) for b in blocks)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"[]", "request body is JSON, but list and not an object"),
        (b"{", "request body is not JSON: Expecting property name enclosed in double quotes at 1"),
        (b"{}", "body.messages is missing"),
        (b'{"messages":{}}', "body.messages is dict, not a list"),
        (b'{"messages":[1]}', "messages[0] is int, not an object"),
        (b'{"messages":[{"role":"user"}]}', "messages[0].content is missing"),
        (
            b'{"messages":[{"role":"robot","content":""}]}',
            "messages[0].role is 'robot'; known are user, assistant and system",
        ),
        (
            b'{"messages":[{"role":"user","content":[{"type":"text"}]}]}',
            "messages[0].content[0].text is missing",
        ),
        (b'{"messages":[],"stream":"yes"}', "body.stream is str, not true or false"),
        (b'{"messages":[],"system":3}', "system is int, neither a string nor a list"),
    ],
)
def test_a_body_that_is_not_ours_says_where_it_is_wrong(body: bytes, sentence: str) -> None:
    with pytest.raises(WireError) as e:
        ANTHROPIC.parse_request(body, PATH)
    assert str(e.value) == sentence


# --- JSON answers -------------------------------------------------------------------------------


def test_a_json_answer_is_read_whole() -> None:
    assert ANTHROPIC.parse_response(dump(ANSWER)) == Response(
        message=Message(
            Role.ASSISTANT,
            (
                Reasoning("He greets.", {"signature": "c2ln"}),
                Text("Reading."),
                ToolCall("read", '{"path":"n.txt"}', "toolu_1"),
            ),
        ),
        complete=True,
        id="msg_1",
        model="claude-opus-4-6",
        stop_reason=StopReason.TOOL_CALLS,
        raw_stop_reason="tool_use",
        usage=Usage(input_tokens=3210, output_tokens=42, cached_tokens=3000, cache_write_tokens=200),
        extra={"usage": {"service_tier": "standard"}},
    )


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("end_turn", StopReason.STOP),
        ("stop_sequence", StopReason.STOP),
        ("tool_use", StopReason.TOOL_CALLS),
        ("max_tokens", StopReason.LENGTH),
        ("model_context_window_exceeded", StopReason.LENGTH),
        ("refusal", StopReason.CONTENT_FILTER),
        ("pause_turn", StopReason.OTHER),
        ("from_the_future", StopReason.OTHER),
        (None, None),
    ],
)
def test_stop_reasons_are_normalised_and_the_word_kept(word: str | None, reason: StopReason | None) -> None:
    response = ANTHROPIC.parse_response(dump({**ANSWER, "stop_reason": word}))
    assert (response.stop_reason, response.raw_stop_reason) == (reason, word)


def test_counts_that_are_missing_or_broken_stay_unknown() -> None:
    response = ANTHROPIC.parse_response(dump({**ANSWER, "usage": {"input_tokens": "many", "output_tokens": 3}}))
    assert response.usage == Usage(output_tokens=3)
    assert ANTHROPIC.parse_response(dump({**ANSWER, "usage": None})).usage is None


# --- streams ------------------------------------------------------------------------------------


def test_a_stream_gives_the_same_answer_as_json_but_keeps_the_emitted_arguments() -> None:
    response = feed(ANTHROPIC, sse(*EVENTS))
    assert response == Response(
        message=Message(
            Role.ASSISTANT,
            (
                Reasoning("He greets.", {"signature": "c2ln"}),
                Text("Reading."),
                ToolCall("read", '{"path": "n.txt"}', "toolu_1"),
            ),
        ),
        complete=True,
        id="msg_1",
        model="claude-opus-4-6",
        stop_reason=StopReason.TOOL_CALLS,
        raw_stop_reason="tool_use",
        usage=Usage(input_tokens=3210, output_tokens=42, cached_tokens=3000, cache_write_tokens=200),
        extra={"usage": {"service_tier": "standard"}},
    )


def test_byte_by_byte_gives_the_same_answer() -> None:
    data = sse(*EVENTS)
    assert feed(ANTHROPIC, *(data[i : i + 1] for i in range(len(data)))) == feed(ANTHROPIC, data)


@given(st.integers(0, len(sse(*EVENTS))))
def test_a_cut_stream_gives_its_prefix(length: int) -> None:
    response = feed(ANTHROPIC, sse(*EVENTS)[:length])
    texts = response.message.text if response.message else ""
    assert "Reading.".startswith(texts)
    assert not response.complete or response.usage == Usage(3210, 42, 3000, 200)


def test_a_stream_cut_in_a_call_keeps_what_was_emitted_and_claims_no_counts() -> None:
    response = feed(ANTHROPIC, sse(*EVENTS[:14]))
    assert response.message is not None
    assert response.message.tool_calls == (ToolCall("read", '{"path": ', "toolu_1"),)
    assert (response.complete, response.stop_reason) == (False, None)
    assert response.usage == Usage(input_tokens=3210, cached_tokens=3000, cache_write_tokens=200)


def test_a_stream_that_brought_no_block_has_no_message() -> None:
    assert feed(ANTHROPIC).message is None
    assert feed(ANTHROPIC, sse(BEGIN)).message is None
    assert feed(ANTHROPIC, sse(BEGIN)).id == "msg_1"


def test_an_empty_but_finished_answer_is_an_empty_message() -> None:
    end = [{"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}}, END[1]]
    response = feed(ANTHROPIC, sse(BEGIN, start(0, type="text", text=""), stop(0), *end))
    assert response.message == Message(Role.ASSISTANT, ())
    assert response.complete


def test_a_call_without_arguments_is_an_empty_object_only_when_it_ended() -> None:
    call = start(0, type="tool_use", id="toolu_1", name="now", input={})
    ended, cut = feed(ANTHROPIC, sse(BEGIN, call, stop(0))), feed(ANTHROPIC, sse(BEGIN, call))
    assert ended.message is not None
    assert cut.message is not None
    assert ended.message.tool_calls == (ToolCall("now", "{}", "toolu_1"),)
    assert cut.message.tool_calls == (ToolCall("now", "", "toolu_1"),)


def test_arguments_that_came_with_the_start_are_used() -> None:
    call = start(0, type="tool_use", id="toolu_1", name="read", input={"path": "a"})
    response = feed(ANTHROPIC, sse(BEGIN, call, stop(0), *END))
    assert response.message is not None
    assert response.message.tool_calls[0].arguments == '{"path":"a"}'


def test_broken_arguments_are_kept_as_emitted() -> None:
    call = [
        start(0, type="tool_use", id="toolu_1", name="read", input={}),
        delta(0, "input_json_delta", partial_json='{"path": "a'),
        stop(0),
    ]
    response = feed(ANTHROPIC, sse(BEGIN, *call, *END))
    assert response.message is not None
    assert response.message.tool_calls[0].arguments == '{"path": "a'


def test_a_server_tool_is_rebuilt_as_it_would_be_in_json() -> None:
    events = [
        start(0, type="server_tool_use", id="srvtoolu_1", name="web_search", input={}),
        delta(0, "input_json_delta", partial_json='{"query": "x"}'),
        stop(0),
        start(1, type="text", text="", citations=[]),
        delta(1, "citations_delta", citation={"url": "https://example.com"}),
        delta(1, "text_delta", text="Found."),
        stop(1),
        start(2, type="compaction", content=None),
        delta(2, "compaction_delta", content="Summary"),
        stop(2),
    ]
    response = feed(ANTHROPIC, sse(BEGIN, *events, *END))
    blocks = [
        {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "x"}},
        {"type": "text", "text": "Found.", "citations": [{"url": "https://example.com"}]},
        {"type": "compaction", "content": "Summary"},
    ]
    assert response.message == ANTHROPIC.parse_response(dump({**ANSWER, "content": blocks})).message


def test_a_repeated_block_index_opens_a_new_block() -> None:
    events = [
        start(0, type="text", text="a"),
        stop(0),
        start(0, type="text", text="b"),
        delta(0, "text_delta", text="c"),
    ]
    response = feed(ANTHROPIC, sse(BEGIN, *events, *END))
    assert response.message == Message(Role.ASSISTANT, (Text("a"), Text("bc")))


def test_later_counts_replace_earlier_ones_and_null_does_not() -> None:
    changes = [
        {"type": "message_delta", "delta": {}, "usage": {"input_tokens": 12, "output_tokens": 5}},
        {"type": "message_delta", "delta": {}, "usage": {"input_tokens": None, "output_tokens": 9}},
    ]
    assert feed(ANTHROPIC, sse(BEGIN, *changes)).usage == Usage(3212, 9, 3000, 200)


def test_an_error_inside_a_stream_is_reported_with_what_had_arrived() -> None:
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    response = feed(ANTHROPIC, sse(BEGIN, start(0, type="text", text=""), delta(0, "text_delta", text="Hi"), error))
    assert response.message == Message(Role.ASSISTANT, (Text("Hi"),))
    assert response.complete is False
    assert response.error == ApiError("Overloaded", "overloaded_error", raw=error)


def test_deep_nesting_is_refused_or_skipped() -> None:
    deep = b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with pytest.raises(WireError):
        ANTHROPIC.parse_request(deep, PATH)
    assert feed(ANTHROPIC, b"data: " + deep + b"\n\n").message is None


@pytest.mark.parametrize("depth", [100, 500, 900, 2000, 8000, 20_000])
def test_arguments_of_any_depth_are_kept_or_refused(depth: int) -> None:
    nested = '{"a":' * depth + "1" + "}" * depth
    body = '{"messages":[{"role":"assistant","content":[{"type":"tool_use","name":"x","input":' + nested + "}]}]}"
    sentence = refusal(lambda: ANTHROPIC.parse_request(body.encode(), PATH))
    assert sentence in (None, "request body is nested too deeply")
    if sentence is None:
        calls = ANTHROPIC.parse_request(body.encode(), PATH).messages[0].tool_calls
        assert calls == (ToolCall("x", nested),)


# --- a reply and its replay ---------------------------------------------------------------------


def test_a_reply_equals_its_replay() -> None:
    replay = ANTHROPIC.parse_request(dump({"messages": [{"role": "assistant", "content": ANSWER["content"]}]}), PATH)
    assert replay.messages[0] == ANTHROPIC.parse_response(dump(ANSWER)).message
    assert identity(replay.messages[0]) == identity(feed(ANTHROPIC, sse(*EVENTS)).message)


# --- errors and the slot ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message", "kind"),
    [
        (
            b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"},"request_id":"req_1"}',
            "Overloaded",
            "overloaded_error",
        ),
        (b'{"error":{"message":5}}', "", None),
        (b'{"error":"no credit"}', "no credit", None),
        (b"<h1>502</h1>\n", "<h1>502</h1>", None),
        (b'{"detail":"x"}', '{"detail":"x"}', None),
        (b"", "", None),
        (b"x" * 5000, "x" * 2000, None),
    ],
)
def test_an_error_body_gives_its_message(body: bytes, message: str, kind: str | None) -> None:
    error = ANTHROPIC.parse_error(body)
    assert (error.message, error.type) == (message, kind)


def test_an_error_with_status_200_is_an_answer_without_a_message() -> None:
    response = ANTHROPIC.parse_response(b'{"type":"error","error":{"type":"api_error","message":"Oops"}}')
    assert response.message is None
    assert response.error is not None
    assert (response.error.message, response.error.type) == ("Oops", "api_error")


def test_text_put_into_the_slot_ends_the_system_prompt() -> None:
    body = dump(BODY)
    system = ANTHROPIC.parse_request(insert(body, ANTHROPIC.system_slot(body), "SKILLS"), PATH).system
    assert system is not None
    assert system.startswith("STABLE\nDYNAMIC")
    assert "SKILLS" in system


# --- the real thing -----------------------------------------------------------------------------


@pytest.mark.shared
def test_a_recorded_session_is_read_call_for_call(shared: Path) -> None:
    flows = recorded(shared / "captures" / "anthropic-messages-native.mitm")
    requests = [ANTHROPIC.parse_request(f.request.content or b"", f.request.path) for f in flows]
    answers = [feed(ANTHROPIC, f.response.content or b"") for f in flows if f.response]
    assert [[m.role.value for m in r.messages] for r in requests[:3]] == [
        ["system", "user", "user"],
        ["system", "user", "assistant", "user", "user"],
        ["system", "user", "assistant", "user", "assistant", "tool", "user"],
    ]
    assert {(r.model, r.stream, len(r.tools)) for r in requests} == {("claude-opus-4-6", True, len(requests[0].tools))}
    assert sorted(requests[0].sampling) == ["max_tokens", "output_config", "thinking"]
    assert sorted(requests[0].extra) == ["context_management", "service_tier"]
    assert requests[0].system is not None
    assert requests[0].system.startswith("<!-- openclaw:attempt:STABLE -->")
    assert requests[2].messages[-2].tool_results[0].text == "remember the milk\n"
    assert answers[0].message == Message(
        Role.ASSISTANT, (Text("ok: -23 20:38 UTC] Hello, please introduce yourself in one line."),)
    )
    assert answers[0].usage == Usage(input_tokens=14849, output_tokens=12, cached_tokens=0, cache_write_tokens=0)
    assert [a.stop_reason for a in answers[:3]] == [StopReason.STOP, StopReason.TOOL_CALLS, StopReason.STOP]
    assert all(a.complete for a in answers)


@pytest.mark.shared
def test_recorded_replies_equal_their_replays(shared: Path) -> None:
    flows = recorded(shared / "captures" / "anthropic-messages-native.mitm")
    replies = [identity(feed(ANTHROPIC, f.response.content or b"").message) for f in flows[:-1] if f.response]
    last = ANTHROPIC.parse_request(flows[-1].request.content or b"", flows[-1].request.path)
    assert [identity(m) for m in last.messages if m.role is Role.ASSISTANT] == replies
