"""Claude Code's requests, in the shapes that are publicly known."""

from __future__ import annotations

from typing import Any

import pytest

from metaclaw_core.agents import identify
from metaclaw_core.model import Hints, Kind, Message, Request, Role, Text, Tool, ToolCall, ToolResult

SESSION = "6d1a3c1e-0d9e-4f4e-9d4b-0c7a3a0f7a11"
ID = "You are Claude Code, Anthropic's official CLI for Claude."
TOOLS = (Tool("Bash", "Runs", {}),)


def user(*texts: str) -> Message:
    return Message(Role.USER, tuple(Text(t) for t in texts))


def ask(*messages: Message, system: tuple[str, ...] = (ID, "long"), tools: tuple[Tool, ...] = TOOLS, **rest: Any) -> Request:
    return Request("anthropic", "m", True, (Message(Role.SYSTEM, tuple(Text(t) for t in system)), *messages), tools, **rest)


@pytest.mark.parametrize(
    "user_id",
    [
        f"user_{'a' * 64}_account_{SESSION}_session_{SESSION}",
        f"user_{'a' * 64}_account__session_{SESSION}",
        f'{{"device_id":"{"a" * 64}","account_uuid":"","session_id":"{SESSION}"}}',
    ],
)
def test_the_session_is_in_the_user_id_in_either_form(user_id: str) -> None:
    one = identify(ask(user("hi"), metadata={"user_id": user_id}), Hints())
    assert (one.agent, one.kind, one.session_id) == ("claude_code", Kind.MAIN, SESSION)


@pytest.mark.parametrize("user_id", ["alice", '{"session_id": 5}', "[1]", "", 7, None])
def test_any_other_user_id_is_no_session(user_id: object) -> None:
    assert identify(ask(user("hi"), metadata={"user_id": user_id}), Hints()).session_id is None


def test_it_is_known_by_its_header_or_by_its_first_line_behind_the_billing_line() -> None:
    assert identify(ask(user("hi"), system=("x",)), Hints(client="claude-code")).agent == "claude_code"
    billed = ask(user("hi"), system=("x-anthropic-billing-header: cc_version=2.1", ID))
    assert identify(billed, Hints()).agent == "claude_code"
    assert identify(ask(user(ID), system=("You help.",)), Hints()).agent == "generic"


def test_its_own_blocks_are_cut_from_the_humans_text() -> None:
    one = identify(
        ask(
            user("<system-reminder>\nToday is Monday.\n</system-reminder>\n", "fix the build"),
            Message(Role.ASSISTANT, (Text("ok"),)),
            user("<command-name>/clear</command-name>\n<command-message>clear</command-message>\n<command-args></command-args>"),
            user("<local-command-stdout>done</local-command-stdout>"),
            user("now <b>test</b> it\n<system-reminder>x</system-reminder>"),
        ),
        Hints(),
    )
    assert (one.user_text, one.human_texts) == ("now <b>test</b> it", ("fix the build", "now <b>test</b> it"))


def test_a_tag_in_the_middle_of_a_line_is_the_humans() -> None:
    text = "why does it print <system-reminder>x</system-reminder>?"
    assert identify(ask(user(text)), Hints()).user_text == text


def test_a_tool_loop_is_a_continuation() -> None:
    call, result = Message(Role.ASSISTANT, (ToolCall("Bash", "{}"),)), Message(Role.TOOL, (ToolResult("x"),))
    reminder = user("<system-reminder>be brief</system-reminder>")
    one = identify(ask(user("fix it"), call, result, reminder), Hints())
    assert (one.kind, one.user_text) == (Kind.TOOL, "fix it")


@pytest.mark.parametrize(
    ("system", "text"),
    [
        ((ID, "Analyze if this message indicates a new conversation topic."), "fix it"),
        ((ID, "Generate a concise title for this session."), "fix it"),
        (("Summarize this coding conversation in under 50 characters as a title",), "fix it"),
        ((ID,), "quota"),
    ],
)
def test_titles_topics_and_the_quota_probe_are_side_calls(system: tuple[str, ...], text: str) -> None:
    one = identify(ask(user(text), system=system, tools=()), Hints(client="claude-code"))
    assert (one.kind, one.user_text, one.human_texts) == (Kind.TITLE, None, ())


def test_a_call_with_tools_is_never_a_title() -> None:
    assert identify(ask(user("quota"), system=(ID, "Write a title")), Hints()).kind is Kind.MAIN


def test_a_compaction_and_what_follows_it() -> None:
    call = ask(user("hi"), user("Your task is to create a detailed summary of the conversation so far, paying …"))
    assert identify(call, Hints()).kind is Kind.COMPACTION
    after = ask(user("This session is being continued from a previous conversation that ran out of context. …"), user("go on"))
    assert identify(after, Hints()).human_texts == ("go on",)


def test_a_subagent_has_the_task_as_its_text() -> None:
    one = identify(ask(user("find the bug"), system=("You are an agent for Claude Code, Anthropic's official CLI for Claude.",)), Hints())
    assert (one.agent, one.kind, one.user_text, one.human_texts) == ("claude_code", Kind.SUBAGENT, "find the bug", ())
