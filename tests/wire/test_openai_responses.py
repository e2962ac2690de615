from __future__ import annotations

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
    Message,
    Opaque,
    Reasoning,
    Request,
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
from metaclaw_core.wire.openai_responses import OPENAI_RESPONSES

REASONING = {
    "type": "reasoning",
    "id": "rs_1",
    "summary": [{"type": "summary_text", "text": "Look first."}, {"type": "summary_text", "text": "Then say."}],
    "encrypted_content": "gAAAA",
}
SEARCH = {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "eggs"}}
SAID = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "Let me look.", "annotations": []}],
}
CALL = {
    "type": "function_call",
    "id": "fc_1",
    "status": "completed",
    "call_id": "call_1",
    "name": "exec",
    "arguments": '{"code":  "text(1)"}',
}
OUTPUT = [REASONING, SEARCH, SAID, CALL]
PARTS = (
    Reasoning("Look first.\n\nThen say.", opaque="gAAAA"),
    Opaque("web_search_call", SEARCH),
    Text("Let me look."),
    ToolCall("exec", '{"code":  "text(1)"}', "call_1"),
)
STATES = [
    {"type": "reasoning", "id": "rs_1"},
    {"type": "web_search_call"},
    {"type": "message", "id": "msg_1", "status": "completed"},
    {"type": "function_call", "id": "fc_1", "status": "completed"},
]

REQUEST: dict[str, Any] = {
    "model": "gpt-5.5",
    "instructions": "You are a personal assistant.",
    "input": [
        {"type": "message", "role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "[Mon 2026-11-23 20:45 UTC] Read my notes."}]},
        *OUTPUT,
        {"type": "function_call_output", "call_id": "call_1", "output": "milk, eggs"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Milk and eggs."}]},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "And this?"}, {"type": "input_image", "image_url": "data:,"}],
        },
    ],
    "stream": True,
    "store": True,
    "prompt_cache_key": "0c1ded16:0",
    "metadata": {"openclaw_session_id": "0c1ded16"},
    "max_output_tokens": 128000,
    "tools": [
        {"type": "function", "name": "exec", "description": "Run", "strict": False, "parameters": {"type": "object"}},
        {"type": "web_search"},
    ],
    "reasoning": {"effort": "medium", "summary": "auto"},
    "include": ["reasoning.encrypted_content"],
    "text": {"verbosity": "low"},
    "parallel_tool_calls": True,
    "previous_response_id": "resp_0",
}

USAGE = {
    "input_tokens": 13579,
    "output_tokens": 12,
    "total_tokens": 13591,
    "input_tokens_details": {"cached_tokens": 1024},
    "output_tokens_details": {"reasoning_tokens": 5},
}
BEGUN: dict[str, Any] = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1795466744,
    "model": "gpt-5.5",
    "output": [],
}
ANSWER = BEGUN | {"status": "completed", "output": OUTPUT, "usage": USAGE, "instructions": "…", "tools": []}


def text_events(at: dict[str, Any], name: str, text: str, key: str = "text") -> list[dict[str, Any]]:
    pieces = [text[i : i + 5] for i in range(0, len(text), 5)]
    deltas = [{"type": f"response.{name}.delta", **at, "delta": piece} for piece in pieces]
    return [*deltas, {"type": f"response.{name}.done", **at, key: text}]


def item_events(
    index: int, blank: dict[str, Any], item: dict[str, Any], *steps: dict[str, Any]
) -> list[dict[str, Any]]:
    added = {"type": "response.output_item.added", "output_index": index, "item": blank | {"status": "in_progress"}}
    return [added, *steps, {"type": "response.output_item.done", "output_index": index, "item": item}]


