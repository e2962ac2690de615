"""The makers' own clients (JavaScript, from OpenClaw's kit) read our answers: with their checks of order, ids and indexes."""

from __future__ import annotations

import json
import subprocess
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from openclaw_tools import KIT

from metaclaw_core.model import Request, StopReason, Usage
from metaclaw_core.wire import by_name
from metaclaw_core.wire.answer import Call, Event, ReasoningDelta, TextDelta, answer_writer, error_body

pytestmark = pytest.mark.openclaw

SCRIPT = Path(__file__).with_name("official_clients.mjs")
CLIENTS = ("openai_chat", "openai_responses", "anthropic", "gemini")
PATHS = {
    "openai_chat": "/v1/chat/completions",
    "openai_responses": "/v1/responses",
    "anthropic": "/v1/messages",
    "gemini": "/v1beta/models/m:streamGenerateContent?alt=sse",
}
SAID: list[Event] = [
    ReasoningDelta("Hm, "),
    ReasoningDelta("日本."),
    TextDelta("I'll "),
    TextDelta("read\n\ndata: é."),
    Call("read", '{"path": "a"}', "call_1"),
    Call("ls", "{}", "call_2"),
]
ARGUMENTS = [{"path": "a"}, {}]
TEXT = "I'll read\n\ndata: é."


def asked(client: str) -> Request:
    body: dict[str, Any] = {"model": "m", "stream_options": {"include_usage": True}, "thinking": {"type": "adaptive"}}
    body |= {"input": "Read a.", "store": False} if client == "openai_responses" else {"messages": [{"role": "user", "content": "Read a."}]}
    if client == "gemini":
        body = {"contents": {"parts": {"text": "Read a."}}, "generationConfig": {"thinkingConfig": {"includeThoughts": True}}}
    return by_name(client).parse_request(json.dumps(body).encode(), PATHS[client])


def answer(client: str, *, stream: bool, fail: bool = False) -> dict[str, Any]:
    to = answer_writer(
        client, asked(client), model="m", response_id="resp_7", created=1.7e9, stream=stream, path=PATHS[client]
    )
    body = to.start() + to.keep_alive()
    for event in SAID:
        body += to.feed(event) + to.keep_alive()
    usage = Usage(10, 5, cached_tokens=4, reasoning_tokens=2)
    body += to.fail("The sampler is gone.") if fail else to.finish(StopReason.STOP, usage)
    return case(client, body, stream=stream, type=to.media_type)


def case(client: str, body: bytes, *, stream: bool, type: str = "application/json", status: int = 200) -> dict[str, Any]:
    return {"client": client, "stream": stream, "type": type, "status": status, "body": b64encode(body).decode()}


def understood(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    command = [str(KIT / "node_modules/.bin/node"), "--input-type=module", "-e", SCRIPT.read_text()]
    done = subprocess.run(command, input=json.dumps(cases), cwd=KIT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    got: list[dict[str, Any]] = json.loads(done.stdout)
    return got


def summary(client: str, got: Any) -> dict[str, Any]:
    """What each client's own object says, in one shape."""
    if client == "openai_chat":
        (choice,) = got["choices"]
        message, calls = choice["message"], choice["message"]["tool_calls"]
        return {
            "text": message["content"],
            "thought": message["reasoning_content"],
            "calls": [(c["id"], c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls],
            "stop": choice["finish_reason"],
            "counts": (got["usage"]["prompt_tokens"], got["usage"]["completion_tokens"]),
        }
    if client == "openai_responses":
        reasoned, *_ = got["output"]
        calls = [item for item in got["output"] if item["type"] == "function_call"]
        return {
            "text": got["output_text"],
            "thought": reasoned["summary"][0]["text"],
            "calls": [(c["call_id"], c["name"], json.loads(c["arguments"])) for c in calls],
            "stop": got["status"],
            "counts": (got["usage"]["input_tokens"], got["usage"]["output_tokens"]),
        }
    if client == "anthropic":
        thought, text, *calls = got["content"]
        return {
            "text": text["text"],
            "thought": thought["thinking"],
            "calls": [(c["id"], c["name"], c["input"]) for c in calls],
            "stop": got["stop_reason"],
            "counts": (got["usage"]["input_tokens"] + got["usage"]["cache_read_input_tokens"], got["usage"]["output_tokens"]),
        }
    records = got if isinstance(got, list) else [got]
    parts = [part for record in records for part in record["candidates"][0]["content"]["parts"]]
    counts = records[-1]["usageMetadata"]
    calls = [part["functionCall"] for part in parts if "functionCall" in part]
    return {
        "text": "".join(p["text"] for p in parts if "text" in p and not p.get("thought")),
        "thought": "".join(p["text"] for p in parts if p.get("thought")),
        "calls": [(c["id"], c["name"], c["args"]) for c in calls],
        "stop": records[-1]["candidates"][0]["finishReason"],
        "counts": (counts["promptTokenCount"], counts["candidatesTokenCount"] + counts["thoughtsTokenCount"]),
    }


STOP = {"openai_chat": "tool_calls", "openai_responses": "completed", "anthropic": "tool_use", "gemini": "STOP"}


def test_the_makers_clients_read_what_was_said():
    cases = [answer(client, stream=stream) for client in CLIENTS for stream in (True, False)]
    for asked_for, told in zip(cases, understood(cases), strict=True):
        client = asked_for["client"]
        assert "got" in told, (client, asked_for["stream"], told)
        # OpenAI's client keeps the last piece of a field that it does not know.
        last_only = client == "openai_chat" and asked_for["stream"]
        assert summary(client, told["got"]) == {
            "text": TEXT,
            "thought": "日本." if last_only else "Hm, 日本.",
            "calls": [("call_1", "read", ARGUMENTS[0]), ("call_2", "ls", ARGUMENTS[1])],
            "stop": STOP[client],
            "counts": (10, 5),
        }


def test_the_makers_clients_hear_of_an_error_in_the_middle():
    chat, responses, anthropic, gemini = understood([answer(client, stream=True, fail=True) for client in CLIENTS])
    assert chat["threw"] == "The sampler is gone."
    assert responses["got"]["status"] == "failed"
    assert responses["got"]["error"] == {"code": "server_error", "message": "The sampler is gone."}
    assert json.loads(anthropic["threw"])["error"] == {"type": "api_error", "message": "The sampler is gone."}
    assert gemini["threw"] == "Incomplete JSON segment at the end"  # it reads the error itself only where that comes alone


def test_the_makers_clients_hear_of_an_error_before_the_answer():
    told = understood([case(c, error_body(c, 503, "Not ready.", "server_error"), stream=True, status=503) for c in CLIENTS])
    assert [t["status"] for t in told] == [503, 503, 503, 503]
    assert ["Not ready." in t["threw"] for t in told] == [True, True, True, True]
