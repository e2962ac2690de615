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
from metaclaw_core.wire.gemini import GEMINI
from metaclaw_core.wire.splice import insert

PATH = "/v1beta/models/gemini-2.5-pro:streamGenerateContent?alt=sse"
READ = {"name": "read", "description": "Read a file", "parametersJsonSchema": {"type": "object"}}
BODY: dict[str, Any] = {
    "contents": [
        {"role": "user", "parts": [{"text": "Hello"}]},
        {
            "role": "model",
            "parts": [
                {"text": "He ", "thought": True},
                {"text": "greets.", "thought": True, "thoughtSignature": "c2ln"},
                {"text": "Read"},
                {"text": "ing."},
                {
                    "functionCall": {"name": "read", "args": {"path": "n.txt", "é": 1}, "id": "r1"},
                    "thoughtSignature": "czI=",
                },
                {"functionCall": {"name": "now"}},
            ],
        },
        {
            "role": "user",
            "parts": [
                {"functionResponse": {"name": "read", "response": {"output": "milk\n"}, "id": "r1"}},
                {"functionResponse": {"name": "now", "response": {"error": "no clock"}}},
                {"text": "And now?"},
                {"inlineData": {"mimeType": "image/png", "data": "aGk="}},
            ],
        },
        {"parts": [{"text": "<<<carrier>>>"}]},
    ],
    "generationConfig": {"temperature": 0.5, "thinkingConfig": {"thinkingBudget": 8192}},
    "systemInstruction": {"parts": [{"text": "Be brief."}]},
    "tools": [{"functionDeclarations": [READ]}, {"googleSearch": {}}],
    "toolConfig": {"functionCallingConfig": {"mode": "AUTO"}},
    "safetySettings": [],
}
USAGE = {
    "promptTokenCount": 100,
    "cachedContentTokenCount": 60,
    "candidatesTokenCount": 12,
    "thoughtsTokenCount": 30,
    "totalTokenCount": 142,
    "trafficType": "ON_DEMAND",
}


def dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def chunk(*parts: Any, finish: str | None = None, usage: dict[str, Any] | None = None) -> dict[str, Any]:
    candidate: dict[str, Any] = {"content": {"role": "model", "parts": list(parts)}, "index": 0}
    if finish is not None:
        candidate["finishReason"] = finish
    answer: dict[str, Any] = {"candidates": [candidate], "modelVersion": "gemini-2.5-pro-002", "responseId": "r_1"}
    return answer if usage is None else {**answer, "usageMetadata": usage}


CALL = {"functionCall": {"name": "read", "args": {"path": 'a\\"}]'}}}
CHUNKS = [
    chunk({"text": "He ", "thought": True}, usage={"promptTokenCount": 100, "cachedContentTokenCount": 60}),
    chunk({"text": "greets.", "thought": True, "thoughtSignature": "c2ln"}),
    chunk({"text": "Read"}),
    chunk({"text": 'ing[é] "{\\'}, {"text": ""}),
    chunk(CALL),
    chunk({"text": ""}, finish="STOP", usage=USAGE),
]
EXPECTED = Response(
    message=Message(
        Role.ASSISTANT,
        (
            Reasoning("He greets.", {"thoughtSignature": "c2ln"}),
            Text('Reading[é] "{\\'),
            ToolCall("read", '{"path":"a\\\\\\"}]"}'),
        ),
    ),
    complete=True,
    id="r_1",
    model="gemini-2.5-pro-002",
    stop_reason=StopReason.TOOL_CALLS,
    raw_stop_reason="STOP",
    usage=Usage(input_tokens=100, output_tokens=42, cached_tokens=60, reasoning_tokens=30),
    extra={"usageMetadata": {"trafficType": "ON_DEMAND"}},
)
ANSWER = chunk(*(p for c in CHUNKS for p in c["candidates"][0]["content"]["parts"]), finish="STOP", usage=USAGE)


def sse(*chunks: Any) -> bytes:
    return b"".join(b"data: " + dump(one) + b"\r\n\r\n" for one in chunks)


def array(*chunks: Any) -> bytes:
    return b"[" + b"\n,\r\n".join(json.dumps(one, indent=2).encode() for one in chunks) + b"\n]\n"


