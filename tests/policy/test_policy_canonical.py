"""The key of a reply: what clients change is ignored, what somebody said is not."""

from __future__ import annotations

import pytest

from metaclaw_core.model import Message, Reasoning, Role, Text, ToolCall
from metaclaw_core.policy.canonical import arguments_of, reply_key
from metaclaw_core.wire.anthropic import ANTHROPIC
from metaclaw_core.wire.openai_chat import OPENAI_CHAT


def said(*parts: Text | Reasoning | ToolCall) -> Message:
    return Message(Role.ASSISTANT, parts)


CALL = ToolCall("read", '{"path": "a.txt", "lines": 3}', "call_67ab")


@pytest.mark.parametrize(
    "came",
    [
        said(Text("Looking."), ToolCall("read", '{"lines":3,"path":"a.txt"}', "call67ab")),
        said(Text("Looking."), ToolCall("read", '{"path": "a.txt", "lines": 3}', None)),
        said(Text("Look"), Text("ing."), CALL),
        said(CALL, Text("Looking.")),
        said(Reasoning("hm"), Text("Looking."), CALL),
        said(Text("Looking.", {"cache_control": {"type": "ephemeral"}}), CALL),
    ],
    ids=["rewritten", "without an id", "in blocks", "call first", "with reasoning", "with a cache mark"],
)
def test_a_client_may_change_the_form_of_a_reply(came: Message):
    assert reply_key(came) == reply_key(said(Text("Looking."), CALL))


@pytest.mark.parametrize(
    "came",
    [
        said(Text("Looking. "), CALL),
        said(Text("Looking.\nDone."), CALL),
        said(Text("Looking.")),
        said(Text("Looking."), CALL, CALL),
        said(Text("Looking."), ToolCall("read", '{"path": "b.txt", "lines": 3}')),
        said(Text("Looking."), ToolCall("write", CALL.arguments)),
        said(Text("Looking."), ToolCall("read", '{"path": "a.txt", "lines": "3"}')),
        said(CALL),
    ],
)
def test_another_content_is_another_reply(came: Message):
    assert reply_key(came) != reply_key(said(Text("Looking."), CALL))


def test_content_null_and_the_empty_string_are_one():
    body = b'{"model":"m","messages":[{"role":"assistant","content":%s,"tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":"{}"}}]}]}'
    null, empty = (OPENAI_CHAT.parse_request(body % content, "/v1/chat/completions") for content in (b"null", b'""'))
    assert reply_key(null.messages[0]) == reply_key(empty.messages[0])


def test_the_same_reply_in_two_dialects_has_one_key():
    chat = OPENAI_CHAT.parse_request(
        b'{"model":"m","messages":[{"role":"assistant","content":"Now.","tool_calls":[{"id":"c","type":"function",'
        b'"function":{"name":"f","arguments":"{\\"a\\": 1.0, \\"b\\": \\"\xc3\xbc\\"}"}}]}]}',
        "/v1/chat/completions",
    )
    blocks = ANTHROPIC.parse_request(
        b'{"model":"m","max_tokens":1,"messages":[{"role":"assistant","content":[{"type":"text","text":"Now."},'
        b'{"type":"tool_use","id":"toolu_1","name":"f","input":{"b":"\xc3\xbc","a":1.0}}]}]}',
        "/v1/messages",
    )
    assert reply_key(chat.messages[0]) == reply_key(blocks.messages[0])


def test_pieces_are_told_apart_by_their_length():
    assert reply_key(said(Text("ab"), ToolCall("c", "{}"))) != reply_key(said(Text("a"), ToolCall("bc", "{}")))


@pytest.mark.parametrize("arguments", ["not json", "[1]", '"text"', "7", "[" * 100_000])
def test_arguments_that_are_no_object_are_free_text(arguments: str):
    assert arguments_of(ToolCall("exec", arguments)) == {"input": arguments}


def test_a_custom_tools_text_and_the_object_we_made_of_it_are_one():
    ours = ToolCall("exec", '{"input": "ls -l"}', "call_1")
    theirs = ToolCall("exec", "ls -l", "call_1", {"type": "custom_tool_call"})
    assert reply_key(said(ours)) == reply_key(said(theirs))


def test_a_lone_surrogate_is_text_like_any_other():
    assert reply_key(said(Text("\ud800"))) != reply_key(said(Text("?")))
