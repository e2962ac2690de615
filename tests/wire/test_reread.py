"""What is read by a body before must be what the full parse gives, whatever has changed between the two."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaclaw_core.errors import SpliceError, WireError
from metaclaw_core.wire import by_name, find_route
from metaclaw_core.wire.base import Slot
from metaclaw_core.wire.reread import Reading, read, reread

PATHS = {
    "openai_chat": "/v1/chat/completions",
    "openai_responses": "/v1/responses",
    "anthropic": "/v1/messages",
    "gemini": "/v1beta/models/m:generateContent",
    "ollama": "/api/chat",
}
TURNS = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "call", "result", "system"]), st.sampled_from(["a", "bc", "é{", ",{\"", "]}", ""])),
    min_size=1,
    max_size=6,
)


def chat(turns: list[tuple[str, str]], system: str, more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "system", "content": system}, *map(chat_item, turns)], "tools": [], "user": more}


def chat_item(turn: tuple[str, str]) -> dict[str, Any]:
    role, text = turn
    if role == "call":
        return {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": text}}]}
    return {"role": "tool", "content": text, "tool_call_id": "c"} if role == "result" else {"role": role, "content": text}


def ollama(turns: list[tuple[str, str]], system: str, more: Any) -> dict[str, Any]:
    items = [{"role": {"call": "assistant", "result": "tool"}.get(role, role), "content": text} for role, text in turns]
    return {"model": "m", "messages": [{"role": "system", "content": system}, *items], "keep_alive": more}


def responses(turns: list[tuple[str, str]], system: str, more: Any) -> dict[str, Any]:
    items: list[dict[str, Any]] = []
    for role, text in turns:
        if role == "call":
            items.append({"type": "function_call", "name": "f", "arguments": text, "call_id": "c"})
        elif role == "result":
            items.append({"type": "function_call_output", "output": text, "call_id": "c"})
        else:
            items.append({"role": role, "content": [{"type": "input_text", "text": text}]})
    return {"model": "m", "input": items, "instructions": system, "metadata": {"x": more}}


def anthropic(turns: list[tuple[str, str]], system: str, more: Any) -> dict[str, Any]:
    items: list[dict[str, Any]] = []
    for role, text in turns:
        if role == "call":
            items.append({"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"x": text}}]})
        elif role == "result":
            result = {"type": "tool_result", "tool_use_id": "c", "content": text}
            items.append({"role": "user", "content": [result, {"type": "text", "text": text}]})
        else:
            items.append({"role": role, "content": text})
    return {"model": "m", "messages": items, "system": [{"type": "text", "text": system}], "metadata": {"user_id": more}}


def gemini(turns: list[tuple[str, str]], system: str, more: Any) -> dict[str, Any]:
    roles = {"assistant": "model", "call": "model", "result": "function", "system": "user"}
    items = []
    for role, text in turns:
        part: dict[str, Any] = {"functionResponse": {"name": "f", "response": {"output": text}}} if role == "result" else {"text": text}
        items.append({"role": roles.get(role, role), "parts": [part, {"text": text}]})
    return {"contents": items, "systemInstruction": {"parts": [{"text": system}]}, "labels": {"x": more}}


BODIES = {"openai_chat": chat, "ollama": ollama, "openai_responses": responses, "anthropic": anthropic, "gemini": gemini}
SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " : ")])


@st.composite
def pairs(draw: st.DrawFn) -> tuple[str, bytes, bytes]:
    """A dialect, and two bodies of which the second often grows out of the first."""
    name = draw(st.sampled_from(sorted(BODIES)))
    separators = draw(SEPARATORS)
    turns = draw(TURNS)
    other = list(turns)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(other)))
        other[at : at + draw(st.integers(0, 2))] = draw(TURNS)[: draw(st.integers(0, 3))]
    system, more = "rules é", "x"
    first = BODIES[name](turns, system, more)
    second = BODIES[name](other, draw(st.sampled_from([system, "rules è", "longer rules"])), draw(st.sampled_from([more, "y", "long"])))
    ascii_only = draw(st.booleans())
    a, b = (json.dumps(v, separators=separators, ensure_ascii=ascii_only).encode() for v in (first, second))
    return name, a, b


def slot_of(reading: Reading) -> Slot | None:
    try:
        return reading.slot()
    except SpliceError:
        return None


def check(name: str, first: bytes, second: bytes) -> bool:
    """Was the second body read by the first? If so, every field is the full parse's."""
    dialect, path = by_name(name), PATHS[name]
    old = read(dialect, first, path)
    assert old.request == dialect.parse_request(first, path)
    slot_of(old)
    short = reread(old, second, path)
    if short is None:
        return False
    full = read(dialect, second, path)
    assert short.request == full.request == dialect.parse_request(second, path)
    assert full.close >= 0
    assert (short.starts, short.ends, short.places, short.close) == (full.starts, full.ends, full.places, full.close)
    assert slot_of(short) == slot_of(full)
    again = reread(short, second, path)
    assert again is not None
    assert again.request == full.request
    return True