# --- route --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "model", "stream"),
    [
        ("/v1beta/models/gemini-2.5-pro:streamGenerateContent?alt=sse", "gemini-2.5-pro", True),
        ("/v1/models/gemini-2.5-pro:generateContent", "gemini-2.5-pro", False),
        ("/gw/v1beta/models/gemini-2.5-pro:generateContent?key=k", "gemini-2.5-pro", False),
        (
            "/v1/projects/p/locations/l/publishers/google/models/gemini-3-pro:streamGenerateContent",
            "gemini-3-pro",
            True,
        ),
        ("/v1beta/models/gemini-2.5-pro%3AgenerateContent", "gemini-2.5-pro", False),
        ("/v1beta/tunedModels/mine:generateContent", "mine", False),
    ],
)
def test_the_url_names_model_and_streaming(path: str, model: str, stream: bool) -> None:
    route = GEMINI.route("POST", path)
    assert route is not None
    assert (route.dialect, route.model, route.stream) == ("gemini", model, stream)
    request = GEMINI.parse_request(b'{"contents":[]}', path)
    assert (request.model, request.stream) == (model, stream)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1beta/models/gemini-2.5-pro:generateContent"),
        ("POST", "/v1beta/models/gemini-2.5-pro:countTokens"),
        ("POST", "/v1beta/models/gemini-2.5-pro:batchGenerateContent"),
        ("POST", "/v1beta/models/text-embedding-004:embedContent"),
        ("POST", "/v1internal:generateContent"),
        ("POST", "/v1/search?q=/models/m:generateContent"),
    ],
)
def test_it_leaves_other_calls_alone(method: str, path: str) -> None:
    assert GEMINI.route(method, path) is None


# --- requests -----------------------------------------------------------------------------------


def test_a_request_becomes_messages_in_wire_order() -> None:
    request = GEMINI.parse_request(dump(BODY), PATH)
    assert request.messages == (
        Message(Role.SYSTEM, (Text("Be brief."),)),
        Message(Role.USER, (Text("Hello"),)),
        Message(
            Role.ASSISTANT,
            (
                Reasoning("He greets.", {"thoughtSignature": "c2ln"}),
                Text("Reading."),
                ToolCall("read", '{"path":"n.txt","\\u00e9":1}', "r1", {"thoughtSignature": "czI="}),
                ToolCall("now", "{}"),
            ),
        ),
        Message(Role.TOOL, (ToolResult("milk\n", "r1", "read"),)),
        Message(Role.TOOL, (ToolResult("no clock", None, "now", is_error=True),)),
        Message(
            Role.USER,
            (Text("And now?"), Opaque("inlineData", {"inlineData": {"mimeType": "image/png", "data": "aGk="}})),
        ),
        Message(Role.USER, (Text("<<<carrier>>>"),)),
    )


def test_a_request_keeps_every_field_somewhere() -> None:
    request = GEMINI.parse_request(dump(BODY), PATH)
    assert (request.dialect, request.model, request.stream) == ("gemini", "gemini-2.5-pro", True)
    assert request.system == "Be brief."
    assert request.tools == (Tool("read", "Read a file", READ), Tool("", None, {"googleSearch": {}}))
    assert request.sampling == {
        "temperature": 0.5,
        "thinkingConfig": {"thinkingBudget": 8192},
        "toolConfig": {"functionCallingConfig": {"mode": "AUTO"}},
    }
    assert request.extra == {"safetySettings": []}


def test_snake_case_is_the_same_request() -> None:
    names = {
        "generationConfig": "generation_config",
        "systemInstruction": "system_instruction",
        "toolConfig": "tool_config",
        "functionDeclarations": "function_declarations",
        "functionCall": "function_call",
        "functionResponse": "function_response",
        "thoughtSignature": "thought_signature",
    }
    text = json.dumps(BODY)
    for camel, snake in names.items():
        text = text.replace(f'"{camel}"', f'"{snake}"')
    assert "_config" in text
    assert GEMINI.parse_request(text.encode(), PATH) == GEMINI.parse_request(dump(BODY), PATH)