EVENTS: list[dict[str, Any]] = [
    {"type": "response.created", "response": BEGUN | {"status": "in_progress", "usage": None}},
    {"type": "response.in_progress", "response": BEGUN | {"status": "in_progress", "usage": None}},
    *item_events(
        0,
        {"type": "reasoning", "id": "rs_1", "summary": []},
        REASONING,
        *text_events(
            {"item_id": "rs_1", "output_index": 0, "summary_index": 0}, "reasoning_summary_text", "Look first."
        ),
        *text_events({"item_id": "rs_1", "output_index": 0, "summary_index": 1}, "reasoning_summary_text", "Then say."),
    ),
    *item_events(1, {"type": "web_search_call", "id": "ws_1"}, SEARCH),
    *item_events(
        2,
        {"type": "message", "id": "msg_1", "role": "assistant", "content": []},
        SAID,
        *text_events({"item_id": "msg_1", "output_index": 2, "content_index": 0}, "output_text", "Let me look."),
    ),
    *item_events(
        3,
        CALL | {"arguments": ""},
        CALL,
        *text_events({"item_id": "fc_1", "output_index": 3}, "function_call_arguments", CALL["arguments"], "arguments"),
    ),
    {"type": "response.completed", "response": ANSWER},
]
COMPLETED = EVENTS[-1]


def sse(*events: Any) -> bytes:
    lines = [e if isinstance(e, str) else json.dumps(e) for e in events]
    names = [e["type"] if isinstance(e, dict) and isinstance(e.get("type"), str) else "message" for e in events]
    blocks = [f"event: {name}\ndata: {line}\n\n" for name, line in zip(names, lines, strict=True)]
    return "".join(blocks).encode("utf-8", "surrogatepass")


def stream(*chunks: bytes) -> Response:
    return feed(OPENAI_RESPONSES, *chunks)


def parse(body: Any) -> Request:
    return OPENAI_RESPONSES.parse_request(json.dumps(body).encode(), "/v1/responses")


def items(*found: Any) -> tuple[Message, ...]:
    return parse({"model": "m", "input": list(found)}).messages


def answer(**fields: Any) -> Response:
    return OPENAI_RESPONSES.parse_response(json.dumps(ANSWER | fields).encode())


# --- routes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/v1/responses", "/responses?x=1", "/openai/v1/responses", "/backend-api/codex/responses"]
)
def test_a_post_to_responses_below_any_base_is_ours(path: str):
    assert OPENAI_RESPONSES.route("POST", path) == Route("openai_responses")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/responses"),
        ("POST", "/v1/responses/resp_1/cancel"),
        ("POST", "/v1/responses/input_tokens"),
        ("POST", "/v1/my-responses"),
        ("POST", "/v1/x?to=/responses"),
    ],
)
def test_anything_else_is_not(method: str, path: str):
    assert OPENAI_RESPONSES.route(method, path) is None


# --- requests -----------------------------------------------------------------------------------


def test_a_request_is_read_whole():
    request = parse(REQUEST)
    assert request.messages == (
        Message(Role.SYSTEM, (Text("You are a personal assistant."),)),
        Message(Role.DEVELOPER, (Text("Be brief."),)),
        Message(Role.USER, (Text("[Mon 2026-11-23 20:45 UTC] Read my notes."),)),
        Message(Role.ASSISTANT, PARTS, {"items": STATES}),
        Message(Role.TOOL, (ToolResult("milk, eggs", "call_1"),)),
        Message(Role.ASSISTANT, (Text("Milk and eggs."),)),
        Message(Role.USER, (Text("And this?"), Opaque("input_image", {"type": "input_image", "image_url": "data:,"}))),
    )
    assert (request.dialect, request.model, request.stream) == ("openai_responses", "gpt-5.5", True)
    assert request.previous_response_id == "resp_0"
    assert request.system == "You are a personal assistant.\n\nBe brief."
    assert request.tools == (Tool("exec", "Run", REQUEST["tools"][0]), Tool("", None, {"type": "web_search"}))
    assert request.sampling == {
        "max_output_tokens": 128000,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "text": {"verbosity": "low"},
        "parallel_tool_calls": True,
    }
    assert request.metadata == {"openclaw_session_id": "0c1ded16"}
    assert request.extra == {
        "store": True,
        "prompt_cache_key": "0c1ded16:0",
        "include": ["reasoning.encrypted_content"],
    }


def test_a_string_as_input_is_what_the_user_says():
    assert parse({"input": "hello"}).messages == (Message(Role.USER, (Text("hello"),)),)


@pytest.mark.parametrize("key", ["instructions", "previous_response_id"])
def test_input_may_be_missing_where_something_else_says_what_to_answer(key: str):
    assert len(parse({key: "x"}).messages) == (key == "instructions")


