"""Clients we know nothing of, and how the right module is found."""

from __future__ import annotations

import logging
from importlib.metadata import EntryPoint

import pytest

from metaclaw_core import agents
from metaclaw_core.agents.base import Identity, Prior
from metaclaw_core.agents.generic import GENERIC
from metaclaw_core.model import Hints, Kind, Message, Request, Role, Text, ToolCall, ToolResult

SYSTEM = Message(Role.SYSTEM, (Text("You help."),))
CALL = Message(Role.ASSISTANT, (ToolCall("read", "{}"),))
RESULT = Message(Role.TOOL, (ToolResult("x"),))


def user(text: str) -> Message:
    return Message(Role.USER, (Text(text),))


def ask(*messages: Message, prior: Prior | None = None) -> Identity:
    return GENERIC.identify(Request("openai_chat", "m", False, (SYSTEM, *messages)), Hints(trace_id="t"), prior)


def test_the_last_user_message_opens_the_turn() -> None:
    one = ask(user("hi"), Message(Role.ASSISTANT, (Text("ok"),)), user("more"))
    assert one == Identity("generic", Kind.MAIN, None, None, "more", ("hi", "more"), False, "t", human_at=(1, 3))


def test_tool_results_after_it_make_it_a_continuation() -> None:
    assert ask(user("hi"), CALL, RESULT).kind is Kind.TOOL
    assert ask(user("hi"), CALL, RESULT, user("stop")).kind is Kind.MAIN


def test_a_short_call_without_tools_or_history_is_a_human_turn() -> None:
    assert ask(user("Write a title for this")).kind is Kind.MAIN


def test_a_chain_without_a_user_message_continues_what_it_names() -> None:
    one = ask(RESULT, prior=Prior("s", None, Kind.MAIN, "hi", "t1"))
    assert (one.kind, one.user_text, one.human_texts, one.session_id) == (Kind.TOOL, "hi", ("hi",), "s")
    assert ask(RESULT).kind is Kind.UNKNOWN


def test_what_looks_like_an_envelope_is_left_alone_for_an_unknown_client() -> None:
    assert ask(user("[Mon 2026-11-23 20:38 UTC] hi")).user_text == "[Mon 2026-11-23 20:38 UTC] hi"


# --- the registry ---------------------------------------------------------------------------------


def test_generic_is_asked_last() -> None:
    assert [agent.name for agent in agents.AGENTS] == ["openclaw", "claude_code", "codex", "generic"]


def test_a_request_of_nobody_known_is_generic() -> None:
    assert agents.identify(Request("gemini", "m", True, (SYSTEM, user("hi"))), Hints()).agent == "generic"


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, agents.GROUP)


class Stranger:
    name = "stranger"

    def recognises(self, request: Request, hints: Hints) -> bool:
        return hints.client == "stranger"


STRANGER = Stranger()


def test_an_agent_of_another_package_is_asked_first() -> None:
    found = agents.load([point("generic", "metaclaw_core.agents.generic:GENERIC"), point("stranger", f"{__name__}:STRANGER")])
    assert [agent.name for agent in found] == ["stranger", "openclaw", "claude_code", "codex", "generic"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (point("openclaw", f"{__name__}:STRANGER"), "the name is taken"),
        (point("other", f"{__name__}:STRANGER"), "it does not call itself so"),
        (point("broken", f"{__name__}:MISSING"), "can't be loaded"),
    ],
)
def test_an_agent_that_is_not_fit_is_reported_and_left_out(
    entry: EntryPoint, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = agents.load([entry])
    assert [agent.name for agent in found] == ["openclaw", "claude_code", "codex", "generic"]
    assert reason in caplog.text
