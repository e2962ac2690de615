from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from json_fuzz import feed, identity, recorded

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
from metaclaw_core.wire.ollama import OLLAMA
from metaclaw_core.wire.splice import insert

PATH = "/api/chat"
READ = {"type": "function", "function": {"name": "read", "description": "Read a file", "parameters": {}}}
CALL = {"id": "call_1", "function": {"index": 0, "name": "read", "arguments": {"path": "n.txt", "é": 1}}}
BODY: dict[str, Any] = {
    "model": "qwen3:8b",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is on it?", "images": ["aGk="]},
        {"role": "assistant", "content": "", "thinking": "Look it up.", "tool_calls": [CALL]},
        {"role": "tool", "content": "milk\n", "tool_call_id": "call_1", "tool_name": "read"},
        {"role": "assistant", "content": "Milk."},
        {"role": "user", "content": "Thanks"},
    ],
    "stream": True,
    "tools": [READ],
    "options": {"temperature": 0.2, "num_ctx": 8192},
    "think": False,
    "format": "json",
    "truncate": False,
    "keep_alive": "5m",
}


def line(done: bool = False, **message: Any) -> dict[str, Any]:
    return {
        "model": "qwen3:8b",
        "created_at": "2026-11-23T21:00:30Z",
        "message": {"role": "assistant", "content": "", **message},
        "done": done,
    }


LAST = {"done_reason": "stop", "total_duration": 9, "prompt_eval_count": 13324, "eval_count": 12}
LINES = [
    line(thinking="Look "),
    line(thinking="it up."),
    line(content="Wait: "),
    line(content="ré", tool_calls=[CALL]),
    line(True) | LAST,
]
ANSWER = line(True, thinking="Look it up.", content="Wait: ré", tool_calls=[CALL]) | LAST
EXPECTED = Response(
    message=Message(
        Role.ASSISTANT,
        (
            Reasoning("Look it up."),
            Text("Wait: ré"),
            ToolCall("read", '{"path":"n.txt","\\u00e9":1}', "call_1"),
        ),
    ),
    complete=True,
    model="qwen3:8b",
    stop_reason=StopReason.TOOL_CALLS,
    raw_stop_reason="stop",
    usage=Usage(input_tokens=13324, output_tokens=12),
    extra={"created_at": "2026-11-23T21:00:30Z", "total_duration": 9},
)


def dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def ndjson(*lines: Any) -> bytes:
    return b"".join(dump(one) + b"\n" for one in lines)


# --- route and requests -------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/chat", "/ollama/api/chat", "/api/chat?x=1"])
def test_it_answers_chat_under_any_base_path(path: str) -> None:
    route = OLLAMA.route("POST", path)
    assert route is not None
    assert (route.dialect, route.model, route.stream) == ("ollama", None, None)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/api/chat"), ("POST", "/api/generate"), ("POST", "/api/chat/completions"), ("POST", "/api/embed")],
)
def test_it_leaves_other_calls_alone(method: str, path: str) -> None:
    assert OLLAMA.route(method, path) is None


def test_a_request_becomes_messages() -> None:
    assert OLLAMA.parse_request(dump(BODY), PATH).messages == (
        Message(Role.SYSTEM, (Text("Be brief."),)),
        Message(Role.USER, (Text("What is on it?"), Opaque("image", "aGk="))),
        Message(
            Role.ASSISTANT,
            (Reasoning("Look it up."), ToolCall("read", '{"path":"n.txt","\\u00e9":1}', "call_1")),
        ),
        Message(Role.TOOL, (ToolResult("milk\n", "call_1", "read"),)),
        Message(Role.ASSISTANT, (Text("Milk."),)),
        Message(Role.USER, (Text("Thanks"),)),
    )


