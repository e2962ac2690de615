from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_fuzz import feed, json_values, mutated, recorded
from json_fuzz import refusal as refused

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
from metaclaw_core.wire.base import Route
from metaclaw_core.wire.openai_chat import OPENAI_CHAT

REQUEST: dict[str, Any] = {
    "model": "fake-1",
    "messages": [
        {"role": "system", "content": "You are a personal assistant."},
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        },
        {"role": "user", "content": "[Mon 2026-11-23 20:38 UTC] Read my notes.", "name": "ann"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "I need the file.",
            "tool_calls": [
                {
                    "id": "call6704",
                    "type": "function",
                    "function": {"name": "read", "arguments": '{"path":  "notes.txt"}'},
                }
            ],
        },
        {"role": "tool", "content": "milk, eggs", "tool_call_id": "call6704"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
            ],
        },
    ],
    "stream": True,
    "stream_options": {"include_usage": True},
    "tools": [
        {
            "type": "function",
            "function": {"name": "read", "description": "Read a file", "parameters": {"type": "object"}},
        }
    ],
    "tool_choice": "auto",
    "max_completion_tokens": 8192,
    "temperature": 0.7,
    "metadata": {"k": "v"},
    "store": False,
}

ANSWER: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1795466308,
    "model": "fake-1",
    "system_fingerprint": "fp_fake",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "Let me look.",
                "refusal": None,
                "reasoning_content": "The file first.",
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "read", "arguments": '{"path": "notes.txt"}'},
                    },
                    {"id": "call_2", "type": "function", "function": {"name": "ls", "arguments": "{}"}},
                ],
            },
            "finish_reason": "tool_calls",
        }
    ],
    "usage": {
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "total_tokens": 120,
        "prompt_tokens_details": {"cached_tokens": 64},
        "completion_tokens_details": {"reasoning_tokens": 7},
    },
}

HEAD = {k: ANSWER[k] for k in ("id", "created", "model", "system_fingerprint")} | {"object": "chat.completion.chunk"}


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    return HEAD | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]} | more


def call(index: int | None, arguments: str, **more: Any) -> dict[str, Any]:
    place = {} if index is None else {"index": index}
    function = {"arguments": arguments} | ({"name": more.pop("name")} if "name" in more else {})
    return {"tool_calls": [{**place, **more, "function": function}]}


CHUNKS = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"reasoning_content": "The file"}),
    chunk({"reasoning_content": " first."}),
    chunk({"content": "Let me"}),
    chunk({"content": " look."}),
    chunk(call(0, "", id="call_1", type="function", name="read")),
    chunk(call(0, '{"path": "no')),
    chunk(call(0, 'tes.txt"}')),
    chunk(call(1, "{}", id="call_2", type="function", name="ls")),
    chunk({}, "tool_calls"),
    HEAD | {"choices": [], "usage": ANSWER["usage"]},
]


def sse(*events: Any, done: bool = True) -> bytes:
    lines = [e if isinstance(e, str) else json.dumps(e) for e in events] + (["[DONE]"] if done else [])
    return "".join(f"data: {line}\n\n" for line in lines).encode()


def stream(*chunks: bytes) -> Response:
    return feed(OPENAI_CHAT, *chunks)


def streamed_calls(*deltas: dict[str, Any]) -> list[tuple[str | None, str, str]]:
    message = stream(sse(*map(chunk, deltas))).message
    assert message is not None
    return [(c.id, c.name, c.arguments) for c in message.tool_calls]


def parse(body: Any) -> Any:
    return OPENAI_CHAT.parse_request(json.dumps(body).encode(), "/v1/chat/completions")


def one(message: dict[str, Any]) -> Message:
    return parse({"model": "m", "messages": [message]}).messages[0]


# --- routes -------------------------------------------------------------------------------------


def test_azure_names_the_model_in_the_url():
    path = "/openai/deployments/my-gpt/chat/completions?api-version=2024-10-21"
    assert OPENAI_CHAT.route("POST", path) == Route("openai_chat", model="my-gpt")
    assert OPENAI_CHAT.parse_request(b'{"messages":[]}', path).model == "my-gpt"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions/chatcmpl-1", "/v1/chat?x=/chat/completions"])