def test_an_answer_and_its_replay_have_equal_parts_though_the_ids_are_gone():
    replayed = [{k: v for k, v in item.items() if k not in ("id", "status")} for item in (REASONING, SAID, CALL)]
    whole = answer(output=[REASONING, SAID, CALL]).message
    assert whole is not None
    assert items(*replayed)[0].parts == whole.parts


def test_results_between_calls_part_the_assistants_messages():
    output = {"type": "function_call_output", "call_id": "call_1", "output": "1"}
    roles = [m.role for m in items(CALL, CALL, output, output, CALL)]
    assert roles == [Role.ASSISTANT, Role.TOOL, Role.TOOL, Role.ASSISTANT]


def test_a_result_in_parts_keeps_its_text_and_what_is_more_than_text():
    image = {"type": "input_image", "image_url": "data:,"}
    output = [{"type": "input_text", "text": "a"}, image, {"type": "input_text", "text": "b"}]
    found = items({"type": "function_call_output", "id": "fco_1", "call_id": "c", "output": output})
    assert found == (Message(Role.TOOL, (ToolResult("a\nb", "c", extra={"blocks": [image]}),), {"id": "fco_1"}),)


def test_custom_calls_and_their_results_keep_free_text():
    call = {"type": "custom_tool_call", "call_id": "c", "name": "patch", "input": "*** Begin"}
    output = {"type": "custom_tool_call_output", "call_id": "c", "output": "done"}
    assert items(call, output) == (
        Message(Role.ASSISTANT, (ToolCall("patch", "*** Begin", "c", {"type": "custom_tool_call"}),)),
        Message(Role.TOOL, (ToolResult("done", "c", extra={"type": "custom_tool_call_output"}),)),
    )


def test_a_screenshot_is_a_result_without_text():
    shot = {"type": "computer_screenshot", "image_url": "data:,"}
    found = items({"type": "computer_call_output", "call_id": "c", "output": shot})
    extra = {"type": "computer_call_output", "blocks": [shot]}
    assert found == (Message(Role.TOOL, (ToolResult("", "c", extra=extra),)),)


@pytest.mark.parametrize("raw", [{"type": "item_reference", "id": "rs_1"}, {"id": "rs_1"}])
def test_a_reference_to_an_item_is_kept_as_it_is(raw: dict[str, Any]):
    assert items(raw) == (Message(Role.ASSISTANT, (Opaque("item_reference", raw),)),)


def test_an_approval_is_the_users_and_an_unknown_item_the_assistants():
    approval = {"type": "mcp_approval_response", "approve": True, "approval_request_id": "a"}
    compaction = {"type": "compaction", "encrypted_content": "x"}
    assert items(compaction, approval) == (
        Message(Role.ASSISTANT, (Opaque("compaction", compaction),)),
        Message(Role.USER, (Opaque("mcp_approval_response", approval),)),
    )


def test_annotations_stay_with_their_text_but_empty_ones_say_nothing():
    cited = {"type": "output_text", "text": "a", "annotations": [{"type": "url_citation"}], "logprobs": []}
    assert items({"role": "assistant", "content": [cited]})[0].parts == (
        Text("a", {"annotations": [{"type": "url_citation"}]}),
    )


def test_open_reasoning_is_read_and_a_refusal_is_text_that_says_so():
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    refusal = {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    assert items(thought, refusal)[0].parts == (Reasoning("hm"), Text("No.", {"type": "refusal"}))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "request body has no input"),
        ({"input": 1}, "input is int, not a list"),
        ({"input": ["x"]}, "input[0] is str, not an object"),
        ({"input": [], "instructions": []}, "body.instructions is list, not a string"),
        ({"input": [], "previous_response_id": 1}, "body.previous_response_id is int, not a string"),
        ({"input": [{"type": 1}]}, "input[0].type is int, not a string"),
        ({"input": [{"role": "tool"}]}, "input[0].role is not one of system, developer, user, assistant"),
        ({"input": [{"type": "message", "role": "user", "content": {}}]}, "input[0].content is dict, not a list"),
        ({"input": [{"type": "function_call"}]}, "input[0].name is missing"),
        (
            {"input": [{"type": "function_call", "name": "f", "arguments": {}}]},
            "input[0].arguments is dict, not a string",
        ),
        ({"input": [{"type": "function_call_output", "output": {}}]}, "input[0].output is dict, not a list"),
        ({"input": [{"type": "reasoning", "summary": ["x"]}]}, "input[0].summary[0] is str, not an object"),
        ({"input": [{"type": "reasoning", "encrypted_content": 1}]}, "input[0].encrypted_content is int, not a string"),
        ({"input": [], "tools": [{"name": 1}]}, "tools[0].name is int, not a string"),
    ],
)
def test_a_wrong_type_is_an_error_that_names_the_place(body: dict[str, Any], message: str):
    with pytest.raises(WireError) as caught:
        parse(body)
    assert str(caught.value) == message


