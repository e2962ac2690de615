"""Requests that are read by the ones before them are rewritten as if each stood alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaclaw_core.agents import identify
from metaclaw_core.agents.base import hints_from_headers
from metaclaw_core.errors import SpliceError
from metaclaw_core.model import Kind
from metaclaw_core.proxy.recent import MAX_BYTES, MAX_ENTRIES, Recent
from metaclaw_core.wire import by_name, find_route
from metaclaw_core.wire.base import Slot
from metaclaw_core.wire.reread import Reading

CARRIER = "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\nx\n<<<END_OPENCLAW_INTERNAL_CONTEXT>>>"
SYSTEM = "<!-- openclaw:attempt:STABLE -->\nbe good, {\n<!-- openclaw:attempt:DYNAMIC -->"
RUNTIME = "Runtime: agent=main | session=agent:main:main | sessionId=5c89be32-3adc-43ec-b0fd-efea88de0220 | shell=bash"
HINTS = hints_from_headers({"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"})
CHAT, PATH = by_name("openai_chat"), "/v1/chat/completions"
TAIL = {"role": "user", "content": [{"type": "text", "text": CARRIER}]}


def chat(*messages: Any) -> bytes:
    human = {"role": "user", "content": f"[Mon 2026-11-23 20:38 UTC] read my notes\n\n{RUNTIME}"}
    every = [{"role": "system", "content": SYSTEM}, human, *messages]
    tools = [{"type": "function", "function": {"name": "read"}}]
    return json.dumps({"model": "m", "messages": every, "tools": tools}, separators=(",", ":")).encode()


def call(n: int) -> dict[str, Any]:
    function = {"name": "read", "arguments": json.dumps({"path": f"n{n},{{"})}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": f"c{n}", "type": "function", "function": function}]}


def result(n: int, text: str = "milk") -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": f"c{n}"}


def slot_of(reading: Reading) -> Slot | str:
    try:
        return reading.slot()
    except SpliceError as e:
        return str(e)


def test_a_long_conversation_is_read_by_its_own_request_though_the_newest_is_a_short_one_with_the_same_beginning():
    recent = Recent()
    notes = [message for n in range(40) for message in (call(n), result(n, "milk " * 20))]
    long, short = chat(*notes), chat(call(0))
    for session, body in (("long", long), ("short", short)):
        recent.keep(session, "p", recent.read(CHAT, body, PATH, "p")[0])
    for body, own in ((chat(*notes, call(40)), long), (chat(call(0), result(0)), short)):
        like = recent.read(CHAT, body, PATH, "p")[1]
        assert like is not None
        assert like.other is own


@pytest.mark.parametrize("name", ["openai-completions", "anthropic-messages-native", "google-generative-ai-native", "ollama", "subagent-openai-completions", "heartbeat-openai-completions", "compaction-openai-completions"])
def test_of_a_recording_every_request_has_the_identity_and_the_place_of_the_full_parse(capture, name):
    recent = Recent()
    for flow in capture(name):
        if (found := find_route("POST", flow.request.path)) is None or not flow.request.raw_content:
            continue
        dialect, body, path = found[0], flow.request.raw_content, flow.request.path
        hints = hints_from_headers(flow.request.headers)
        reading = recent.read(dialect, body, path, "p")[0]
        assert reading.request == dialect.parse_request(body, path)
        assert identify(reading.request, hints) == identify(dialect.parse_request(body, path), hints)
        try:
            place: Slot | str = dialect.system_slot(body)
        except SpliceError as e:
            place = str(e)
        assert slot_of(reading) == place
        recent.keep(hints.session_id or "s", "p", reading)


def test_a_loop_of_many_rounds_is_read_from_one_to_the_next_without_a_full_parse():
    recent = Recent()
    recent.keep("s", "p", recent.read(CHAT, chat(TAIL), PATH, "p")[0])
    history: list[Any] = []
    for n in range(5):
        history += [call(n), result(n, "ü" * n)]
        body = chat(*history, TAIL)
        reading = recent.read(CHAT, body, PATH, "p")[0]
        system = recent._readings["s"][1].request.messages[0]
        assert reading.request.messages[0] is system  # not decoded again
        identity = identify(reading.request, HINTS)
        assert identity == identify(CHAT.parse_request(body, PATH), HINTS)
        assert identity.kind is Kind.TOOL
        recent.keep("s", "p", reading)


def test_another_callers_requests_and_another_dialects_are_not_built_upon():
    recent = Recent()
    first = recent.read(CHAT, chat(), PATH, "p")[0]
    recent.keep("s", "p", first)
    for dialect, path, caller in ((CHAT, PATH, "q"), (CHAT, "/other/chat/completions", "p"), (by_name("ollama"), PATH, "p")):
        other = recent.read(dialect, chat(), path, caller)[0]
        assert other.request.messages[1] is not first.request.messages[1]


def test_the_first_request_of_a_session_is_read_by_another_sessions():
    recent = Recent()
    first = recent.read(CHAT, chat(call(0), result(0), TAIL), PATH, "p")[0]
    recent.keep("s", "p", first)
    other = chat(call(0), result(0), TAIL).replace(b"5c89be32", b"00000000")
    reading = recent.read(CHAT, other, PATH, "p")[0]
    assert reading.request == CHAT.parse_request(other, PATH)
    assert reading.request.messages[-1] is first.request.messages[-1]
    assert identify(reading.request, HINTS).session_id == "00000000-3adc-43ec-b0fd-efea88de0220"


def test_the_memory_is_bounded_in_entries_and_bytes():
    recent = Recent()
    for n in range(MAX_ENTRIES + 5):
        recent.keep(f"s{n}", "p", recent.read(CHAT, chat(TAIL), PATH, "p")[0])
    assert len(recent._readings) == MAX_ENTRIES
    large = chat(result(0, "x" * (MAX_BYTES // 2)), TAIL)
    for n in range(3):
        recent.keep(f"l{n}", "p", recent.read(CHAT, large, PATH, "p")[0])
    assert list(recent._readings) == ["l2"]
    recent.keep("l3", "p", recent.read(CHAT, chat(result(0, "x" * MAX_BYTES), TAIL), PATH, "p")[0])
    assert (len(recent._readings), recent._bytes) == (0, 0)


TEXTS = ["milk", "a,{", "}]", ',{"role":"tool","content":"', '"', "\\", "ü", "[Mon 2026-11-23 20:38 UTC] stop", CARRIER, CARRIER + " more"]


def turn_of(dialect: str, what: str, text: str) -> dict[str, Any]:
    """One item of the history: a call whose arguments look like a history, its result, a human, an answer."""
    decoy = {"messages": [{"role": "user", "content": text}, {"role": "tool", "content": text}], "system": text}
    if dialect == "openai_chat":
        function = {"name": "read", "arguments": json.dumps(decoy)}
        asks = {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]}
        return {"call": asks, "result": result(0, text)}.get(what) or {"role": what, "content": text}
    if what == "call":
        return {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "read", "input": decoy}]}
    if what == "result":
        return {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": text}]}
    return {"role": what, "content": [{"type": "text", "text": text}]}


@settings(max_examples=60)
@pytest.mark.parametrize("name", ["openai_chat", "anthropic"])
@given(st.data())
def test_whatever_history_follows_its_identity_and_place_are_those_of_the_full_parse(name: str, data: st.DataObject):
    dialect, path = by_name(name), {"openai_chat": PATH, "anthropic": "/v1/messages"}[name]
    items = st.builds(turn_of, st.just(name), st.sampled_from(["call", "result", "result", "user", "assistant"]), st.sampled_from(TEXTS))
    recent, history = Recent(), data.draw(st.lists(items, max_size=3))
    for _ in range(3):
        if history and data.draw(st.booleans()):
            history[data.draw(st.integers(0, len(history) - 1))] = data.draw(items)
        history = [*history, *data.draw(st.lists(items, max_size=3))]
        whole = json.loads(chat(*history, *data.draw(st.lists(items, max_size=1))))
        if name == "anthropic":
            whole = {"messages": whole["messages"][1:], "tools": whole["tools"], "system": SYSTEM}
        body = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
        reading = recent.read(dialect, body, path, "p")[0]
        full = dialect.parse_request(body, path)
        assert reading.request == full
        assert identify(reading.request, HINTS) == identify(full, HINTS)
        assert slot_of(reading) == dialect.system_slot(body)
        recent.keep("s", "p", reading)