def test_a_path_that_only_resembles_is_not_ours(path: str):
    assert OPENAI_CHAT.route("POST", path) is None


def test_reading_stored_completions_is_no_generation():
    assert OPENAI_CHAT.route("GET", "/v1/chat/completions") is None


# --- requests -----------------------------------------------------------------------------------


def test_a_request_is_read_whole():
    request = parse(REQUEST)
    assert request.messages == (
        Message(Role.SYSTEM, (Text("You are a personal assistant."),)),
        Message(Role.DEVELOPER, (Text("Be brief.", {"cache_control": {"type": "ephemeral"}}),)),
        Message(Role.USER, (Text("[Mon 2026-11-23 20:38 UTC] Read my notes."),), {"name": "ann"}),
        Message(
            Role.ASSISTANT, (Reasoning("I need the file."), ToolCall("read", '{"path":  "notes.txt"}', "call6704"))
        ),
        Message(Role.TOOL, (ToolResult("milk, eggs", "call6704"),)),
        Message(
            Role.USER,
            (
                Text("<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>"),
                Opaque("image_url", {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}),
            ),
        ),
    )
    assert (request.dialect, request.model, request.stream) == ("openai_chat", "fake-1", True)
    assert request.system == "You are a personal assistant.\n\nBe brief."
    assert request.tools == (Tool("read", "Read a file", REQUEST["tools"][0]),)
    assert request.sampling == {"tool_choice": "auto", "max_completion_tokens": 8192, "temperature": 0.7}
    assert request.metadata == {"k": "v"}
    assert request.extra == {"stream_options": {"include_usage": True}, "store": False}
    assert request.previous_response_id is None


def test_an_empty_string_and_null_are_the_same_content():
    assert one({"role": "assistant", "content": ""}) == one({"role": "assistant", "content": None})
    assert one({"role": "user", "content": ""}).parts == ()


def test_a_tool_result_in_blocks_keeps_its_text_and_what_is_more_than_text():
    image = {"type": "image_url", "image_url": {"url": "x"}}
    content = [{"type": "text", "text": "a"}, image, {"type": "text", "text": "b"}]
    result = one({"role": "tool", "tool_call_id": "c", "name": "shot", "content": content})
    assert result.parts == (ToolResult("a\nb", "c", "shot", extra={"blocks": [image]}),)


