"""What makes two messages the same, and what is kept of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaclaw_core.model import Message, Opaque, Part, Reasoning, Role, Text, ToolCall, ToolResult
from metaclaw_core.store.chain import (
    chain_ids,
    message_id,
    pack_message,
    redact_message,
    rederived,
    unpack_message,
    unplaced,
)
from metaclaw_core.store.types import pack, unpack


def user(*parts: Part) -> Message:
    return Message(Role.USER, parts)


def assistant(*parts: Part) -> Message:
    return Message(Role.ASSISTANT, parts)


def test_an_id_is_a_fixed_function_of_parent_role_and_content() -> None:
    """If these change, every stored id is wrong and the prefix has to change. Made with sha256sum over
    ``0:4:user4:text5:hello`` and ``67:v1:…9:assistant4:text3:so:4:call4:read17:json {"path":"a"}``."""
    hello = message_id(None, user(Text("hello")))
    assert hello == "v1:dc133745-dc133745218de2daadab22e212550522fc2ceb7ea46265b6920bc95f3dc58ff7"
    call = assistant(Text("so:"), ToolCall("read", '{"path": "a"}', "call_1"))
    assert message_id(hello, call) == "v1:dc133745-e5fcc9756cdebdeb2bf427d6267a4018b17a85e5416971e6502549ab428766e4"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (user(Text("a\nb")), user(Text("a"), Text("b"))),
        (user(Text("a")), user(Text(""), Text("a", {"cache_control": {"type": "ephemeral"}}))),
        (user(Text("a")), Message(Role.USER, (Text("a"),), {"name": "Ann"})),
        (assistant(), assistant(Text(""))),
        (assistant(Text("a")), assistant(Reasoning("hm", {"signature": "x"}), Text("a"))),
        (
            assistant(ToolCall("f", '{"a":1,"b":2}', "call_67")),
            assistant(ToolCall("f", '{ "b": 2, "a": 1 }', "call67")),
        ),
        (Message(Role.TOOL, (ToolResult("ok", "1", "f", False),)), Message(Role.TOOL, (ToolResult("ok", "2"),))),
        (user(Opaque("image", {"u": 1, "cache_control": 2})), user(Opaque("image", {"u": 1}))),
    ],
)
def test_what_a_client_may_change_makes_no_difference(one: Message, other: Message) -> None:
    assert message_id(None, one) == message_id(None, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (user(Text("a")), user(Text("a "))),
        (user(Text("a")), assistant(Text("a"))),
        (Message(Role.SYSTEM, (Text("a"),)), Message(Role.DEVELOPER, (Text("a"),))),
        (assistant(ToolCall("f", "{}")), assistant(ToolCall("g", "{}"))),
        (assistant(ToolCall("f", '{"a":1}')), assistant(ToolCall("f", '{"a":"1"}'))),
        (assistant(ToolCall("f", "not json")), assistant(ToolCall("f", "not  json"))),
        (assistant(ToolCall("f", '"x"')), assistant(ToolCall("f", "x"))),
        (assistant(Text("a"), ToolCall("f", "{}")), assistant(ToolCall("f", "{}"), Text("a"))),
        (assistant(ToolCall("f", "{}"), ToolCall("f", "{}")), assistant(ToolCall("f", "{}"))),
        (Message(Role.TOOL, (ToolResult("ok", is_error=True),)), Message(Role.TOOL, (ToolResult("ok"),))),
        (user(Text("4:text1:a")), user(Text("4:text1:"), Text("a"))),
        (user(Text("\ud800")), user(Text("\ufffd"))),
        (user(Opaque("image", {"u": 1})), user(Opaque("image", {"u": 2}))),
    ],
)
def test_what_changes_the_conversation_changes_the_id(one: Message, other: Message) -> None:
    assert message_id(None, one) != message_id(None, other)


def test_a_conversations_ids_stand_together_whatever_system_prompt_it_shares() -> None:
    """Hashes lie anywhere, and a large index is written a page for each of them."""
    system, developer = Message(Role.SYSTEM, (Text("rules"),)), Message(Role.DEVELOPER, (Text("more"),))
    history = [system, developer, *(m for n in range(20) for m in (user(Text(f"q{n}")), assistant(Text(f"a{n}"))))]
    ids = chain_ids(history)
    assert {i[:12] for i in ids[:2]} == {"v1:00000000-"}
    places = {i[:12] for i in ids[2:]}
    assert places == {f"v1:{ids[2][12:20]}-"}
    forked = chain_ids([*history[:10], user(Text("other")), system])
    assert {i[:12] for i in forked[2:]} == places
    assert chain_ids([system, developer, user(Text("Hello"))])[2][:12] not in places


def test_what_follows_an_id_without_a_place_has_none_and_the_hash_is_the_same() -> None:
    history = [Message(Role.SYSTEM, (Text("rules"),)), user(Text("hello")), assistant(Text("hi"))]
    ids = chain_ids(history)
    old = ["v1:" + i[12:] for i in ids]
    assert [unplaced(i) for i in ids] == old == [unplaced(i) for i in old]
    assert chain_ids(history[1:], old[0]) == old[1:]
    parents = [None, *old]
    assert [rederived(i, parent, m) for i, parent, m in zip(old, parents, history, strict=False)] == old
    assert [rederived(i, parent, m) for i, parent, m in zip(ids, [None, *ids], history, strict=False)] == ids


def test_a_place_that_is_not_the_conversations_own_is_found() -> None:
    system, hello = chain_ids([Message(Role.SYSTEM, (Text("rules"),)), user(Text("hello"))])
    moved = f"v1:12345678-{hello[12:]}"
    assert rederived(moved, system, user(Text("hello"))) == hello != moved


def test_an_id_stands_for_everything_before_it() -> None:
    a, b, c = user(Text("a")), assistant(Text("b")), user(Text("c"))
    ids = chain_ids([a, b, c])
    assert ids[:2] == chain_ids([a, b])
    assert chain_ids([c], ids[1]) == ids[2:]
    assert chain_ids([b, b, c])[2] != ids[2]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
texts = st.text(st.characters(exclude_categories=()), max_size=12)
extras = st.dictionaries(texts, json_values, max_size=2)
parts = st.one_of(
    st.builds(Text, texts, extras),
    st.builds(Reasoning, texts, json_values),
    st.builds(ToolCall, texts, texts, st.none() | texts, extras),
    st.builds(ToolResult, texts, st.none() | texts, st.none() | texts, st.none() | st.booleans(), extras),
    st.builds(Opaque, texts, json_values),
)
any_message = st.builds(Message, st.sampled_from(Role), st.lists(parts, max_size=4).map(tuple), extras)


@given(any_message)
def test_a_message_comes_back_from_its_stored_form_as_it_was(message: Message) -> None:
    stored = unpack(pack(pack_message(message)))
    again = unpack_message(message.role.value, stored)
    assert again == message
    assert message_id("v1:0", again) == message_id("v1:0", message)


@given(st.lists(any_message, max_size=4), st.lists(any_message, max_size=4))
def test_two_conversations_share_ids_exactly_as_far_as_they_are_equal(one: list[Message], other: list[Message]) -> None:
    for a, b in zip(chain_ids(one), chain_ids(other), strict=False):
        if a != b:
            break
    else:
        return
    assert not set(chain_ids(one)[chain_ids(one).index(a) :]) & set(chain_ids(other))


@given(json_values)
def test_any_value_survives_packing(value: Any) -> None:
    assert unpack(pack(value)) == value


def test_long_content_is_compressed() -> None:
    assert len(pack(["word " * 1000])) < 100


def test_secrets_in_assembled_texts_are_replaced() -> None:
    key = "sk-ant-api03-aaaabbbbcccc"
    message = assistant(
        Text(f"a {key}"), Reasoning(key), ToolCall("f", f'{{"k":"{key}"}}'), ToolResult(key), Opaque("x", 1)
    )
    assert redact_message(message) == assistant(
        Text("a [redacted:anthropic-key]"),
        Reasoning("[redacted:anthropic-key]"),
        ToolCall("f", '{"k":"[redacted:anthropic-key]"}'),
        ToolResult("[redacted:anthropic-key]"),
        Opaque("x", 1),
    )