def test_a_single_object_stands_for_a_list_of_one() -> None:
    body = {"system_instruction": {"parts": {"text": "Be brief."}}, "contents": {"parts": {"text": "Hi"}}}
    assert GEMINI.parse_request(dump(body), PATH).messages == (
        Message(Role.SYSTEM, (Text("Be brief."),)),
        Message(Role.USER, (Text("Hi"),)),
    )


def test_texts_of_a_human_are_not_joined() -> None:
    body = {"contents": [{"role": "user", "parts": [{"text": "a"}, {"text": "b"}]}]}
    assert GEMINI.parse_request(dump(body), PATH).messages[0].parts == (Text("a"), Text("b"))


@pytest.mark.parametrize(
    ("response", "result"),
    [
        ({"output": "x"}, ToolResult("x")),
        ({"result": "x"}, ToolResult("x", extra={"response": {"result": "x"}})),
        ({"error": "x"}, ToolResult("x", is_error=True)),
        (
            {"error": {"code": 1}},
            ToolResult('{"error":{"code":1}}', is_error=True, extra={"response": {"error": {"code": 1}}}),
        ),
        ({"output": 5}, ToolResult('{"output":5}', extra={"response": {"output": 5}})),
        ({"a": "x"}, ToolResult('{"a":"x"}', extra={"response": {"a": "x"}})),
        ({"output": "x", "n": 1}, ToolResult('{"output":"x","n":1}', extra={"response": {"output": "x", "n": 1}})),
        ({}, ToolResult("{}", extra={"response": {}})),
    ],
)
def test_a_function_response_is_its_text_or_its_json(response: Any, result: ToolResult) -> None:
    body = {"contents": [{"role": "function", "parts": [{"functionResponse": {"response": response}}]}]}
    assert GEMINI.parse_request(dump(body), PATH).messages == (Message(Role.TOOL, (result,)),)


def test_code_files_and_unknown_parts_are_kept_as_they_are() -> None:
    parts = [
        {"executableCode": {"language": "PYTHON", "code": "1"}},
        {"code_execution_result": {"outcome": "OUTCOME_OK"}, "thoughtSignature": "s"},
        {"fileData": {"fileUri": "gs://b/f"}, "videoMetadata": {"fps": 1}},
        {"fromTheFuture": 1},
    ]
    body = {"contents": [{"role": "model", "parts": parts}]}
    assert GEMINI.parse_request(dump(body), PATH).messages[0].parts == (
        Opaque("executableCode", parts[0]),
        Opaque("codeExecutionResult", parts[1]),
        Opaque("fileData", parts[2]),
        Opaque("fromTheFuture", parts[3]),
    )


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"{}", "body.contents is missing"),
        (b'{"contents":["x"]}', "body.contents[0] is str, not an object"),
        (
            b'{"contents":[{"role":"robot"}]}',
            "contents[0].role is 'robot'; known are user, model, function and tool",
        ),
        (b'{"contents":[{"parts":[{"text":1}]}]}', "contents[0].parts[0].text is int, not a string"),
        (b'{"contents":[{"parts":[{"functionCall":{}}]}]}', "contents[0].parts[0].functionCall.name is missing"),
        (b'{"contents":[],"systemInstruction":"x"}', "body.systemInstruction is str, not an object"),
        (b'{"contents":[],"generationConfig":[]}', "body.generationConfig is list, not an object"),
    ],
)
def test_a_body_that_is_not_ours_says_where_it_is_wrong(body: bytes, sentence: str) -> None:
    with pytest.raises(WireError) as e:
        GEMINI.parse_request(body, PATH)
    assert str(e.value) == sentence


def test_a_path_of_another_call_is_refused() -> None:
    assert refusal(lambda: GEMINI.parse_request(b'{"contents":[]}', "/v1/other")) == (
        "the path is not one of generateContent or streamGenerateContent"
    )


# --- answers ------------------------------------------------------------------------------------


def test_a_json_answer_and_both_kinds_of_stream_give_the_same_response() -> None:
    assert GEMINI.parse_response(dump(ANSWER)) == EXPECTED
    assert feed(GEMINI, sse(*CHUNKS)) == EXPECTED
    assert feed(GEMINI, array(*CHUNKS)) == EXPECTED
    assert feed(GEMINI, dump(ANSWER)) == EXPECTED