def test_legacy_functions_are_calls_results_and_tools():
    request = parse(
        {
            "messages": [
                {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                {"role": "function", "name": "f", "content": "1"},
            ],
            "functions": [{"name": "f", "description": "d", "parameters": {}}],
        }
    )
    assert request.messages == (
        Message(Role.ASSISTANT, (ToolCall("f", "{}", extra={"type": "function_call"}),)),
        Message(Role.TOOL, (ToolResult("1", name="f"),)),
    )
    assert request.tools == (Tool("f", "d", {"name": "f", "description": "d", "parameters": {}}),)


def test_custom_tools_and_their_calls_keep_free_text():
    custom = {"type": "custom", "custom": {"name": "patch", "description": "d"}}
    raw = {"id": "c", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"}}
    request = parse(
        {"messages": [{"role": "assistant", "tool_calls": [raw]}], "tools": [custom, {"type": "web_search"}]}
    )
    assert request.messages[0].parts == (ToolCall("patch", "*** Begin", "c", {"type": "custom"}),)
    assert request.tools == (Tool("patch", "d", custom), Tool("", None, {"type": "web_search"}))


def test_arguments_sent_as_an_object_are_compact_json_and_unknown_fields_stay():
    signed = {"google": {"thought_signature": "s"}}
    raw = {"id": "", "function": {"name": "f", "arguments": {"b": 1, "a": "é"}}, "extra_content": signed}
    expected = ToolCall("f", '{"b":1,"a":"\\u00e9"}', None, {"extra_content": signed})
    assert one({"role": "assistant", "tool_calls": [raw]}).parts == (expected,)


@pytest.mark.parametrize(
    ("fields", "part", "extra"),
    [
        ({"reasoning": "r"}, Reasoning("r"), {}),
        ({"reasoning_content": "r", "reasoning": "r"}, Reasoning("r"), {}),
        ({"reasoning_content": "r", "reasoning": "s"}, Reasoning("r"), {"reasoning": "s"}),
        ({"reasoning": None, "reasoning_details": [{"data": "x"}]}, Reasoning("", [{"data": "x"}]), {}),
        ({"reasoning_text": "r", "reasoning_opaque": "o"}, Reasoning("r", "o"), {}),
    ],
)
def test_reasoning_is_found_under_each_servers_name(fields: dict[str, Any], part: Reasoning, extra: dict[str, Any]):
    assert one({"role": "assistant", "content": "a", **fields}) == Message(Role.ASSISTANT, (part, Text("a")), extra)


def test_reasoning_of_an_unknown_shape_is_kept_aside():
    assert one({"role": "assistant", "content": "a", "reasoning": {"x": 1}}).extra == {"reasoning": {"x": 1}}


def test_mistrals_thinking_part_is_reasoning():
    thinking = {
        "type": "thinking",
        "thinking": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        "closed": True,
    }
    content = [thinking, {"type": "text", "text": "c"}]
    assert one({"role": "assistant", "content": content}).parts == (Reasoning("ab"), Text("c"))


def test_a_refusal_is_text_that_says_so_in_both_shapes():
    expected = (Text("No.", {"type": "refusal"}),)
    assert one({"role": "assistant", "content": None, "refusal": "No."}).parts == expected
    assert one({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}).parts == expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "body.messages is missing"),
        ({"messages": {}}, "body.messages is dict, not a list"),
        ({"messages": ["x"]}, "messages[0] is str, not an object"),
        ({"messages": [], "model": 3}, "body.model is int, not a string"),
        ({"messages": [], "stream": "yes"}, "body.stream is str, not true or false"),
        ({"messages": [], "tools": {}}, "tools is dict, not a list"),
        ({"messages": [], "metadata": []}, "body.metadata is list, not an object"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content is int, not a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages[0].content[0].text is int, not a string",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function is missing"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}]},
            "messages[0].tool_calls[0].function.arguments is int, not a string",
        ),
        (
            {"messages": [{"role": "narrator"}]},
            "messages[0].role is not one of system, developer, user, assistant, tool, function",
        ),
    ],
)
def test_a_wrong_type_is_an_error_that_names_the_place(body: dict[str, Any], message: str):
    with pytest.raises(WireError) as caught:
        parse(body)
    assert str(caught.value) == message


# --- answers ------------------------------------------------------------------------------------

MESSAGE = Message(
    Role.ASSISTANT,
    (
        Reasoning("The file first."),
        Text("Let me look."),
        ToolCall("read", '{"path": "notes.txt"}', "call_1"),
        ToolCall("ls", "{}", "call_2"),
    ),
)


def test_an_answer_is_read_whole():
    assert OPENAI_CHAT.parse_response(json.dumps(ANSWER).encode()) == Response(
        MESSAGE,
        complete=True,
        id="chatcmpl-1",
        model="fake-1",
        stop_reason=StopReason.TOOL_CALLS,
        raw_stop_reason="tool_calls",
        usage=Usage(input_tokens=100, output_tokens=20, cached_tokens=64, reasoning_tokens=7),
        extra={"created": 1795466308, "system_fingerprint": "fp_fake", "usage": ANSWER["usage"]},
    )


def test_a_stream_gives_the_same_response_as_the_whole_answer():
    assert stream(sse(*CHUNKS)) == OPENAI_CHAT.parse_response(json.dumps(ANSWER).encode())