def test_a_request_keeps_every_field_somewhere() -> None:
    request = OLLAMA.parse_request(dump(BODY), PATH)
    assert (request.dialect, request.model, request.stream) == ("ollama", "qwen3:8b", True)
    assert request.system == "Be brief."
    assert request.tools == (Tool("read", "Read a file", READ),)
    assert request.sampling == {"temperature": 0.2, "num_ctx": 8192, "think": False, "format": "json"}
    assert request.extra == {"truncate": False, "keep_alive": "5m"}


@pytest.mark.parametrize(("said", "stream"), [({}, True), ({"stream": None}, True), ({"stream": False}, False)])
def test_it_streams_unless_told_not_to(said: dict[str, Any], stream: bool) -> None:
    assert OLLAMA.parse_request(dump({"model": "m", "messages": [], **said}), PATH).stream is stream


def test_a_tool_result_may_use_the_old_name_and_hold_images() -> None:
    message = {"role": "tool", "content": "ok", "name": "shot", "images": ["aGk="], "x": 1}
    request = OLLAMA.parse_request(dump({"model": "m", "messages": [message]}), PATH)
    assert request.messages == (
        Message(Role.TOOL, (ToolResult("ok", None, "shot", extra={"blocks": ["aGk="]}),), {"x": 1}),
    )


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b'{"messages":[]}', "body.model is missing"),
        (b'{"model":"m"}', "body.messages is missing"),
        (b'{"model":"m","messages":["x"]}', "messages[0] is str, not an object"),
        (b'{"model":"m","messages":[{"content":"x"}]}', "messages[0].role is missing"),
        (
            b'{"model":"m","messages":[{"role":"robot"}]}',
            "messages[0].role is 'robot'; known are system, user, assistant and tool",
        ),
        (b'{"model":"m","messages":[{"role":"user","content":[]}]}', "messages[0].content is list, not a string"),
        (
            b'{"model":"m","messages":[{"role":"assistant","tool_calls":[{"function":{"name":"x","arguments":"{}"}}]}]}',
            "messages[0].tool_calls[0].function.arguments is str, not an object",
        ),
        (b'{"model":"m","messages":[],"options":[]}', "body.options is list, not an object"),
    ],
)
def test_a_body_that_is_not_ours_says_where_it_is_wrong(body: bytes, sentence: str) -> None:
    with pytest.raises(WireError) as e:
        OLLAMA.parse_request(body, PATH)
    assert str(e.value) == sentence


# --- answers ------------------------------------------------------------------------------------


def test_a_json_answer_and_a_stream_give_the_same_response() -> None:
    assert OLLAMA.parse_response(dump(ANSWER)) == EXPECTED
    assert feed(OLLAMA, ndjson(*LINES)) == EXPECTED


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n\r\n"])
def test_the_last_line_may_end_as_it_likes(end: bytes) -> None:
    assert feed(OLLAMA, ndjson(*LINES).rstrip(b"\n") + end) == EXPECTED


@given(st.integers(0, len(ndjson(*LINES)) - 2))
def test_a_cut_stream_gives_its_prefix(length: int) -> None:
    response = feed(OLLAMA, ndjson(*LINES)[:length])
    assert response.complete is False
    assert (response.usage, response.stop_reason) == (None, None)
    assert "Wait: ré".startswith(response.message.text if response.message else "")


def test_a_stream_that_brought_nothing_has_no_message() -> None:
    assert feed(OLLAMA).message is None
    assert feed(OLLAMA, ndjson(line())).message is None


def test_an_empty_but_finished_answer_is_an_empty_message() -> None:
    assert feed(OLLAMA, ndjson(line(True) | LAST)).message == Message(Role.ASSISTANT, ())


@pytest.mark.parametrize(
    ("word", "reason"),
    [("stop", StopReason.STOP), ("length", StopReason.LENGTH), ("load", StopReason.OTHER), (None, None)],
)
def test_stop_reasons_are_normalised_and_the_word_kept(word: str | None, reason: StopReason | None) -> None:
    response = OLLAMA.parse_response(dump(line(True, content="x") | {"done_reason": word}))
    assert (response.stop_reason, response.raw_stop_reason) == (reason, word)


