"""One answer in each form, literally: some thinking, two pieces of text, a call; and the answer that a stop string ended."""

from __future__ import annotations

import json
from typing import Any

from answer_tools import GEMINI_PATH, records, write, writer

from metaclaw_core.model import StopReason, Usage
from metaclaw_core.wire.answer import Call, Event, ReasoningDelta, TextDelta

SAID: list[Event] = [
    ReasoningDelta("Look."),
    TextDelta("I'll "),
    TextDelta("read."),
    Call("read", '{"path": "a"}', "call_1"),
]
USAGE = Usage(10, 5, cached_tokens=4, reasoning_tokens=2)


def stream(dialect: str) -> bytes:
    return write(writer(dialect, stream=True), SAID, usage=USAGE)


def whole(dialect: str) -> Any:
    return json.loads(write(writer(dialect, stream=False), SAID, usage=USAGE))


# --- OpenAI chat ----------------------------------------------------------------------------------

CHAT_CALL = {"id": "call_1", "type": "function", "function": {"name": "read", "arguments": '{"path": "a"}'}}
CHAT_USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 5,
    "total_tokens": 15,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 2},
}


def test_chat_whole():
    message = {
        "role": "assistant",
        "content": "I'll read.",
        "refusal": None,
        "reasoning_content": "Look.",
        "tool_calls": [CHAT_CALL],
    }
    assert whole("openai_chat") == {
        "id": "resp_7",
        "object": "chat.completion",
        "created": 1_764_000_000,
        "model": "m",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls"}],
        "usage": CHAT_USAGE,
    }


def test_chat_content_is_null_beside_a_call_and_a_string_without():
    (only_call,) = json.loads(write(writer("openai_chat", stream=False), SAID[3:]))["choices"]
    (nothing,) = json.loads(write(writer("openai_chat", stream=False), []))["choices"]
    assert (only_call["message"]["content"], nothing["message"]["content"]) == (None, "")


def test_chat_stream():
    head = {"id": "resp_7", "object": "chat.completion.chunk", "created": 1_764_000_000, "model": "m"}

    def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**head, "choices": [choice], "usage": None}

    assert records(stream("openai_chat")) == [
        chunk({"role": "assistant", "content": ""}),
        chunk({"reasoning_content": "Look."}),
        chunk({"content": "I'll "}),
        chunk({"content": "read."}),
        chunk({"tool_calls": [{"index": 0, **CHAT_CALL}]}),
        chunk({}, "tool_calls"),
        {**head, "choices": [], "usage": CHAT_USAGE},
        "[DONE]",
    ]


# --- OpenAI Responses -----------------------------------------------------------------------------

REASONED = {"id": "rs_7_0", "type": "reasoning", "summary": [{"type": "summary_text", "text": "Look."}]}
PART = {"type": "output_text", "text": "I'll read.", "annotations": [], "logprobs": []}
TOLD = {"id": "msg_7_1", "type": "message", "status": "completed", "role": "assistant", "content": [PART]}
CALLED = {
    "id": "fc_7_2",
    "type": "function_call",
    "status": "completed",
    "call_id": "call_1",
    "name": "read",
    "arguments": '{"path": "a"}',
}


def responses(status: str, output: list[Any], usage: Any, details: Any = None, error: Any = None) -> dict[str, Any]:
    return {
        "id": "resp_7",
        "object": "response",
        "created_at": 1_764_000_000,
        "status": status,
        "error": error,
        "incomplete_details": details,
        "instructions": None,
        "model": "m",
        "output": output,
        "previous_response_id": None,
        "metadata": {},
        "tools": [],
        "usage": usage,
        "background": False,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "parallel_tool_calls": True,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": False,
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "top_logprobs": 0,
        "top_p": None,
        "truncation": "disabled",
        "user": None,
    }


COMPLETED = responses(
    "completed",
    [REASONED, TOLD, CALLED],
    {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 15,
    },
)


def test_responses_whole():
    assert whole("openai_responses") == COMPLETED