def test_an_answer_and_its_replay_have_equal_parts():
    replay = copy.deepcopy(ANSWER["choices"][0]["message"]) | {"content": "Let me look."}
    assert one(replay).parts == MESSAGE.parts


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("stop", StopReason.STOP),
        ("length", StopReason.LENGTH),
        ("model_length", StopReason.LENGTH),
        ("content_filter", StopReason.CONTENT_FILTER),
        ("function_call", StopReason.TOOL_CALLS),
        ("error", StopReason.OTHER),
    ],
)
def test_finish_reasons_are_normalised_and_the_word_is_kept(word: str, reason: StopReason):
    response = stream(sse(chunk({"content": "a"}, word)))
    assert (response.stop_reason, response.raw_stop_reason) == (reason, word)


def test_stop_with_a_call_waits_for_the_client_and_stop_with_a_refusal_was_filtered():
    assert stream(sse(chunk(call(0, "{}", id="c", name="f"), "stop"))).stop_reason is StopReason.TOOL_CALLS
    assert stream(sse(chunk({"refusal": "No."}, "stop"))).stop_reason is StopReason.CONTENT_FILTER


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 5, "prompt_cache_hit_tokens": 3}, Usage(input_tokens=5, cached_tokens=3)),
        ({"prompt_tokens": 5, "cached_tokens": 2}, Usage(input_tokens=5, cached_tokens=2)),
        ({"prompt_tokens": "5", "completion_tokens": -1, "prompt_tokens_details": [1]}, None),
        ({"prompt_tokens": 0, "completion_tokens": True}, Usage(input_tokens=0)),
        ({}, None),
    ],
)
def test_what_the_server_did_not_count_is_unknown(usage: dict[str, Any], expected: Usage | None):
    assert OPENAI_CHAT.parse_response(json.dumps(ANSWER | {"usage": usage}).encode()).usage == expected