def test_counts_that_are_missing_stay_unknown() -> None:
    assert OLLAMA.parse_response(dump(line(True, content="x"))).usage is None
    assert OLLAMA.parse_response(dump(line(True) | {"eval_count": 3})).usage == Usage(output_tokens=3)


def test_logprobs_of_all_lines_are_kept() -> None:
    a, b = {"token": "a", "logprob": -0.1}, {"token": "b", "logprob": -0.2}
    response = feed(OLLAMA, ndjson(line(content="a") | {"logprobs": [a]}, line(True, content="b") | {"logprobs": [b]}))
    assert response.extra["logprobs"] == [a, b]


def test_an_error_line_is_reported_with_what_had_arrived() -> None:
    response = feed(OLLAMA, ndjson(line(content="Hi"), {"error": "model runner has stopped"}))
    assert response.message == Message(Role.ASSISTANT, (Text("Hi"),))
    assert response.complete is False
    assert response.error == ApiError("model runner has stopped", raw={"error": "model runner has stopped"})


def test_a_reply_equals_its_replay() -> None:
    replay = {"role": "assistant", "content": "Wait: ré", "thinking": "Look it up.", "tool_calls": [CALL]}
    request = OLLAMA.parse_request(dump({"model": "m", "messages": [replay]}), PATH)
    assert request.messages[0] == EXPECTED.message


# --- errors and the slot ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message", "kind"),
    [
        (b'{"error":"model \\"x\\" not found"}', 'model "x" not found', None),
        (b'{"error":{"message":"too many","type":"rate_limit"}}', "too many", "rate_limit"),
        (b'{"error":null}', "", None),
        (b"404 page not found", "404 page not found", None),
    ],
)
def test_an_error_body_gives_its_message(body: bytes, message: str, kind: str | None) -> None:
    error = OLLAMA.parse_error(body)
    assert (error.message, error.type) == (message, kind)


def test_an_error_with_status_200_is_an_answer_without_a_message() -> None:
    response = OLLAMA.parse_response(b'{"error":"Oops"}')
    assert (response.message, response.error) == (None, ApiError("Oops", raw={"error": "Oops"}))


def test_text_put_into_the_slot_ends_the_system_prompt() -> None:
    body = dump(BODY)
    system = OLLAMA.parse_request(insert(body, OLLAMA.system_slot(body), "SKILLS"), PATH).system
    assert system is not None
    assert system.startswith("Be brief.")
    assert "SKILLS" in system


# --- the real thing -----------------------------------------------------------------------------


@pytest.mark.shared
def test_a_recorded_session_is_read_call_for_call_and_replies_equal_their_replays(shared: Path) -> None:
    flows = recorded(shared / "captures" / "ollama.mitm")
    requests = [OLLAMA.parse_request(f.request.content or b"", f.request.path) for f in flows]
    answers = [feed(OLLAMA, f.response.content or b"") for f in flows if f.response]
    assert [[m.role.value for m in r.messages] for r in requests] == [
        ["system", "user", "user"],
        ["system", "user", "assistant", "user", "user"],
        ["system", "user", "assistant", "user", "assistant", "tool", "user"],
    ]
    assert requests[2].messages[5].tool_results == (
        ToolResult("remember the milk\n", requests[2].messages[4].tool_calls[0].id, "read"),
    )
    assert (requests[0].sampling, requests[0].extra) == ({"think": False}, {"truncate": False, "shift": False})
    assert [a.usage for a in answers] == [Usage(13324, 12), Usage(13376, 12), Usage(13433, 12)]
    assert [a.stop_reason for a in answers] == [StopReason.STOP, StopReason.TOOL_CALLS, StopReason.STOP]
    assert [identity(m) for m in requests[2].messages if m.role is Role.ASSISTANT] == [
        identity(a.message) for a in answers[:2]
    ]