@settings(max_examples=600)
@given(pairs())
def test_a_body_that_grew_out_of_another_reads_as_if_it_stood_alone(pair):
    check(*pair)


@settings(max_examples=600)
@given(pairs(), st.data())
def test_whatever_bytes_change_what_is_read_is_what_the_full_parse_says_or_nothing(pair, data):
    name, first, second = pair
    at = data.draw(st.integers(0, len(second)))
    change = data.draw(st.binary(max_size=3) | st.sampled_from([b"]", b",", b'"', b"{", b"}", b"[", b"],[", b"NaN,"]))
    broken = second[:at] + change + second[at + data.draw(st.integers(0, 3)) :]
    dialect, path = by_name(name), PATHS[name]
    short = reread(read(dialect, first, path), broken, path)
    if short is not None:
        assert short.request == dialect.parse_request(broken, path)


ROUND = [("user", "do it"), ("call", "x"), ("result", "milk"), ("assistant", "done"), ("user", "thanks")]


@pytest.mark.parametrize("name", sorted(BODIES))
@pytest.mark.parametrize(
    ("what", "turns", "system", "more"),
    [
        ("one more turn", [*ROUND, ("assistant", "welcome"), ("user", "more")], "rules", "x"),
        ("items in the middle", [*ROUND[:2], ("result", "é"), ("call", "y"), *ROUND[2:]], "rules", "x"),
        ("fewer", ROUND[:3], "rules", "x"),
        ("the same", ROUND, "rules", "x"),
        ("another last word", [*ROUND[:-1], ("user", "no!")], "rules", "x"),
        ("another tail", [*ROUND[:-1], ("user", "no!")], "rules", "other"),
    ],
)
def test_the_usual_changes_are_read_by_the_body_before(name, what, turns, system, more):
    make = BODIES[name]
    first, second = (json.dumps(b, separators=(",", ":"), ensure_ascii=False).encode() for b in (make(ROUND, "rules", "x"), make(turns, system, more)))
    assert check(name, first, second)


@pytest.mark.parametrize("name", ["openai-completions", "anthropic-messages-native", "google-generative-ai-native", "ollama", "openai-responses-native-codemode"])
def test_each_request_of_a_recording_is_read_by_the_one_before(capture, name):
    last: Reading | None = None
    shorter = 0
    for flow in capture(name):
        found = find_route("POST", flow.request.path)
        assert found
        dialect, body, path = found[0], flow.request.raw_content, flow.request.path
        full = read(dialect, body, path)
        assert full.request == dialect.parse_request(body, path)
        if last is not None and (short := reread(last, body, path)) is not None:
            shorter += 1
            assert short.request == full.request
            assert (short.starts, short.places, slot_of(short)) == (full.starts, full.places, slot_of(full))
        slot_of(full)
        last = full
    assert shorter >= 1


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("a key twice", (b'"tools":[]', b'"model":"n"')),
        ("the history twice", (b'"tools":[]', b'"messages":[]')),
        ("a comma too many", (b'}],"tools"', b'},],"tools"')),
        ("NaN", (b'"content":"thanks"', b'"content":NaN')),
        ("a word that is no role", (b'"role":"user","content":"thanks"', b'"role":"bird","content":"thanks"')),
        ("cut off", (b'"user":"x"}', b'"user":"x"')),
        ("something behind the end", (b'"user":"x"}', b'"user":"x"}x')),
        ("another model", (b'"model":"m"', b'"model":"n"')),
    ],
)
def test_what_is_not_proven_is_left_to_the_full_parse(what, change):
    first = json.dumps(chat(ROUND, "rules", "x"), separators=(",", ":")).encode()
    second = first.replace(*change)
    assert second != first
    dialect = by_name("openai_chat")
    assert reread(read(dialect, first, PATHS["openai_chat"]), second, PATHS["openai_chat"]) is None


def test_a_body_that_is_none_of_its_dialect_raises_as_the_full_parse_does():
    with pytest.raises(WireError, match="not JSON"):
        read(by_name("openai_chat"), b"{", "/v1/chat/completions")
    with pytest.raises(WireError, match=r"messages\[0\].role"):
        read(by_name("openai_chat"), b'{"messages":[{"role":"x"}]}', "/v1/chat/completions")