def test_of_several_choices_the_first_is_the_message_and_the_others_stay_raw():
    second = {"index": 1, "message": {"role": "assistant", "content": "b"}, "finish_reason": "length"}
    first = {"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}
    whole = OPENAI_CHAT.parse_response(json.dumps({"choices": [first, second]}).encode())
    assert whole.message == Message(Role.ASSISTANT, (Text("a"),))
    assert whole.extra == {"choices": [second]}

    pieces = [
        {"index": 1, "delta": {"role": "assistant", "content": "b"}},
        {"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"},
        {"index": 1, "delta": {}, "finish_reason": "length"},
    ]
    assert stream(sse(*({"choices": [p]} for p in pieces))) == whole


def test_logprobs_of_a_stream_are_gathered_into_one_list():
    parts = [
        {"index": 0, "delta": {"content": c}, "logprobs": {"content": [{"token": c}], "refusal": None}}
        for c in ("a", "b")
    ]
    response = stream(sse(*({"choices": [p]} for p in parts)))
    assert response.extra == {"choice": {"logprobs": {"content": [{"token": "a"}, {"token": "b"}], "refusal": None}}}


def test_an_answer_without_choices_is_an_error_or_no_chat_completion():
    response = OPENAI_CHAT.parse_response(b'{"error": {"message": "no", "code": 429}}')
    error = ApiError("no", code="429", raw={"error": {"message": "no", "code": 429}})
    assert response == Response(None, complete=True, error=error)
    with pytest.raises(WireError, match="response body has no choices"):
        OPENAI_CHAT.parse_response(b"{}")


# --- streams ------------------------------------------------------------------------------------


def test_a_cut_stream_gives_its_prefix():
    response = stream(sse(*CHUNKS[:7], done=False)[:-30])
    assert response.complete is False
    assert response.message == Message(
        Role.ASSISTANT, (Reasoning("The file first."), Text("Let me look."), ToolCall("read", "", "call_1"))
    )
    assert (response.stop_reason, response.usage) == (None, None)


def test_a_stream_of_which_nothing_arrived_has_no_message():
    assert stream(b"") == Response(None, complete=False)
    assert stream(b": ping\n\n") == Response(None, complete=False)


@pytest.mark.parametrize(("data", "complete"), [(sse(chunk({}, "stop"), done=False), True), (sse(chunk({})), True)])
def test_a_finish_reason_or_done_completes_a_stream(data: bytes, complete: bool):
    assert stream(data).complete is complete


def test_calls_without_index_are_told_apart_by_their_ids():
    whole = [call(None, "{}", id="a", name="f"), call(None, '{"x":1}', id="b", name="g")]
    assert streamed_calls(*whole) == [("a", "f", "{}"), ("b", "g", '{"x":1}')]


def test_calls_without_index_and_id_are_told_apart_by_their_names():
    pieces = [call(None, "{", name="f"), call(None, "}"), call(None, "{}", name="f")]
    assert streamed_calls(*pieces) == [(None, "f", "{}"), (None, "f", "{}")]


def test_an_id_and_a_name_that_come_again_with_each_delta_count_once():
    pieces = [call(0, "{", id="a", name="f"), call(0, "}", id="a", name="f")]
    assert streamed_calls(*pieces) == [("a", "f", "{}")]
    assert streamed_calls(*[call(None, p, id="a", name="f") for p in ("{", "}")]) == [("a", "f", "{}")]


def test_calls_that_all_have_index_zero_are_told_apart_by_id_and_name():
    assert streamed_calls(call(0, "{}", id="a", name="f"), call(0, "[]", id="b", name="g"), call(0, "!")) == [
        ("a", "f", "{}"),
        ("b", "g", "[]!"),
    ]


def test_an_id_that_changes_without_a_name_is_the_same_call():
    assert streamed_calls(call(0, "{", id="a", name="f"), call(0, "}", id="b")) == [("a", "f", "{}")]


def test_interleaved_calls_go_to_their_index():
    pieces = [call(0, "[", id="a", name="f"), call(1, "{", id="b", name="g"), call(0, "]"), call(1, "}")]
    assert streamed_calls(*pieces) == [("a", "f", "[]"), ("b", "g", "{}")]


def test_a_name_in_pieces_is_joined():
    assert streamed_calls(call(0, "", id="a", name="get_"), call(0, "{}", name="time")) == [("a", "get_time", "{}")]


def test_a_call_that_was_cut_before_its_name_is_no_call():
    assert streamed_calls(call(0, "{}", id="a", name="f"), call(1, "", id="b")) == [("a", "f", "{}")]


def test_a_call_that_turns_out_to_be_custom_is_read_as_one():
    first = {"tool_calls": [{"index": 0, "function": {"name": "f", "input": 5}}]}
    assert streamed_calls(first, {"tool_calls": [{"index": 0, "type": "custom"}]}) == [(None, "f", "")]


def test_a_custom_call_is_streamed_as_free_text():
    first = {"tool_calls": [{"index": 0, "id": "c", "type": "custom", "custom": {"name": "patch", "input": "***"}}]}
    second = {"tool_calls": [{"index": 0, "custom": {"input": " Begin"}}]}
    message = stream(sse(chunk(first), chunk(second))).message
    assert message is not None
    assert message.parts == (ToolCall("patch", "*** Begin", "c", {"type": "custom"}),)


def test_a_legacy_function_call_is_streamed():
    deltas = [{"function_call": {"name": "f", "arguments": ""}}, {"function_call": {"arguments": "{}"}}]
    response = stream(sse(*map(chunk, deltas), chunk({}, "function_call")))
    assert response.message == Message(Role.ASSISTANT, (ToolCall("f", "{}", extra={"type": "function_call"}),))
    assert response.stop_reason is StopReason.TOOL_CALLS


def test_reasoning_details_of_one_index_are_joined():
    def detail(index: int, **more: str) -> dict[str, Any]:
        return {"reasoning_details": [{"type": "reasoning.text", "index": index, **more}]}

    message = stream(
        sse(*map(chunk, [detail(0, text="a"), detail(0, text="b", signature="s"), detail(1, text="c")]))
    ).message
    assert message is not None
    assert message.parts == (
        Reasoning(
            "",
            [
                {"type": "reasoning.text", "index": 0, "text": "ab", "signature": "s"},
                {"type": "reasoning.text", "index": 1, "text": "c"},
            ],
        ),
    )


def test_usage_inside_the_choice_is_found():
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "usage": {"prompt_tokens": 3}}]}
    assert stream(sse(last)).usage == Usage(input_tokens=3)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (sse({"error": {"message": "slow down", "type": "t", "code": "c"}}), ApiError("slow down", "t", "c")),
        (sse({"error": "slow down"}), ApiError("slow down")),
        (b'event: error\ndata: {"message": "slow down", "code": 429}\n\n', ApiError("slow down", code="429")),
        (b"event: error\ndata: slow down\n\n", ApiError("slow down")),
    ],
)
def test_an_error_inside_a_stream_is_reported_beside_what_had_arrived(data: bytes, error: ApiError):
    response = stream(sse(chunk({"content": "par"}), done=False), data)
    assert response.message == Message(Role.ASSISTANT, (Text("par"),))
    assert response.error is not None
    assert (response.error.message, response.error.type, response.error.code) == (error.message, error.type, error.code)