def test_responses_stream():
    begun = responses("in_progress", [], None)
    thought = {"item_id": "rs_7_0", "output_index": 0, "summary_index": 0}
    text = {"item_id": "msg_7_1", "output_index": 1, "content_index": 0}
    call = {"item_id": "fc_7_2", "output_index": 2}
    empty = {**PART, "text": ""}
    steps: list[dict[str, Any]] = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
        {"type": "response.output_item.added", "output_index": 0, "item": {**REASONED, "summary": []}},
        {"type": "response.reasoning_summary_part.added", **thought, "part": {"type": "summary_text", "text": ""}},
        {"type": "response.reasoning_summary_text.delta", **thought, "delta": "Look."},
        {"type": "response.reasoning_summary_text.done", **thought, "text": "Look."},
        {"type": "response.reasoning_summary_part.done", **thought, "part": {"type": "summary_text", "text": "Look."}},
        {"type": "response.output_item.done", "output_index": 0, "item": REASONED},
        {"type": "response.output_item.added", "output_index": 1, "item": {**TOLD, "status": "in_progress", "content": []}},
        {"type": "response.content_part.added", **text, "part": empty},
        {"type": "response.output_text.delta", **text, "delta": "I'll ", "logprobs": []},
        {"type": "response.output_text.delta", **text, "delta": "read.", "logprobs": []},
        {"type": "response.output_text.done", **text, "text": "I'll read.", "logprobs": []},
        {"type": "response.content_part.done", **text, "part": PART},
        {"type": "response.output_item.done", "output_index": 1, "item": TOLD},
        {"type": "response.output_item.added", "output_index": 2, "item": {**CALLED, "status": "in_progress", "arguments": ""}},
        {"type": "response.function_call_arguments.delta", **call, "delta": '{"path": "a"}'},
        {"type": "response.function_call_arguments.done", **call, "arguments": '{"path": "a"}'},
        {"type": "response.output_item.done", "output_index": 2, "item": CALLED},
        {"type": "response.completed", "response": COMPLETED},
    ]
    assert records(stream("openai_responses")) == [{**step, "sequence_number": n} for n, step in enumerate(steps)]


def test_responses_say_what_cut_them():
    for dialect_stop, reason in ((StopReason.LENGTH, "max_output_tokens"), (StopReason.CONTENT_FILTER, "content_filter")):
        body = write(writer("openai_responses", stream=True), SAID[:3], dialect_stop)
        *_, done, last = records(body)
        assert (done["item"]["id"], done["item"]["status"]) == ("msg_7_1", "incomplete")
        assert last["type"] == "response.incomplete"
        assert last["response"]["incomplete_details"] == {"reason": reason}
        assert last["response"] == json.loads(write(writer("openai_responses", stream=False), SAID[:3], dialect_stop))


def test_responses_fail_with_what_there_was():
    to = writer("openai_responses", stream=True)
    *_, last = records(to.start() + to.feed(TextDelta("Hel")) + to.fail("gone"))
    item = {**TOLD, "id": "msg_7_0", "status": "incomplete", "content": [{**PART, "text": "Hel"}]}
    error = {"code": "server_error", "message": "gone"}
    assert last == {
        "type": "response.failed",
        "sequence_number": 8,
        "response": responses("failed", [item], None, error=error),
    }


def test_responses_echo_what_the_request_set():
    asked: dict[str, Any] = {
        "store": None,
        "previous_response_id": "resp_6",
        "temperature": 0.5,
        "max_output_tokens": 99,
        "metadata": {"a": "b"},
        "prompt_cache_key": "k",
        "parallel_tool_calls": False,
        "instructions": "Be brief.",
        "tools": [{"type": "function", "name": "read"}],
    }
    said = json.loads(write(writer("openai_responses", stream=False, **asked), []))
    assert {key: said[key] for key in asked} == {**asked, "store": True, "instructions": None, "tools": []}


# --- Anthropic ------------------------------------------------------------------------------------

SIGNED = {"type": "thinking", "thinking": "Look.", "signature": "bWV0YWNsYXcgcG9saWN5"}
COUNTS = {
    "input_tokens": 6,
    "cache_creation_input_tokens": None,
    "cache_read_input_tokens": 4,
    "output_tokens": 5,
}