@pytest.mark.parametrize("data", [sse(*CHUNKS), array(*CHUNKS), b"\xef\xbb\xbf" + array(*CHUNKS)])
def test_byte_by_byte_gives_the_same_response(data: bytes) -> None:
    assert feed(GEMINI, *(data[i : i + 1] for i in range(len(data)))) == EXPECTED


@pytest.mark.parametrize("whole", [sse(*CHUNKS[:5]), array(*CHUNKS[:5])[:-3]])
@given(data=st.data())
def test_a_cut_stream_gives_its_prefix(whole: bytes, data: st.DataObject) -> None:
    response = feed(GEMINI, whole[: data.draw(st.integers(0, len(whole)))])
    assert response.complete is False
    assert response.stop_reason is None
    assert 'Reading[é] "{\\'.startswith(response.message.text if response.message else "")


def test_a_stream_that_brought_nothing_has_no_message() -> None:
    assert feed(GEMINI).message is None
    assert feed(GEMINI, b"[\n").message is None
    assert feed(GEMINI, sse(chunk())).message is None


def test_a_signature_on_the_empty_last_part_belongs_to_the_text_before_it() -> None:
    parts = [{"text": "Hi"}, {"text": "", "thoughtSignature": "s"}]
    streamed = feed(GEMINI, sse(chunk(parts[0]), chunk(parts[1], finish="STOP")))
    assert streamed.message == Message(Role.ASSISTANT, (Text("Hi", {"thoughtSignature": "s"}),))
    replay = {"contents": [{"role": "model", "parts": [{"text": "Hi", "thoughtSignature": "s"}]}]}
    assert GEMINI.parse_request(dump(replay), PATH).messages[0] == streamed.message


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("STOP", StopReason.STOP),
        ("MAX_TOKENS", StopReason.LENGTH),
        ("SAFETY", StopReason.CONTENT_FILTER),
        ("RECITATION", StopReason.CONTENT_FILTER),
        ("PROHIBITED_CONTENT", StopReason.CONTENT_FILTER),
        ("MALFORMED_FUNCTION_CALL", StopReason.OTHER),
        ("FROM_THE_FUTURE", StopReason.OTHER),
        (None, None),
    ],
)
def test_stop_reasons_are_normalised_and_the_word_kept(word: str | None, reason: StopReason | None) -> None:
    response = GEMINI.parse_response(dump(chunk({"text": "x"}, finish=word)))
    assert (response.stop_reason, response.raw_stop_reason) == (reason, word)


def test_a_blocked_prompt_is_a_filtered_answer_without_a_message() -> None:
    blocked = {"promptFeedback": {"blockReason": "OTHER"}, "usageMetadata": {"promptTokenCount": 7}}
    for response in (GEMINI.parse_response(dump(blocked)), feed(GEMINI, sse(blocked))):
        assert response.message is None
        assert response.complete
        assert (response.stop_reason, response.raw_stop_reason) == (StopReason.CONTENT_FILTER, "OTHER")
        assert response.usage == Usage(input_tokens=7)
        assert response.extra == {"promptFeedback": {"blockReason": "OTHER"}}


def test_an_answer_without_content_is_an_empty_message() -> None:
    answer = {"candidates": [{"finishReason": "SAFETY", "safetyRatings": []}]}
    for response in (GEMINI.parse_response(dump(answer)), feed(GEMINI, sse(answer))):
        assert response.message == Message(Role.ASSISTANT, ())
        assert response.extra == {"safetyRatings": []}


def test_other_candidates_are_kept_but_not_read() -> None:
    answer = {
        "candidates": [{"content": {"parts": [{"text": "a"}]}}, {"index": 1, "content": {"parts": [{"text": "b"}]}}]
    }
    response = GEMINI.parse_response(dump(answer))
    assert response.message == Message(Role.ASSISTANT, (Text("a"),))
    assert response.extra == {"candidates": [answer["candidates"][1]]}
    assert feed(GEMINI, sse(answer)).message == response.message