def test_what_a_stream_holds_beside_chunks_is_skipped():
    noise = [
        "",
        "nonsense",
        "[1]",
        "null",
        '{"choices": 1}',
        '{"choices": [1, {"delta": 5}]}',
        '{"choices": [{"index": 0, "delta": {"content": {"a": 1}}}]}',
    ]
    response = stream(sse(*noise, *CHUNKS[3:5]))
    assert response.message == Message(Role.ASSISTANT, (Text("Let me look."),))


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"error": {"message": "m", "type": "t", "code": null}}', ("m", "t", None)),
        (b'{"error": "m"}', ("m", None, None)),
        (b'[{"error": {"code": 400, "message": "m", "status": "S"}}]', ("m", None, "400")),
        (b'{"object": "error", "message": "m", "type": "t", "code": 404}', ("m", "t", "404")),
        (b'{"detail": "m"}', ("m", None, None)),
        (b'{"error": {"code": true}}', ('{"error": {"code": true}}', None, None)),
        (b"<html>Bad gateway</html>", ("<html>Bad gateway</html>", None, None)),
        (b"\xff", ("\ufffd", None, None)),
        (b"", ("", None, None)),
    ],
)
def test_an_error_body_of_any_writer_gives_a_message(body: bytes, expected: tuple[str, str | None, str | None]):
    error = OPENAI_CHAT.parse_error(body)
    assert (error.message, error.type, error.code) == expected


def test_a_long_error_is_cut():
    assert OPENAI_CHAT.parse_error(b"x" * 9000).message == "x" * 2000
    assert OPENAI_CHAT.parse_error(json.dumps({"error": {"message": "x" * 9000}}).encode()).message == "x" * 2000


# --- any input ----------------------------------------------------------------------------------

