"""What the tests of the answers share: a writer's output for a request, and the records in a stream."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from metaclaw_core.model import Request, StopReason, Usage
from metaclaw_core.wire import by_name
from metaclaw_core.wire.answer import AnswerWriter, Event, answer_writer
from metaclaw_core.wire.sse import SSESplitter

DIALECTS = ("openai_chat", "openai_responses", "anthropic", "gemini", "ollama")
CREATED = 1_764_000_000.25
MESSAGES = [{"role": "user", "content": "Read a."}]
GEMINI_PATH = "/v1beta/models/m:streamGenerateContent"
# Requests that ask for all that the form can tell: reasoning, and the usage of a stream.
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "openai_chat": (
        "/v1/chat/completions",
        {"model": "m", "messages": MESSAGES, "stream_options": {"include_usage": True}},
    ),
    "openai_responses": ("/v1/responses", {"model": "m", "input": MESSAGES, "store": False}),
    "anthropic": ("/v1/messages", {"model": "m", "messages": MESSAGES, "thinking": {"type": "adaptive"}}),
    "gemini": (
        f"{GEMINI_PATH}?alt=sse",
        {
            "contents": [{"role": "user", "parts": [{"text": "Read a."}]}],
            "generationConfig": {"thinkingConfig": {"includeThoughts": True}},
        },
    ),
    "ollama": ("/api/chat", {"model": "m", "messages": MESSAGES, "think": True}),
}


def request(dialect: str, **more: Any) -> Request:
    path, body = BODIES[dialect]
    return by_name(dialect).parse_request(json.dumps(body | more).encode(), path)


def writer(dialect: str, *, stream: bool, path: str | None = None, **more: Any) -> AnswerWriter:
    """For the request that asks for everything, with `more` fields in its body."""
    path = BODIES[dialect][0] if path is None else path
    given = request(dialect, **more)
    return answer_writer(
        dialect, given, model="m", response_id="resp_7", created=CREATED, stream=stream, path=path
    )


def write(
    to: AnswerWriter, events: Iterable[Event], stop: StopReason = StopReason.STOP, usage: Usage | None = None, at: str | None = None
) -> bytes:
    return b"".join((to.start(), *map(to.feed, events), to.finish(stop, usage or Usage(10, 5), at)))


def records(stream: bytes) -> list[Any]:
    """The data of each server-sent event; "[DONE]" stays a string."""
    splitter = SSESplitter()
    events = [*splitter.feed(stream), *splitter.flush()]
    found = [e.data if e.data == "[DONE]" else json.loads(e.data) for e in events]
    names = [data.get("type", "message") if isinstance(data, dict) else "message" for data in found]
    assert [e.event for e in events] == names
    return found
