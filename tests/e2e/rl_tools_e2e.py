"""For the tests of mode rl: a plain client that speaks three dialects, and what a routed session's record should hold.

Design: the client keeps a conversation as the bytes of its dialect have it, runs the tool it is asked for, and sends all
of it again (or, on the Responses API, only what is new). What it got is read by our own parsers; that the makers' clients
read the same from it is shown in test_official_clients.py.

What a prompt should be is worked out again from the proxy's flow file: the request as it was sent to the policy server, with
the history of a provider-side chain in front, rendered by a renderer that knows of no reply.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from mitmproxy import http
from mitmproxy.io import FlowReader

from metaclaw_core.model import Message, Request, Response, Role, ToolCall
from metaclaw_core.policy.canonical import reply_key
from metaclaw_core.store.samplefile import continued
from metaclaw_core.wire import by_name, find_route

URLS = {
    "openai_chat": "https://api.openai.com/v1/chat/completions",
    "openai_responses": "https://api.openai.com/v1/responses",
    "anthropic": "https://api.anthropic.com/v1/messages",
}
KEY = "sk-plain-client-0000"
_SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
_READ = {"name": "read", "description": "Read a file."}


@dataclass
class Conversation:
    """One conversation of a plain client. `linked`: on the Responses API, send what is new and name the answer before."""

    client: httpx.Client
    dialect: str
    stream: bool
    linked: bool = False
    items: list[dict[str, Any]] = field(default_factory=list)  # messages or input items
    previous: str | None = None

    def human(self, text: str) -> str:
        """The final answer to it, after as many calls as the model makes; at most three."""
        self.items.append({"role": "user", "content": text})
        for _ in range(4):
            said = self._ask()
            if not said.tool_calls:
                return said.text
            self.items += [self._result(call) for call in said.tool_calls]
        raise AssertionError("the model does not stop calling")

    def _ask(self) -> Message:
        body = {"model": "some-model", "stream": self.stream, **self._body()}
        headers = {"x-api-key": KEY} if self.dialect == "anthropic" else {"authorization": f"Bearer {KEY}"}
        answer = self.client.post(URLS[self.dialect], json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream" if self.stream else "application/json")
        response = read_answer(self.dialect, answer.content, stream=self.stream)
        assert response.complete
        assert response.message is not None
        self.previous = response.id
        self._keep(response.message)
        return response.message

    def _body(self) -> dict[str, Any]:
        match self.dialect:
            case "openai_chat":
                return {"messages": self.items, "tools": [{"type": "function", "function": {**_READ, "parameters": _SCHEMA}}]}
            case "openai_responses":
                linked = {"previous_response_id": self.previous} if self.linked and self.previous else {}
                tools = [{"type": "function", **_READ, "parameters": _SCHEMA}]
                return {"input": self.items, "tools": tools, "store": self.linked, **linked}
            case _:
                return {"messages": self.items, "tools": [{**_READ, "input_schema": _SCHEMA}], "max_tokens": 256}

    def _keep(self, said: Message) -> None:
        calls = said.tool_calls
        match self.dialect:
            case "openai_chat":
                asked = [{"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in calls]
                self.items.append({"role": "assistant", "content": said.text or None, **({"tool_calls": asked} if asked else {})})
            case "openai_responses" if self.linked:
                self.items = []
            case "openai_responses":
                if said.text:
                    self.items.append({"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": said.text}]})
                self.items += [{"type": "function_call", "call_id": c.id, "name": c.name, "arguments": c.arguments} for c in calls]
            case _:
                text = [{"type": "text", "text": said.text}] if said.text else []
                asked = [{"type": "tool_use", "id": c.id, "name": c.name, "input": json.loads(c.arguments)} for c in calls]
                self.items.append({"role": "assistant", "content": [*text, *asked]})

    def _result(self, call: ToolCall) -> dict[str, Any]:
        assert call.name == "read"
        assert json.loads(call.arguments)["path"] in ("notes.txt", "./notes.txt")
        match self.dialect:
            case "openai_chat":
                return {"role": "tool", "tool_call_id": call.id, "content": "remember the milk"}
            case "openai_responses":
                return {"type": "function_call_output", "call_id": call.id, "output": "remember the milk"}
            case _:
                return {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "remember the milk"}]}


def read_answer(dialect: str, body: bytes, *, stream: bool) -> Response:
    """Raises WireError."""
    if not stream:
        return by_name(dialect).parse_response(body)
    parser = by_name(dialect).stream_parser()
    parser.feed(body)
    return parser.finish()


@dataclass(frozen=True)
class Sent:
    """One request that the policy server answered, and its answer, as the proxy's flow file has them."""

    flow_id: str
    session: str
    request: Request  # with the whole conversation in it
    said: Message


def sent(file: Path, sessions: Mapping[str, str]) -> Iterator[Sent]:
    """In the order of their ends. `sessions`: of the flows that are wanted, by flow id."""
    chains: dict[str, tuple[Message, ...]] = {}
    with file.open("rb") as opened:
        flows = [flow for flow in FlowReader(opened).stream() if isinstance(flow, http.HTTPFlow) and flow.id in sessions]
    for flow in flows:
        found = find_route(flow.request.method, flow.request.path)
        assert found is not None
        request = found[0].parse_request(flow.request.content or b"", flow.request.path)
        assert flow.response is not None
        response = read_answer(found[0].name, flow.response.content or b"", stream=request.stream)
        assert response.message is not None
        if request.previous_response_id is not None:
            request = replace(request, messages=continued(chains[request.previous_response_id], request.messages))
        if response.id is not None:
            chains[response.id] = (*request.messages, response.message)
        yield Sent(flow.id, sessions[flow.id], request, response.message)


class Nothing:
    """Satisfies `render.Known`: no reply is known, so all text is tokenised."""

    def tokens_of(self, key: str) -> Sequence[int] | None:
        return None


@dataclass
class Reuse:
    """What a session's replies should have become in its later prompts."""

    _replies: dict[tuple[str, str], Sequence[int]] = field(default_factory=dict)  # (session, key) → ids

    def expected(self, one: Sent) -> list[Sequence[int]]:
        """The sampled ids of each assistant message that came back as it was sent, in their order."""
        keys = [(one.session, reply_key(message)) for message in one.request.messages if message.role is Role.ASSISTANT]
        return [self._replies[key] for key in keys if key in self._replies]

    def add(self, one: Sent, ids: Sequence[int]) -> None:
        self._replies[one.session, reply_key(one.said)] = ids


def holds_in_order(prompt: Sequence[int], pieces: Sequence[Sequence[int]]) -> bool:
    """Is each piece in the prompt, whole, after the one before?"""
    at = 0
    for piece in pieces:
        wanted = list(piece)
        found = next((i for i in range(at, len(prompt) - len(wanted) + 1) if prompt[i] == wanted[0] and list(prompt[i : i + len(wanted)]) == wanted), None)
        if found is None:
            return False
        at = found + len(wanted)
    return True
