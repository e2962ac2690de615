"""`skills.placement: turn`: what is added to a session's skills later stands beside the message it was chosen for."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaclaw_core.model import Hints, Kind
from metaclaw_core.proxy.rewrite import Rewriter, Rewritten
from metaclaw_core.proxy.sessions import Sessions, SessionState, Snapshot, row_of
from metaclaw_core.settings import Settings
from metaclaw_core.skills import Index, Skill
from metaclaw_core.skills.index import Hit
from metaclaw_core.skills.retrieve import Retrieval
from metaclaw_core.wire import by_name, splice
from metaclaw_core.wire.beside import without_beside

SKILLS = ("alpha", "beta", "gamma", "delta")


class Sink:
    def __init__(self) -> None:
        self.rows: list[tuple[str, bytes, float]] = []

    def put_session(self, snapshot: Snapshot) -> None:
        self.rows.append(row_of(snapshot))


class Named:
    """Finds the skills whose names the newest text holds."""

    name = "named"

    async def retrieve(self, texts: Any, index: Index, k: int) -> Retrieval:
        return Retrieval(tuple(Hit(name, 1.0) for name in SKILLS if name in texts[-1]), self.name)

    async def aclose(self) -> None:
        pass


INDEX = Index().change(Skill(name, f"What {name} is for.", f"Do {name}.") for name in SKILLS)


class Form:
    """How a dialect writes a conversation that only grows; the messages are the end of the body."""

    def __init__(self, name: str) -> None:
        self.dialect = by_name(name)
        self.path = {
            "openai_chat": "/v1/chat/completions",
            "openai_responses": "/v1/responses",
            "anthropic": "/v1/messages",
            "gemini": "/v1beta/models/g:generateContent",
            "ollama": "/api/chat",
        }[name]

    def user(self, text: str) -> dict[str, Any]:
        return {"role": "user", "parts": [{"text": text}]} if self.dialect.name == "gemini" else {"role": "user", "content": text}

    def tool(self, n: int) -> list[dict[str, Any]]:
        name, call = "run", f"c{n}"
        if self.dialect.name == "anthropic":
            return [
                {"role": "assistant", "content": [{"type": "tool_use", "id": call, "name": name, "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call, "content": "alpha beta"}]},
            ]
        if self.dialect.name == "gemini":
            return [
                {"role": "model", "parts": [{"functionCall": {"name": name, "args": {}}}]},
                {"role": "user", "parts": [{"functionResponse": {"name": name, "response": {"output": "alpha beta"}}}]},
            ]
        if self.dialect.name == "openai_responses":
            return [
                {"type": "function_call", "call_id": call, "name": name, "arguments": "{}"},
                {"type": "function_call_output", "call_id": call, "output": "alpha beta"},
            ]
        arguments: Any = {} if self.dialect.name == "ollama" else "{}"
        calls = [{"id": call, "type": "function", "function": {"name": name, "arguments": arguments}}]
        return [{"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "tool_call_id": call, "content": "alpha beta"}]

    def answer(self) -> dict[str, Any]:
        if self.dialect.name == "gemini":
            return {"role": "model", "parts": [{"text": "done"}]}
        return {"role": "assistant", "content": "done"}

    def body(self, messages: list[dict[str, Any]]) -> bytes:
        system = "You are a tester."
        head: dict[str, Any] = {
            "openai_chat": {"model": "m"},
            "openai_responses": {"model": "m", "instructions": system},
            "anthropic": {"model": "m", "max_tokens": 9, "system": system},
            "gemini": {"systemInstruction": {"parts": [{"text": system}]}},
            "ollama": {"model": "m"},
        }[self.dialect.name]
        key = {"openai_responses": "input", "gemini": "contents"}.get(self.dialect.name, "messages")
        leading = [{"role": "system", "content": system}] if self.dialect.name in ("openai_chat", "ollama") else []
        return json.dumps({**head, key: [*leading, *messages]}).encode()


class Conversation:
    def __init__(self, form: Form, sessions: Sessions | None = None, placement: str = "turn") -> None:
        self.form, self.sink, self.sessions = form, Sink(), sessions or Sessions()
        chosen = Settings.model_validate({"skills": {"placement": placement}})
        self.rewriter = Rewriter(chosen, self.sessions, self.sink, Named())
        self.messages: list[dict[str, Any]] = []
        self.calls = 0

    async def send(self, hints: Hints = Hints(), body: bytes | None = None) -> Rewritten:  # noqa: B008 - frozen
        body = self.form.body(self.messages) if body is None else body
        return await self.rewriter.rewrite(self.form.dialect, body, self.form.path, hints, "p", INDEX)

    async def say(self, text: str) -> Rewritten:
        if self.messages:
            self.messages.append(self.form.answer())
        self.messages.append(self.form.user(text))
        return await self.send()

    async def tool(self) -> Rewritten:
        self.calls += 1
        self.messages += self.form.tool(self.calls)
        return await self.send()

    def taken_out(self, outcome: Rewritten) -> tuple[bytes, list[str]]:
        assert outcome.body is not None
        removed = splice.remove(outcome.body, self.form.dialect.system_slot(outcome.body))
        assert removed is not None
        return without_beside(self.form.dialect, removed[0], self.form.path)


every_dialect = pytest.mark.parametrize(
    "name", ["openai_chat", "openai_responses", "anthropic", "gemini", "ollama"]
)


@every_dialect
async def test_a_change_of_subject_changes_no_byte_of_what_was_sent_before(name: str) -> None:
    talk = Conversation(Form(name))
    outcomes = [await talk.say("about alpha"), await talk.tool(), await talk.say("now beta"), await talk.tool()]
    outcomes += [await talk.tool(), await talk.say("thanks"), await talk.say("and gamma"), await talk.tool()]
    assert [outcome.identity.kind for outcome in outcomes if outcome.identity] == [
        Kind.MAIN, Kind.TOOL, Kind.MAIN, Kind.TOOL, Kind.TOOL, Kind.MAIN, Kind.MAIN, Kind.TOOL,
    ]  # fmt: skip
    bodies = [outcome.body for outcome in outcomes]
    for older, newer in pairwise(bodies):
        assert older is not None
        assert newer is not None
        assert newer.startswith(older.removesuffix(b"}").removesuffix(b"]"))  # all that a provider has in its cache
    last = outcomes[-1]
    assert last.injection is not None
    assert last.injection.skills == ("alpha", "beta", "gamma")
    original, texts = talk.taken_out(last)
    assert original == talk.form.body(talk.messages)
    assert [[name for name in SKILLS if f"### {name}" in text] for text in texts] == [["beta"], ["gamma"]]
    assert all("not words of the user" in text for text in texts)
    assert last.injection.text.count("### ") == 3


@every_dialect
async def test_in_the_system_prompt_the_same_conversation_changes_what_was_sent(name: str) -> None:
    talk = Conversation(Form(name), placement="system")
    older = (await talk.say("about alpha")).body
    newer = (await talk.say("now beta")).body
    assert older is not None
    assert newer is not None
    assert not newer.startswith(older.removesuffix(b"}").removesuffix(b"]"))
    assert talk.taken_out(await talk.send())[1] == []


@every_dialect
async def test_a_restart_repeats_the_same_bytes(name: str) -> None:
    talk = Conversation(Form(name))
    await talk.say("about alpha")
    before = (await talk.say("now beta")).body
    sessions = Sessions()
    for key, value, _ in talk.sink.rows:
        sessions.put(key, SessionState(**json.loads(value)), Sink())
    again = Conversation(talk.form, sessions)
    again.messages = talk.messages
    assert (await again.send()).body == before


async def test_rl_mode_does_so_too() -> None:
    talk = Conversation(Form("openai_chat"))
    rl = Settings.model_validate({"mode": "rl", "rl": {"model": "m"}})
    talk.rewriter = Rewriter(rl, talk.sessions, talk.sink, Named())
    await talk.say("about alpha")
    assert len(talk.taken_out(await talk.say("now beta"))[1]) == 1


async def test_the_message_is_known_by_its_words_and_place_when_others_come_in_between() -> None:
    talk = Conversation(Form("openai_chat"))
    await talk.say("about alpha")
    await talk.say("now beta")
    await talk.say("now beta")  # the same words again: the first stays the one
    talk.messages.insert(1, {"role": "assistant", "content": "a second part of the answer"})
    outcome = await talk.send()
    assert outcome.body is not None
    said = [m["content"] for m in json.loads(outcome.body)["messages"] if m["role"] == "user"]
    assert ["### beta" in text for text in said] == [False, True, False]


async def test_what_can_not_be_told_apart_or_is_gone_gets_nothing() -> None:
    talk = Conversation(Form("openai_chat"))
    await talk.say("about alpha")
    await talk.say("now beta")
    await talk.say("thanks")
    await talk.say("thanks a lot")
    without = [m for m in talk.messages if m["content"] != "now beta"]
    outcome = await talk.send(body=talk.form.body(without))
    assert talk.taken_out(outcome) == (talk.form.body(without), [])
    cut = [{"role": "user", "content": "hello"}, {"role": "user", "content": "now beta"}, *talk.messages[1:]]
    moved = [m for m in cut if m != talk.messages[0]]
    outcome = await talk.send(body=talk.form.body([talk.messages[0], *moved[:1], *moved[1:]]))
    assert talk.taken_out(outcome)[1] == []  # two of the same words, neither where it was


async def test_a_chain_at_the_provider_gets_it_once() -> None:
    talk = Conversation(Form("openai_responses"))
    hints = Hints(session_id="s-1", client="codex")

    async def delta(**body: Any) -> Rewritten:
        return await talk.send(hints, json.dumps({"model": "m", "instructions": "You are a tester.", **body}).encode())

    await delta(input=[talk.form.user("about alpha")])
    added = await delta(previous_response_id="r1", input=[talk.form.user("now beta")])
    assert len(talk.taken_out(added)[1]) == 1
    repeated = await delta(previous_response_id="r1", input=[talk.form.user("now beta")])
    assert repeated.body == added.body
    later = await delta(previous_response_id="r2", input=[talk.form.user("thanks")])
    assert talk.taken_out(later)[1] == []  # it lies with the history at the provider
    whole = [talk.form.user("about alpha"), talk.form.answer(), talk.form.user("now beta"), talk.form.answer(), talk.form.user("thanks")]
    assert len(talk.taken_out(await delta(input=whole))[1]) == 1


async def test_without_a_place_beside_the_words_it_goes_to_the_block() -> None:
    talk = Conversation(Form("openai_responses"))
    hints = Hints(session_id="s-1", client="codex")
    for text in ("about alpha", "now beta"):
        body = json.dumps({"model": "m", "instructions": "You are a tester.", "input": text}).encode()
        outcome = await talk.send(hints, body)
    assert outcome.injection is not None
    assert outcome.injection.skills == ("alpha", "beta")
    assert outcome.body is not None
    assert b"### beta" in json.loads(outcome.body)["instructions"].encode()


@settings(max_examples=40, deadline=None)
@given(said=st.lists(st.sampled_from([*SKILLS, "thanks", "yes"]), min_size=1, max_size=7), tools=st.lists(st.booleans(), max_size=7))
def test_any_conversation_is_sent_as_it_was_and_more(said: list[str], tools: list[bool]) -> None:
    async def run() -> None:
        talk = Conversation(Form("anthropic"))
        older: bytes | None = None
        for i, text in enumerate(said):
            outcomes = [await talk.say(text)]
            if i < len(tools) and tools[i]:
                outcomes.append(await talk.tool())
            for outcome in outcomes:
                if older is not None:
                    assert outcome.body is not None
                    assert outcome.body.startswith(older.removesuffix(b"]}"))
                older = outcome.body or older

    asyncio.run(run())