def test_anthropic_whole():
    assert whole("anthropic") == {
        "id": "resp_7",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [
            SIGNED,
            {"type": "text", "text": "I'll read."},
            {"type": "tool_use", "id": "call_1", "name": "read", "input": {"path": "a"}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": COUNTS,
    }


def test_anthropic_stream():
    message = {
        "id": "resp_7",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 0, "output_tokens": 0},
    }

    def start(index: int, block: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_start", "index": index, "content_block": block}

    def delta(index: int, kind: str, key: str, text: str) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": index, "delta": {"type": kind, key: text}}

    assert records(stream("anthropic")) == [
        {"type": "message_start", "message": message},
        start(0, {"type": "thinking", "thinking": "", "signature": ""}),
        delta(0, "thinking_delta", "thinking", "Look."),
        delta(0, "signature_delta", "signature", "bWV0YWNsYXcgcG9saWN5"),
        {"type": "content_block_stop", "index": 0},
        start(1, {"type": "text", "text": ""}),
        delta(1, "text_delta", "text", "I'll "),
        delta(1, "text_delta", "text", "read."),
        {"type": "content_block_stop", "index": 1},
        start(2, {"type": "tool_use", "id": "call_1", "name": "read", "input": {}}),
        delta(2, "input_json_delta", "partial_json", '{"path": "a"}'),
        {"type": "content_block_stop", "index": 2},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": COUNTS},
        {"type": "message_stop"},
    ]


def test_anthropic_names_the_stop_string():
    for streamed in (True, False):
        body = write(writer("anthropic", stream=streamed), [TextDelta("a")], at="END")
        said = records(body)[-2]["delta"] if streamed else json.loads(body)
        assert (said["stop_reason"], said["stop_sequence"]) == ("stop_sequence", "END")


def test_anthropic_two_calls_are_two_blocks():
    body = write(writer("anthropic", stream=True), [Call("a", "{}", "call_1"), Call("b", "{}", "call_2")])
    indexes = [r["index"] for r in records(body) if "index" in r]
    assert indexes == [0, 0, 0, 1, 1, 1]


# --- Gemini ---------------------------------------------------------------------------------------

PARTS = [
    {"text": "Look.", "thought": True},
    {"text": "I'll "},
    {"text": "read."},
    {"functionCall": {"id": "call_1", "name": "read", "args": {"path": "a"}}},
    {"text": ""},
]
GEMINI_USAGE = {
    "promptTokenCount": 10,
    "cachedContentTokenCount": 4,
    "candidatesTokenCount": 3,
    "thoughtsTokenCount": 2,
    "totalTokenCount": 15,
}


def gemini(parts: list[Any], *, last: bool) -> dict[str, Any]:
    candidate = {"content": {"role": "model", "parts": parts}, "index": 0, **({"finishReason": "STOP"} if last else {})}
    answer = {"candidates": [candidate], "modelVersion": "m", "responseId": "resp_7"}
    return {**answer, "usageMetadata": GEMINI_USAGE} if last else answer


GEMINI_STREAM = [gemini([part], last=part is PARTS[-1]) for part in PARTS]


def test_gemini_whole():
    assert whole("gemini") == gemini([PARTS[0], {"text": "I'll read."}, PARTS[3]], last=True)


def test_gemini_stream():
    assert records(stream("gemini")) == GEMINI_STREAM


def test_gemini_stream_without_sse_is_one_json_array():
    to = writer("gemini", stream=True, path=f"{GEMINI_PATH}?key=k")
    assert to.media_type == "application/json"
    assert json.loads(write(to, SAID, usage=USAGE)) == GEMINI_STREAM
    failed = writer("gemini", stream=True, path=GEMINI_PATH)
    error = {"error": {"code": 500, "message": "gone", "status": "INTERNAL"}}
    assert json.loads(failed.feed(TextDelta("I'll ")) + failed.keep_alive() + failed.fail("gone")) == [GEMINI_STREAM[1], error]


# --- Ollama ---------------------------------------------------------------------------------------

OLLAMA_CALL = {"id": "call_1", "function": {"index": 0, "name": "read", "arguments": {"path": "a"}}}
OLLAMA_END = {"done": True, "done_reason": "stop", "prompt_eval_count": 10, "eval_count": 5}


def line(message: dict[str, Any], **end: Any) -> dict[str, Any]:
    head = {"model": "m", "created_at": "2025-11-24T16:00:00.250000Z"}
    return {**head, "message": {"role": "assistant", **message}, **(end or {"done": False})}


def test_ollama_whole():
    message = {"content": "I'll read.", "thinking": "Look.", "tool_calls": [OLLAMA_CALL]}
    assert whole("ollama") == line(message, **OLLAMA_END)


def test_ollama_stream():
    assert [json.loads(row) for row in stream("ollama").splitlines()] == [
        line({"content": "", "thinking": "Look."}),
        line({"content": "I'll "}),
        line({"content": "read."}),
        line({"content": "", "tool_calls": [OLLAMA_CALL]}),
        line({"content": ""}, **OLLAMA_END),
    ]


# --- bytes ----------------------------------------------------------------------------------------


def test_the_bytes_of_a_record():
    assert writer("anthropic", stream=True).keep_alive() == b'event: ping\ndata: {"type":"ping"}\n\n'
    assert writer("openai_chat", stream=True).keep_alive() == b": keep-alive\n\n"
    assert writer("openai_responses", stream=True).keep_alive() == b": keep-alive\n\n"
    assert writer("gemini", stream=True).keep_alive() == b"\n"
    assert writer("ollama", stream=True).keep_alive() == b""
    assert writer("openai_chat", stream=True, stream_options=None).feed(TextDelta("é\n\ud800")) == (
        b'data: {"id":"resp_7","object":"chat.completion.chunk","created":1764000000,"model":"m","choices":'
        b'[{"index":0,"delta":{"content":"\\u00e9\\n\\ud800"},"logprobs":null,"finish_reason":null}]}\n\n'
    )


def test_media_types():
    of = {d: writer(d, stream=True).media_type for d in ("openai_chat", "openai_responses", "anthropic", "gemini", "ollama")}
    assert of == {
        "openai_chat": "text/event-stream",
        "openai_responses": "text/event-stream",
        "anthropic": "text/event-stream",
        "gemini": "text/event-stream",
        "ollama": "application/x-ndjson",
    }