# --- answers ------------------------------------------------------------------------------------

WHOLE = Response(
    Message(Role.ASSISTANT, PARTS, {"items": STATES}),
    complete=True,
    id="resp_1",
    model="gpt-5.5",
    stop_reason=StopReason.TOOL_CALLS,
    raw_stop_reason="completed",
    usage=Usage(input_tokens=13579, output_tokens=12, cached_tokens=1024, reasoning_tokens=5),
    extra={"created_at": 1795466744, "status": "completed", "usage": USAGE},
)


def test_an_answer_is_read_whole_without_the_echo_of_the_request():
    assert answer() == WHOLE


def test_a_stream_gives_the_same_response_as_the_whole_answer():
    assert stream(sse(*EVENTS)) == WHOLE


def test_the_items_gathered_on_the_way_are_those_of_the_terminal_event():
    empty = {"type": "response.completed", "response": ANSWER | {"output": []}}
    assert stream(sse(*EVENTS[:-1], empty)) == WHOLE


@pytest.mark.parametrize(
    ("fields", "reason", "word"),
    [
        ({"output": [SAID]}, StopReason.STOP, "completed"),
        ({"output": [{"type": "computer_call", "call_id": "c"}]}, StopReason.TOOL_CALLS, "completed"),
        (
            {"output": [{"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}]},
            StopReason.CONTENT_FILTER,
            "completed",
        ),
        (
            {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}},
            StopReason.LENGTH,
            "max_output_tokens",
        ),
        (
            {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}},
            StopReason.CONTENT_FILTER,
            "content_filter",
        ),
        ({"status": "incomplete", "incomplete_details": None}, StopReason.OTHER, "incomplete"),
        ({"status": "cancelled"}, StopReason.OTHER, "cancelled"),
        ({"status": None}, None, None),
    ],
)
def test_status_and_reason_are_normalised_and_the_word_is_kept(
    fields: dict[str, Any], reason: StopReason | None, word: str | None
):
    response = answer(**fields)
    assert (response.stop_reason, response.raw_stop_reason, response.complete) == (reason, word, True)


@pytest.mark.parametrize("status", ["queued", "in_progress"])
def test_a_background_answer_that_is_not_there_yet_is_not_complete(status: str):
    response = answer(status=status, output=[])
    assert (response.complete, response.message, response.stop_reason, response.raw_stop_reason) == (
        False,
        None,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"input_tokens": "5", "output_tokens": -1, "input_tokens_details": []}, None),
        ({"input_tokens": 0}, Usage(input_tokens=0)),
        (None, None),
    ],
)
def test_what_the_server_did_not_count_is_unknown(usage: Any, expected: Usage | None):
    assert answer(usage=usage).usage == expected


def test_an_answer_without_output_is_an_error_or_no_response():
    response = OPENAI_RESPONSES.parse_response(
        b'{"status": "failed", "error": {"code": "server_error", "message": "no"}}'
    )
    assert response.error is not None
    assert (response.error.message, response.error.code, response.message) == ("no", "server_error", None)
    with pytest.raises(WireError, match="response body has no output"):
        OPENAI_RESPONSES.parse_response(b'{"output": "x"}')


# --- streams ------------------------------------------------------------------------------------


def test_a_cut_stream_gives_finished_items_whole_and_the_last_as_far_as_it_came():
    cut = next(i for i, e in enumerate(EVENTS) if e["type"] == "response.function_call_arguments.delta") + 2
    response = stream(sse(*EVENTS[:cut]))
    assert response.message is not None
    assert response.message.parts == (*PARTS[:3], ToolCall("exec", '{"code":  ', "call_1"))
    assert (response.complete, response.stop_reason, response.raw_stop_reason, response.usage) == (
        False,
        None,
        None,
        None,
    )
    assert (response.id, response.model) == ("resp_1", "gpt-5.5")


