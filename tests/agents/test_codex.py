"""Codex's requests, in the shapes that are publicly known."""

from __future__ import annotations

from typing import Any

import pytest

from metaclaw_core.agents import identify
from metaclaw_core.model import Hints, Kind, Message, Request, Role, Text, ToolCall, ToolResult

HINTS = Hints(client="codex", session_id="0199-aa")


def user(*texts: str) -> Message:
    return Message(Role.USER, tuple(Text(t) for t in texts))


def ask(*messages: Message, **rest: Any) -> Request:
    return Request("openai_responses", "m", True, (Message(Role.SYSTEM, (Text("You are Codex, …"),)), *messages), **rest)


def test_the_surroundings_it_sends_are_not_the_humans_words() -> None:
    one = identify(
        ask(
            user("# AGENTS.md instructions for /w\n\n<INSTRUCTIONS>\nx\n</INSTRUCTIONS>", "<environment_context>\n</environment_context>"),
            user("<user_instructions>\nbe brief\n</user_instructions>"),
            user("fix the build"),
        ),
        HINTS,
    )
    assert (one.agent, one.kind, one.session_id) == ("codex", Kind.MAIN, "0199-aa")
    assert (one.user_text, one.human_texts) == ("fix the build", ("fix the build",))


def test_the_surroundings_may_change_in_a_tool_loop() -> None:
    call, result = Message(Role.ASSISTANT, (ToolCall("shell", "{}"),)), Message(Role.TOOL, (ToolResult("x"),))
    one = identify(ask(user("fix it"), call, result, user("<environment_context>\n</environment_context>")), HINTS)
    assert (one.kind, one.user_text) == (Kind.TOOL, "fix it")


def test_the_session_is_also_the_cache_key() -> None:
    assert identify(ask(user("hi"), extra={"prompt_cache_key": "0199-bb"}), Hints()).session_id == "0199-bb"


@pytest.mark.parametrize("key", [None, 5, "", "two words"])
def test_any_other_cache_key_is_no_session(key: object) -> None:
    assert identify(ask(user("hi"), extra={"prompt_cache_key": key}), Hints()).session_id is None


def test_a_compaction_and_what_follows_it() -> None:
    assert identify(ask(user("hi"), user("You are performing a CONTEXT CHECKPOINT COMPACTION. …")), HINTS).kind is Kind.COMPACTION
    summary = "Another language model started to solve this problem and produced a summary of its thinking process. …"
    assert identify(ask(user(summary), user("go on")), HINTS).human_texts == ("go on",)
