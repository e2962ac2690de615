"""The real OpenClaw reads answers that our writers wrote: thinking, text, a tool call, and then the end of the turn.

What it made of them is what it sends next: its own history. The addon is not in the proxy here. Two tests are of what
the client does when a conversation that we answered goes back to its provider, which does not know our marks and ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from types import ModuleType
from typing import Any

import pytest
from openclaw_tools import Message, RecordingLLM, Stage

from metaclaw_core.model import Part, Reasoning, Role, StopReason, Text, ToolCall, Usage
from metaclaw_core.wire import by_name
from metaclaw_core.wire.answer import Call, Event, ReasoningDelta, TextDelta, answer_writer
from metaclaw_core.wire.answer_anthropic import SIGNATURE

pytestmark = [pytest.mark.openclaw, pytest.mark.slow]

OURS = {
    "openai-completions": "openai_chat",
    "openai-responses": "openai_responses",
    "anthropic-messages": "anthropic",
    "google-generative-ai": "gemini",
    "ollama": "ollama",
}
PREFIX = {"openai_chat": "chatcmpl-", "openai_responses": "resp_", "anthropic": "msg_"}
GEMINI_PATH = "/v1beta/models/m:streamGenerateContent?alt=sse"
READ = 'TOOL:read {"path":"notes.txt"} END'
READ_BY_CODE = 'TOOL:exec {"code":"text(await read({path:\\"notes.txt\\"}))"} END'
DONE = "Tool finished. The task is done."
# As the providers say it to who brings them what they did not make.
REFUSALS = {
    "sig": (400, "invalid_request_error", None, "", "messages.1.content.0: Invalid `signature` in `thinking` block"),
    "prev": (400, "invalid_request_error", "previous_response_not_found", "", "Previous response with id 'resp_1' not found."),
}


def with_our_writers(kit: ModuleType) -> None:
    """The kit decides what to say, we write it: with thinking, and with text before a call."""
    number = count(1)

    def write(dialect: str, body: dict[str, Any], reply: Any, tokens: int) -> tuple[None, list[str]]:
        path = GEMINI_PATH if dialect == "gemini" else ""
        request = by_name(dialect).parse_request(json.dumps(body).encode(), path)
        n = next(number)
        said: list[Event] = [ReasoningDelta("Let me "), ReasoningDelta("think.")]
        if reply.tool:
            name, arguments = reply.tool
            said += [TextDelta("I look. "), Call(name, json.dumps(arguments), f"call_{n:08}")]
        else:
            said += [TextDelta(piece) for piece in kit.pieces(reply.text)]
        id = f"{PREFIX.get(dialect, '')}{n:024x}"
        to = answer_writer(dialect, request, model="fake-1", response_id=id, created=1.8e9, stream=True, path=path)
        pieces = [to.start(), to.keep_alive()]
        for event in said:
            pieces += [to.feed(event), to.keep_alive()]
        pieces.append(to.finish(StopReason.STOP, Usage(tokens, 12)))
        return None, [piece.decode() for piece in pieces if piece]

    for name, dialect in OURS.items():
        ours = lambda body, reply, tokens, dialect=dialect: write(dialect, body, reply, tokens)  # noqa: E731
        kit.DIALECTS[name] = kit.DIALECTS[name]._replace(write=ours)
    kit.ERRORS.update(REFUSALS)


def thinking_models(config: dict[str, Any]) -> None:
    for name in ("example", "exant"):
        config["models"]["providers"][name]["models"][0]["reasoning"] = True


class WithoutAddon(Stage):
    def start_proxy(self, *, addon: bool = False) -> None:
        super().start_proxy(addon=addon)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("openclaw")
    with RecordingLLM(prepare=with_our_writers) as llm, WithoutAddon(folder, llm, thinking_models) as stage:
        yield stage


class Session:
    """A conversation with one model, and what it sent to the LLM."""

    def __init__(self, stage: Stage, model: str) -> None:
        self._stage, self._model, self._start = stage, model, len(stage.llm.received)
        self._name = f"a{self._start}"

    def say(self, text: str) -> str:
        return self._stage.post(text, self._model, self._name)

    def sent(self) -> list[Message]:
        return [message for message in self._stage.llm.received[self._start :] if message.dialect != "other"]


def history(message: Message) -> list[list[Part]]:
    """What the model said before, as the client tells it. Ids without the "_" that some APIs of the client take away."""
    dialect = OURS[message.dialect]
    request = by_name(dialect).parse_request(message.body, GEMINI_PATH if dialect == "gemini" else message.path)
    answers = [m.parts for m in request.messages if m.role is Role.ASSISTANT]
    return [
        [ToolCall(p.name, p.arguments, (p.id or "").replace("_", "")) if isinstance(p, ToolCall) else p for p in parts]
        for parts in answers
    ]


THOUGHT = Reasoning("Let me think.")
SIGNED = Reasoning("Let me think.", {"signature": SIGNATURE})
# model -> the thought as it comes back in the tool loop, and in later turns
THOUGHTS: dict[str, tuple[list[Part], list[Part]]] = {
    "example/fake-1": ([THOUGHT], [THOUGHT]),
    "exresp/fake-1": ([THOUGHT], [Reasoning("")]),  # the item comes back, its summary does not
    "exant/fake-1": ([SIGNED], [SIGNED]),
    "anthropic/claude-opus-4-6": ([SIGNED], [SIGNED]),
    "google/gemini-2.5-pro": ([THOUGHT], [THOUGHT]),
    "ollama/fake-1": ([], []),  # it says "think": false
}


@pytest.mark.parametrize("model", THOUGHTS)
def test_a_tool_loop_and_the_turn_after_it(stage: Stage, model: str):
    session = Session(stage, model)
    assert session.say(f"Read my notes. {READ}") == DONE
    assert session.say("And now?").startswith("ok: ")
    first, loop, later = session.sent()
    in_loop, in_later = THOUGHTS[model]
    (called,) = [part for part in history(loop)[0] if isinstance(part, ToolCall)]
    assert called.arguments == '{"path":"notes.txt"}'
    assert history(first) == []
    assert history(loop) == [[*in_loop, Text("I look. "), called]]
    assert history(later) == [[*in_later, Text("I look. "), called], [*in_later, Text(DONE)]]


def test_the_chain_of_native_responses_and_what_breaks_it(stage: Stage):
    """The client names our ids. Where its provider does not know one it sends everything again, and none of it is ours alone."""
    session = Session(stage, "openai/gpt-5.5")
    assert session.say(f"Read my notes. {READ_BY_CODE}") == DONE
    assert session.say("Once more. ERR:prev").startswith("ok: ")
    first, loop, refused, again = session.sent()
    chain = [message.json().get("previous_response_id") for message in (first, loop, refused, again)]
    assert [bool(id) for id in chain] == [False, True, True, False]
    assert chain[1] != chain[2]
    assert [item for item in again.json()["input"] if item["type"] == "reasoning"] == []
    assert [parts[-1] for parts in history(again)][1:] == [Text(DONE)]


def test_a_provider_that_refuses_our_thinking_gets_the_turn_without_it(stage: Stage):
    session = Session(stage, "anthropic/claude-opus-4-6")
    assert session.say("Hello.").startswith("ok: ")
    assert session.say("Once more. ERR:sig").startswith("ok: ")
    _, refused, again = session.sent()
    ((thought, text),) = history(refused)
    assert thought == SIGNED
    assert history(again) == [[text]]
