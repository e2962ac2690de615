"""Text beside what a human said, in every dialect: put in at its message, found again, taken out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_any_input import SAMPLES, Sample, every_dialect

from metaclaw_core.errors import SpliceError
from metaclaw_core.model import Message, Opaque, Role, Text
from metaclaw_core.wire import by_name, splice
from metaclaw_core.wire.beside import slot_beside, without_beside
from metaclaw_core.wire.reread import read

PATHS = {sample.name: sample.path for sample in SAMPLES}


def dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def users(messages: tuple[Message, ...]) -> list[int]:
    return [i for i, m in enumerate(messages) if m.role is Role.USER]


CHAT = {"role": "user", "content": "hé"}
BODIES: dict[str, list[tuple[str, dict[str, Any], str]]] = {  # name → (what, body, the message's JSON afterwards)
    "openai_chat": [
        ("a string", {"messages": [CHAT, {"role": "assistant", "content": "x"}]}, '{"role": "user", "content": "hé\\n\\nMORE"}'),
        ("an empty string", {"messages": [{"role": "user", "content": ""}]}, '{"role": "user", "content": "MORE"}'),
        (
            "a list",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "u"}}]}]},
            '{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "u"}},{"type":"text","text":"MORE"}]}',
        ),
    ],
    "openai_responses": [
        ("a string", {"input": [{"type": "function_call_output", "call_id": "c", "output": "o"}, CHAT]}, '{"role": "user", "content": "hé\\n\\nMORE"}'),
        (
            "a list",
            {"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}]},
            '{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"},{"type":"input_text","text":"MORE"}]}',
        ),
    ],
    "anthropic": [
        ("a string", {"system": "s", "messages": [CHAT]}, '{"role": "user", "content": "hé\\n\\nMORE"}'),
        (
            "results and text",
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "r"}, {"type": "text", "text": "hi"}]}]},
            '{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "r"}, {"type": "text", "text": "hi"},{"type":"text","text":"MORE"}]}',
        ),
    ],
    "gemini": [
        ("parts", {"contents": [{"parts": [{"text": "hi"}]}]}, '{"parts": [{"text": "hi"},{"text":"MORE"}]}'),
    ],
    "ollama": [
        ("a string", {"model": "m", "messages": [CHAT]}, '{"role": "user", "content": "hé\\n\\nMORE"}'),
    ],
}
CASES = [pytest.param(name, body, after, id=f"{name}, {what}") for name, cases in BODIES.items() for what, body, after in cases]


@pytest.mark.parametrize(("name", "body", "after"), CASES)
def test_it_ends_the_message_and_nothing_else_changes(name: str, body: dict[str, Any], after: str) -> None:
    dialect, path, raw = by_name(name), PATHS[name], dump({"model": "m", **body})
    reading = read(dialect, raw, path)
    (index,) = users(reading.request.messages)
    new = splice.insert(raw, slot_beside(reading, index), "MORE")
    seal = new[new.index(b"\\n<!-- metaclaw:") : new.index(b" -->") + 4]
    assert after.encode() in new.replace(seal, b"")
    read_again = dialect.parse_request(new, path).messages
    assert [m for i, m in enumerate(read_again) if i != index] == [m for i, m in enumerate(reading.request.messages) if i != index]
    assert without_beside(dialect, new, path) == (raw, ["MORE"])


@every_dialect
@given(data=st.data(), first=st.text(max_size=30), second=st.text(max_size=30))
def test_what_was_put_in_is_taken_out_again(sample: Sample, data: st.DataObject, first: str, second: str) -> None:
    """At two of the messages, or twice at one; in whatever place the block of the system prompt is put in, too."""
    body = dump(sample.request)
    reading = read(sample.dialect, body, sample.path)
    choices = st.sampled_from(users(reading.request.messages))
    at = sorted({data.draw(choices), data.draw(choices)})
    pieces = [(slot_beside(reading, index), text) for index, text in zip(at, (first, second), strict=False)]
    pieces.append((reading.slot(), "block"))
    new = body
    for slot, text in sorted(pieces, key=lambda piece: piece[0].at, reverse=True):
        new = splice.insert(new, slot, text)
    without_block = splice.remove(new, sample.dialect.system_slot(new))
    assert without_block is not None
    assert without_beside(sample.dialect, without_block[0], sample.path) == (body, [first, second][: len(at)])


@pytest.mark.parametrize(
    ("name", "body", "index", "sentence"),
    [
        ("openai_responses", {"input": "hi"}, 0, "the history is not known item by item"),
        ("openai_chat", {"messages": [{"role": "assistant", "content": "x"}]}, 0, "the message is not a user's"),
        ("anthropic", {"system": "s", "messages": [{"role": "assistant", "content": "x"}]}, 0, "the message is not a user's"),
        ("gemini", {"contents": [{"parts": {"text": "hi"}}]}, 0, "the message has no list of parts"),
        ("openai_chat", {"messages": [{"role": "user", "content": "x", "content ": 1}]}, 0, None),
    ],
)
def test_where_there_is_no_place_it_says_so(name: str, body: dict[str, Any], index: int, sentence: str | None) -> None:
    reading = read(by_name(name), dump({"model": "m", **body}), PATHS[name])
    if sentence is None:
        assert slot_beside(reading, index).form == "string"
        return
    with pytest.raises(SpliceError, match=sentence):
        slot_beside(reading, index)


def test_the_clients_own_words_that_look_like_a_piece_stay() -> None:
    forged = 'x\n<!-- metaclaw:1-0-0-0:0123456789abcdef -->'
    body = dump({"model": "m", "messages": [{"role": "user", "content": forged}]})
    assert without_beside(by_name("openai_chat"), body, PATHS["openai_chat"]) == (body, [])
    assert without_beside(by_name("openai_chat"), b"no JSON", PATHS["openai_chat"]) == (b"no JSON", [])


def test_an_image_alone_is_a_message_that_text_can_stand_beside() -> None:
    body = dump({"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]})
    dialect = by_name("openai_chat")
    new = splice.insert(body, slot_beside(read(dialect, body, PATHS["openai_chat"]), 0), "MORE")
    picture, text = dialect.parse_request(new, PATHS["openai_chat"]).messages[0].parts
    assert isinstance(picture, Opaque)
    assert isinstance(text, Text)