@pytest.mark.parametrize(
    ("metadata", "usage"),
    [
        ({"promptTokenCount": 5, "thoughtsTokenCount": 9}, Usage(5, 9, reasoning_tokens=9)),
        ({"promptTokenCount": 5, "candidatesTokenCount": 3}, Usage(5, 3)),
        ({"promptTokenCount": 5}, Usage(5)),
        ({"promptTokenCount": True, "candidatesTokenCount": -1}, Usage()),
        ({"promptTokenCount": 5.0, "candidatesTokenCount": 1.5}, Usage(5)),
        ({}, None),
    ],
)
def test_counts_that_are_missing_or_broken_stay_unknown(metadata: dict[str, Any], usage: Usage | None) -> None:
    assert GEMINI.parse_response(dump(chunk({"text": "x"}, usage=metadata))).usage == usage


@pytest.mark.parametrize("form", [sse, array])
def test_an_error_inside_a_stream_is_reported_with_what_had_arrived(form: Any) -> None:
    error = {"error": {"code": 503, "message": "Overloaded", "status": "UNAVAILABLE"}}
    response = feed(GEMINI, form(chunk({"text": "Hi"}), error))
    assert response.message == Message(Role.ASSISTANT, (Text("Hi"),))
    assert response.complete is False
    assert response.error == ApiError("Overloaded", "UNAVAILABLE", "503", error)


def test_a_reply_equals_its_replay() -> None:
    content = ANSWER["candidates"][0]["content"]
    assert GEMINI.parse_request(dump({"contents": [content]}), PATH).messages[0] == EXPECTED.message


# --- errors and the slot ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message", "kind", "code"),
    [
        (b'{"error":{"code":429,"message":"Slow","status":"RESOURCE_EXHAUSTED"}}', "Slow", "RESOURCE_EXHAUSTED", "429"),
        (b'[{"error":{"code":400,"message":"Bad","status":"INVALID_ARGUMENT"}}]', "Bad", "INVALID_ARGUMENT", "400"),
        (b'{"error":"no"}', "no", None, None),
        (b"[]", "[]", None, None),
        (b"<html>502</html>", "<html>502</html>", None, None),
    ],
)
def test_an_error_body_gives_its_message(body: bytes, message: str, kind: str | None, code: str | None) -> None:
    error = GEMINI.parse_error(body)
    assert (error.message, error.type, error.code) == (message, kind, code)


def test_an_error_with_status_200_is_an_answer_without_a_message() -> None:
    response = GEMINI.parse_response(b'{"error":{"message":"Oops"}}')
    assert (response.message, response.error) == (None, ApiError("Oops", raw={"error": {"message": "Oops"}}))


def test_text_put_into_the_slot_ends_the_system_prompt() -> None:
    body = dump(BODY)
    system = GEMINI.parse_request(insert(body, GEMINI.system_slot(body), "SKILLS"), PATH).system
    assert system is not None
    assert system.startswith("Be brief.")
    assert "SKILLS" in system


# --- the real thing -----------------------------------------------------------------------------


@pytest.mark.shared
def test_a_recorded_session_is_read_call_for_call_and_replies_equal_their_replays(shared: Path) -> None:
    flows = recorded(shared / "captures" / "google-generative-ai-native.mitm")
    requests = [GEMINI.parse_request(f.request.content or b"", f.request.path) for f in flows]
    answers = [feed(GEMINI, f.response.content or b"") for f in flows if f.response]
    assert {(r.model, r.stream) for r in requests} == {("gemini-2.5-pro", True)}
    assert [[m.role.value for m in r.messages] for r in requests[:3]] == [
        ["system", "user", "user"],
        ["system", "user", "assistant", "user", "user"],
        ["system", "user", "assistant", "user", "assistant", "tool", "user"],
    ]
    assert requests[2].messages[5].tool_results == (ToolResult("remember the milk\n", "read17954663696041", "read"),)
    assert requests[0].sampling == {"thinkingConfig": {"includeThoughts": True, "thinkingBudget": 8192}}
    assert [t.name for t in requests[0].tools][:2] == ["apply_patch", "computer"]
    assert answers[1].usage == Usage(input_tokens=14598, output_tokens=12)
    assert [a.stop_reason for a in answers[:3]] == [StopReason.STOP, StopReason.TOOL_CALLS, StopReason.STOP]
    assert all(a.complete for a in answers)
    assert [identity(m) for m in requests[-1].messages if m.role is Role.ASSISTANT] == [
        identity(a.message) for a in answers[:-1]
    ]
