"""The short way for a tool loop must say what the full parse says, or nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaclaw_core.agents import identify
from metaclaw_core.agents.base import hints_from_headers
from metaclaw_core.model import Kind
from metaclaw_core.prefix import Known
from metaclaw_core.proxy.continuation import MAX_ENTRIES, Continuations, Seen
from metaclaw_core.wire import by_name, find_route

CARRIER = "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\nx\n<<<END_OPENCLAW_INTERNAL_CONTEXT>>>"
SYSTEM = "<!-- openclaw:attempt:STABLE -->\nbe good, {\n<!-- openclaw:attempt:DYNAMIC -->"
RUNTIME = "Runtime: agent=main | session=agent:main:main | sessionId=5c89be32-3adc-43ec-b0fd-efea88de0220 | shell=bash"
HINTS = hints_from_headers({"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"})


def chat(*messages: Any, parameters: Any = None) -> bytes:
    human = {"role": "user", "content": f"[Mon 2026-11-23 20:38 UTC] read my notes\n\n{RUNTIME}"}
    every = [{"role": "system", "content": SYSTEM}, human, *messages]
    function = {"name": "read"} if parameters is None else {"parameters": parameters, "name": "read"}
    tools = [{"type": "function", "function": function}]
    return json.dumps({"model": "m", "messages": every, "tools": tools}, separators=(",", ":")).encode()


def seen(body: bytes, dialect: str = "openai_chat") -> Seen:
    request = by_name(dialect).parse_request(body, "/v1/chat/completions")
    identity = identify(request, HINTS)
    return Seen(Known(body), identity, "s", by_name(dialect).system_slot(body), len(request.messages))


def call(n: int) -> dict[str, Any]:
    function = {"name": "read", "arguments": json.dumps({"path": f"n{n},{{"})}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": f"c{n}", "type": "function", "function": function}]}


def result(n: int, text: str = "milk") -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": f"c{n}"}


TAIL = {"role": "user", "content": [{"type": "text", "text": CARRIER}]}
FIRST = chat(TAIL)


@pytest.mark.parametrize("name", ["openai-completions", "anthropic-messages-native", "google-generative-ai-native", "ollama"])
def test_every_tool_loop_of_the_recordings_is_recognised_as_the_full_parse_does(capture, name):
    last: dict[str, Seen] = {}
    continued = 0
    for flow in capture(name):
        found = find_route("POST", flow.request.path)
        assert found
        dialect, body = found[0], flow.request.raw_content
        hints = hints_from_headers(flow.request.headers)
        request = dialect.parse_request(body, flow.request.path)
        identity = identify(request, hints)
        memory = Continuations()
        if hints.trace_id in last:
            memory.remember("k", last[hints.trace_id])
        short = memory.next_of("k", body)
        full = Seen(Known(body), identity, "s", dialect.system_slot(body), len(request.messages))
        if short is not None:
            continued += 1
            assert short.identity == identity
            assert short.slot == full.slot
        assert (short is not None) == (identity.kind is Kind.TOOL and hints.trace_id in last)
        last[hints.trace_id] = full
    assert continued >= 1


def test_a_loop_of_many_rounds_is_followed_from_one_to_the_next():
    memory = Continuations()
    memory.remember("k", seen(FIRST))
    history: list[Any] = []
    for n in range(5):
        history += [call(n), result(n, "ü" * n)]
        body = chat(*history, TAIL)
        short = memory.next_of("k", body)
        assert short is not None
        assert short.identity == identify(by_name("openai_chat").parse_request(body, "/"), HINTS)
        assert short.slot == by_name("openai_chat").system_slot(body)
        assert short.messages == 3 + 2 * (n + 1)


HUMAN = {"role": "user", "content": "[Mon 2026-11-23 20:39 UTC] stop"}


@pytest.mark.parametrize(
    ("what", "body"),
    [
        ("the same again: a retry", FIRST),
        ("a human speaks after the results", chat(call(0), result(0), HUMAN, TAIL)),
        ("a system message has come", chat(call(0), result(0), {"role": "system", "content": "new rules"}, TAIL)),
        ("the human's own message has changed", chat(call(0), result(0), TAIL).replace(b"read my notes", b"read all notes")),
        ("the system prompt has changed", chat(call(0), result(0), TAIL).replace(b"be good", b"be bad")),
        ("the tools have changed", chat(call(0), result(0), TAIL).replace(b'{"name":"read"}}]', b'{"name":"write"}}]')),
        ("no result: only a call", chat(call(0), TAIL)),
        ("cut off", chat(call(0), result(0), TAIL)[:-30]),
        ("something after the end", chat(call(0), result(0), TAIL) + b"x"),
        ("an image of the user's", chat(call(0), result(0), {"role": "user", "content": [{"type": "image_url"}]}, TAIL)),
        ("no JSON", b"{"),
        ("nothing", b""),
    ],
)
def test_what_is_no_continuation_is_left_to_the_full_parse(what, body):
    memory = Continuations()
    memory.remember("k", seen(FIRST))
    assert memory.next_of("k", body) is None


def test_a_tools_example_of_a_conversation_is_not_taken_for_the_history():
    examples = [{"role": "user", "content": CARRIER}, {"role": "tool", "content": "milk"}]
    first, again = (chat(TAIL, parameters={"examples": more}) for more in (examples, [*examples, examples[0]]))
    memory = Continuations()
    memory.remember("k", seen(first))
    assert memory.next_of("k", first) is None
    assert memory.next_of("k", again) is None
    assert memory.next_of("k", chat(call(0), result(0), TAIL, parameters={"examples": examples})) is not None


def test_a_side_turns_loop_and_a_subagents_keep_their_kind():
    memory = Continuations()
    memory.remember("k", replace(seen(FIRST), identity=replace(seen(FIRST).identity, kind=Kind.SUBAGENT)))
    short = memory.next_of("k", chat(call(0), result(0), TAIL))
    assert short is not None
    assert short.identity.kind is Kind.SUBAGENT


def test_the_memory_is_bounded_and_another_turn_is_another_key():
    memory = Continuations()
    for n in range(MAX_ENTRIES + 5):
        memory.remember(f"k{n}", seen(FIRST))
    body = chat(call(0), result(0), TAIL)
    assert memory.next_of("k0", body) is None
    assert memory.next_of("other", body) is None
    assert memory.next_of(f"k{MAX_ENTRIES}", body) is not None


@given(st.data())
def test_whatever_bytes_change_a_continuation_that_is_accepted_is_a_request_with_the_same_parts_around_it(data):
    good = chat(call(0), result(0, data.draw(st.text(max_size=20))), TAIL)
    at = data.draw(st.integers(0, len(good)))
    body = good[:at] + data.draw(st.binary(max_size=4)) + good[at + data.draw(st.integers(0, 6)) :]
    memory = Continuations()
    memory.remember("k", seen(FIRST))
    short = memory.next_of("k", body)
    if short is not None:
        request = by_name("openai_chat").parse_request(body, "/")
        assert request.system == by_name("openai_chat").parse_request(FIRST, "/").system
        assert identify(request, HINTS).session_id == short.identity.session_id
        assert by_name("openai_chat").system_slot(body) == short.slot


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


@pytest.mark.parametrize("dialect", ["openai_chat", "anthropic"])
@given(st.data())
def test_whatever_history_follows_is_what_the_full_parse_finds_or_is_left_to_it(dialect: str, data):
    items = st.builds(turn_of, st.just(dialect), st.sampled_from(["call", "result", "result", "user", "assistant"]), st.sampled_from(TEXTS))
    round_ = st.builds(lambda a, b: [turn_of(dialect, "call", a), turn_of(dialect, "result", b)], st.sampled_from(TEXTS), st.sampled_from(TEXTS))
    old = [item for one in data.draw(st.lists(round_, max_size=2)) for item in one]
    new = [*old, *data.draw(st.one_of(round_, st.lists(items, max_size=3)))]
    if new and data.draw(st.booleans()):
        new[data.draw(st.integers(0, len(new) - 1))] = data.draw(items)
    tail = data.draw(st.lists(st.builds(turn_of, st.just(dialect), st.just("user"), st.sampled_from(TEXTS)), max_size=1))

    def body(history: list[Any]) -> bytes:
        whole = json.loads(chat(*history, *tail))
        if dialect == "anthropic":
            whole = {"messages": whole["messages"][1:], "tools": whole["tools"], "system": SYSTEM}
        return json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()

    memory = Continuations()
    memory.remember("k", seen(body(old), dialect))
    short = memory.next_of("k", body(new))
    if short is not None:
        full = seen(body(new), dialect)
        assert (short.slot, short.identity.session_id) == (full.slot, full.identity.session_id)
        assert (short.identity.kind, short.identity.human_texts) == (full.identity.kind, full.identity.human_texts)