NAMES = (
    "type",
    "text",
    "refusal",
    "name",
    "id",
    "index",
    "function",
    "custom",
    "arguments",
    "input",
    "content",
    "tool_calls",
)
hinted = st.recursive(
    json_values | st.sampled_from(["text", "refusal", "custom", "thinking", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=8,
)


@given(mutated(REQUEST) | st.dictionaries(st.sampled_from(sorted(REQUEST)), hinted) | hinted)
@settings(max_examples=120)
def test_any_request_is_read_or_a_wire_error(body: Any):
    assert refused(lambda: parse(body)) != ""


@given(st.lists(st.dictionaries(st.sampled_from(["role", *NAMES]), hinted | st.sampled_from(["assistant", "tool"]))))
@settings(max_examples=120)
def test_any_messages_are_read_or_a_wire_error(messages: Any):
    assert refused(lambda: parse({"messages": messages})) != ""


@given(mutated(ANSWER) | st.dictionaries(st.sampled_from(sorted(ANSWER)), hinted) | hinted)
@settings(max_examples=120)
def test_any_answer_is_read_or_a_wire_error(body: Any):
    assert refused(lambda: OPENAI_CHAT.parse_response(json.dumps(body).encode())) != ""


@given(
    mutated(CHUNKS)
    | st.lists(hinted)
    | st.lists(st.dictionaries(st.sampled_from(NAMES), hinted).map(chunk), max_size=4)
)
@settings(max_examples=150)
def test_any_stream_is_read(events: list[Any]):
    stream(sse(*events))


def test_a_deeply_nested_body_is_a_wire_error_and_a_deeply_nested_chunk_is_skipped():
    deep = b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert refused(lambda: OPENAI_CHAT.parse_request(deep, "/chat/completions")) == "request body is nested too deeply"
    assert stream(b"data: " + deep + b"\n\n") == Response(None, complete=False)


# --- recordings ---------------------------------------------------------------------------------


def check_session(flows: list[Any]) -> None:
    requests = [OPENAI_CHAT.parse_request(f.request.content, f.request.path) for f in flows]
    answers = [stream(f.response.content) for f in flows]
    assert [len(r.messages) for r in requests] == [3, 5, 7, 9, 11, 13, 15]
    assert {(r.model, r.stream, len(r.tools), len(r.extra)) for r in requests} == {("fake-1", True, 12, 0)}
    assert all(r.system is not None and r.system.endswith("<!-- /openclaw:attempt:DYNAMIC -->") for r in requests)
    assert all(a.complete and a.error is None and a.message is not None for a in answers)
    stop, calls = StopReason.STOP, StopReason.TOOL_CALLS
    assert [a.stop_reason for a in answers] == [stop, calls, stop, calls, stop, calls, stop]
    read = answers[1].message
    assert read is not None
    assert read.parts == (ToolCall("read", '{"path": "notes.txt"}', "call_67043db282064381"),)
    replayed = requests[6].messages
    # OpenClaw takes the underscore out of the id and the blanks out of the arguments.
    assert replayed[4].parts == (ToolCall("read", '{"path":"notes.txt"}', "call67043db282064381"),)
    # An answer in words comes back as it was.
    assert answers[2].message is not None
    assert replayed[6].parts == answers[2].message.parts


def check_readable(flows: list[Any]) -> list[Response | ApiError]:
    found: list[Response | ApiError] = []
    for flow in flows:
        assert OPENAI_CHAT.route(flow.request.method, flow.request.path) == Route("openai_chat")
        assert OPENAI_CHAT.parse_request(flow.request.content, flow.request.path).messages
        if flow.error is None:
            read = stream if flow.response.status_code < 400 else OPENAI_CHAT.parse_error
            found.append(read(flow.response.content))
    return found


def test_a_recorded_session_is_read_as_it_was_played(capture: Callable[[str], list[Any]]):
    check_session(capture("openai-completions"))


@pytest.mark.shared
def test_the_full_recorded_session_is_read_as_it_was_played(shared: Path):
    check_session(recorded(shared / "captures" / "openai-completions.mitm"))


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "answers"),
    [("compaction", 4), ("errors", 8), ("subagent", 4), ("heartbeat", 1)],
)
def test_every_recorded_exchange_is_read(shared: Path, name: str, answers: int):
    found = check_readable(recorded(shared / "captures" / f"{name}-openai-completions.mitm"))
    assert len(found) == answers
    assert all(r.complete and r.error is None for r in found if isinstance(r, Response))


def test_the_recorded_errors_name_type_and_code(capture: Callable[[str], list[Any]]):
    errors = [e for e in check_readable(capture("errors-openai-completions")) if isinstance(e, ApiError)]
    assert [(e.type, e.code) for e in errors] == [
        ("rate_limit_error", "rate_limit_exceeded"),
        ("server_error", None),
        ("invalid_request_error", "context_length_exceeded"),
    ]


def test_the_recorded_usage_is_read_where_it_was_asked_for(capture: Callable[[str], list[Any]]):
    found = check_readable(capture("env-proxy-loopback-http"))
    assert [r.usage for r in found if isinstance(r, Response)] == [
        Usage(input_tokens=13309, output_tokens=12, cached_tokens=0),
        None,
        None,
    ]