@pytest.mark.parametrize("done", [True, False])
def test_the_deltas_alone_give_the_same_texts(done: bool):
    events = [
        e for e in EVENTS[:-1] if e["type"] != "response.output_item.done" and (done or not e["type"].endswith(".done"))
    ]
    message = stream(sse(*events)).message
    assert message is not None
    assert [p.text for p in message.parts if isinstance(p, Text | Reasoning)] == [
        "Look first.\n\nThen say.",
        "Let me look.",
    ]
    assert message.tool_calls == (PARTS[3],)


def test_deltas_without_the_event_of_their_item_are_not_lost():
    name = {
        "type": "response.function_call_arguments.done",
        "item_id": "b",
        "name": "f",
        "arguments": "{}",
        "output_index": 1,
    }
    events = [{"type": "response.output_text.delta", "item_id": "a", "output_index": 0, "delta": "hi"}, name]
    assert stream(sse(*events)).message == Message(Role.ASSISTANT, (Text("hi"), ToolCall("f", "{}")))


def test_items_without_index_are_matched_by_their_id():
    events = [{k: v for k, v in e.items() if k != "output_index"} for e in EVENTS[:-1]]
    message = stream(sse(*events)).message
    assert message is not None
    assert message.parts == PARTS


def test_a_stream_of_which_nothing_arrived_has_no_message():
    assert stream(b"") == Response(None, complete=False)
    assert stream(sse(EVENTS[0])).message is None


def test_an_incomplete_stream_names_its_reason():
    ended = ANSWER | {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}, "output": [SAID]}
    response = stream(sse(*EVENTS[:-1], {"type": "response.incomplete", "response": ended}))
    assert (response.complete, response.stop_reason) == (True, StopReason.LENGTH)


def test_a_failed_stream_reports_the_error_beside_what_had_arrived():
    failed = BEGUN | {"status": "failed", "error": {"code": "rate_limit_exceeded", "message": "slow down"}}
    response = stream(sse(*EVENTS[:-1], {"type": "response.failed", "response": failed}))
    assert response.error is not None
    assert (response.error.message, response.error.code) == ("slow down", "rate_limit_exceeded")
    assert response.message == WHOLE.message
    assert (response.complete, response.stop_reason, response.raw_stop_reason) == (True, StopReason.OTHER, "failed")


@pytest.mark.parametrize(
    "event",
    [
        {"type": "error", "code": "server_error", "message": "no", "param": None},
        {"type": "error", "error": {"type": "x", "code": "server_error", "message": "no"}},
    ],
)
def test_an_error_event_is_no_end_of_an_answer(event: dict[str, Any]):
    response = stream(sse(*EVENTS[:4], event))
    assert response.error is not None
    assert (response.error.message, response.error.code, response.complete) == ("no", "server_error", False)


def test_an_event_that_names_its_type_only_outside_the_data_is_read():
    data = json.dumps({"response": ANSWER})
    assert stream(f"event: response.completed\ndata: {data}\n\ndata: [DONE]\n\n".encode()) == WHOLE


def test_a_terminal_event_with_an_unreadable_output_leaves_the_gathered_items():
    broken = {"type": "response.completed", "response": ANSWER | {"output": [{"type": "function_call"}]}}
    assert stream(sse(*EVENTS[:-1], broken)) == WHOLE


def test_what_a_stream_holds_beside_events_is_skipped():
    noise: list[Any] = [
        "",
        "nonsense",
        "[1]",
        {"type": "keepalive"},
        {"type": "response.completed", "response": 5},
        {"type": "response.output_item.added", "output_index": 9, "item": "x"},
        {"type": "response.output_text.delta", "output_index": "x", "delta": {}},
        {"type": "response.unheard.delta", "output_index": 0, "delta": "x"},
    ]
    assert stream(sse(*EVENTS[:2], *noise, *EVENTS[2:])) == WHOLE


def test_an_error_body_gives_its_message():
    error = OPENAI_RESPONSES.parse_error(b'{"error": {"message": "m", "type": "t", "code": "c"}}')
    assert (error.message, error.type, error.code) == ("m", "t", "c")


# --- any input ----------------------------------------------------------------------------------

TYPES = (
    "message",
    "reasoning",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "item_reference",
    "output_text",
)
NAMES = (
    "type",
    "role",
    "content",
    "text",
    "summary",
    "name",
    "call_id",
    "arguments",
    "input",
    "output",
    "id",
    "status",
)
hinted = st.recursive(
    json_values | st.sampled_from([*TYPES, "user", "assistant", "refusal", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=8,
)
event_names = st.sampled_from(
    sorted({e["type"] for e in EVENTS} | {"response.failed", "error", "response.refusal.delta"})
)
any_event = st.builds(
    lambda name, fields: {"type": name, **fields},
    event_names,
    st.dictionaries(
        st.sampled_from(
            ["item", "response", "delta", "text", "output_index", "item_id", "content_index", "error", "name"]
        ),
        hinted,
        max_size=4,
    ),
)


@given(mutated(REQUEST) | st.dictionaries(st.sampled_from(sorted(REQUEST)), hinted) | hinted)
@settings(max_examples=120)
def test_any_request_is_read_or_a_wire_error(body: Any):
    assert refused(lambda: parse(body)) != ""


@given(st.lists(st.dictionaries(st.sampled_from(NAMES), hinted) | hinted))
@settings(max_examples=120)
def test_any_items_are_read_or_a_wire_error(found: Any):
    assert refused(lambda: items(*found)) != ""


@given(mutated(ANSWER) | st.dictionaries(st.sampled_from(sorted(ANSWER)), hinted) | hinted)
@settings(max_examples=120)
def test_any_answer_is_read_or_a_wire_error(body: Any):
    assert refused(lambda: OPENAI_RESPONSES.parse_response(json.dumps(body).encode())) != ""


@given(mutated(EVENTS) | mutated(EVENTS[:-1]) | st.lists(any_event, max_size=6) | st.lists(hinted))
@settings(max_examples=150)
def test_any_stream_is_read(events: list[Any]):
    stream(sse(*events))


# --- recordings ---------------------------------------------------------------------------------


def check_session(flows: list[Any]) -> None:
    requests = [OPENAI_RESPONSES.parse_request(f.request.content, f.request.path) for f in flows]
    answers = [stream(f.response.content) for f in flows]
    assert [[m.role.value for m in r.messages] for r in requests] == [
        ["system", "user", "user"],
        ["system", "user", "user"],
        ["system", "tool"],
        ["system", "user", "user"],
    ]
    assert [r.previous_response_id for r in requests] == [None, *(a.id for a in answers[:3])]
    assert {r.metadata["openclaw_session_id"] for r in requests} == {"0c1ded16-2b74-47a9-b945-6590b20c6d71"}
    assert [t.name for t in requests[0].tools] == [
        "computer",
        "exec",
        "openclaw",
        "sessions_yield",
        "view_image",
        "wait",
        "",
    ]
    assert {tuple(r.extra) for r in requests} == {("prompt_cache_key", "include", "store", "context_management")}
    assert all(a.complete and a.error is None for a in answers)
    stop, calls = StopReason.STOP, StopReason.TOOL_CALLS
    assert [a.stop_reason for a in answers] == [stop, calls, stop, stop]
    assert answers[1].message is not None
    assert answers[1].message.tool_calls == (
        ToolCall("exec", '{"code": "text(await read({path:\\"notes.txt\\"}))"}', "call_9202931e485b4b6f"),
    )
    assert requests[2].messages[1].tool_results[0].call_id == "call_9202931e485b4b6f"
    assert answers[1].usage == Usage(input_tokens=13579, output_tokens=12, cached_tokens=0, reasoning_tokens=0)
    for flow, whole in zip(flows, answers, strict=True):  # the terminal event away: the same message from the deltas
        cut = stream(flow.response.content[: flow.response.content.rindex(b"event: response.completed")])
        assert (cut.message, cut.complete) == (whole.message, False)


def test_the_recorded_session_is_read_as_it_was_played(capture: Callable[[str], list[Any]]):
    check_session(capture("openai-responses-native-codemode"))


@pytest.mark.shared
def test_the_full_recorded_session_is_read_as_it_was_played(shared: Path):
    check_session(recorded(shared / "captures" / "openai-responses-native-codemode.mitm"))
