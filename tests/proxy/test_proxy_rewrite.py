import asyncio
import json
import time
from typing import Any

import numpy as np
import pytest

from metaclaw_core.model import Hints
from metaclaw_core.proxy.rewrite import Rewriter, Rewritten
from metaclaw_core.proxy.sessions import Sessions, SessionState, row_of
from metaclaw_core.settings import Settings
from metaclaw_core.skills import Index, Skill
from metaclaw_core.skills.index import Hit
from metaclaw_core.skills.retrieve import Retrieval
from metaclaw_core.wire import by_name

SKILLS = ("alpha", "beta", "gamma", "delta")
CHAT = by_name("openai_chat")


class Sink:
    def __init__(self):
        self.rows: list[Any] = []

    def put_session(self, snapshot):
        self.rows.append(row_of(snapshot))


class Named:
    """Finds the skills whose names the newest text holds."""

    name = "named"

    def __init__(self):
        self.asked: list[list[str]] = []

    async def retrieve(self, texts, index, k):
        self.asked.append(list(texts))
        return Retrieval(tuple(Hit(name, 1.0) for name in SKILLS if name in texts[-1]), self.name)

    async def aclose(self):
        pass


def library(*names: str) -> Index:
    index = Index()
    for name in names or SKILLS:
        index.add(Skill(name, f"What {name} is for.", f"Do {name}."))
    return index


class Conversation:
    def __init__(self, retriever=None, sessions=None, index=None, **skills):
        self.retriever = retriever or Named()
        self.sessions = sessions or Sessions()
        self.sink = Sink()
        self.rewriter = Rewriter(Settings.model_validate({"skills": skills}), self.sessions, self.sink, self.retriever)
        self.index: Index | None = index or library()
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": "You are a tester."}]

    async def send(self, hints=Hints()) -> Rewritten:  # noqa: B008 - frozen
        body = json.dumps({"model": "m", "messages": self.messages}).encode()
        return await self.rewriter.rewrite(CHAT, body, "/v1/chat/completions", hints, "p", self.index)

    async def say(self, text: str) -> Rewritten:
        if len(self.messages) > 1:
            self.messages.append({"role": "assistant", "content": "done"})
        self.messages.append({"role": "user", "content": text})
        return await self.send()

    async def tool(self) -> Rewritten:
        call = {"id": "c", "type": "function", "function": {"name": "run", "arguments": "{}"}}
        self.messages += [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": "alpha beta"}]
        return await self.send()


def skills(outcome: Rewritten) -> tuple[str, ...]:
    return outcome.injection.skills if outcome.injection else ()


async def test_scores_that_are_numpys_are_plain_numbers_in_what_is_kept():
    class Vectors(Named):
        async def retrieve(self, texts, index, k):
            return Retrieval((Hit("alpha", np.float32(1.5)),), self.name)

    talk = Conversation(Vectors())
    outcome = await talk.say("about alpha")
    assert outcome.injection is not None
    assert type(outcome.injection.scores[0]) is float
    assert json.loads(talk.sink.rows[-1][1])["scores"] == [1.5]


async def test_a_block_grows_with_the_subject_and_stays_through_tools_and_small_talk():
    talk = Conversation()
    assert skills(await talk.say("about alpha")) == ("alpha",)
    assert skills(await talk.tool()) == ("alpha",)
    assert skills(await talk.say("thanks")) == ("alpha",)
    assert skills(await talk.say("now beta")) == ("alpha", "beta")
    assert skills(await talk.say("and gamma")) == ("alpha", "beta", "gamma")
    assert skills(await talk.say("and delta")) == ("alpha", "beta", "gamma")  # two additions are the most
    assert len(talk.retriever.asked) == 5


async def test_the_scores_of_the_choice_go_with_the_record_and_outlive_a_restart():
    talk = Conversation()
    await talk.say("about alpha")
    assert (await talk.say("now beta")).injection.scores == (1.0, 1.0)
    key, value, _ = talk.sink.rows[-1]
    saved = SessionState(**json.loads(value))
    assert saved.scores == [1.0, 1.0]
    old = SessionState(saved.session_id, saved.session_key, block=saved.block, skills=saved.skills, turn=saved.turn, used_at=time.time())
    talk.sessions.put(key, old, talk.sink)  # as an older version left it
    assert (await talk.say("and gamma")).injection.scores == (None, None, 1.0)


async def test_nothing_that_fits_is_nothing_added():
    talk = Conversation()
    outcome = await talk.say("hello")
    assert (outcome.body, outcome.reason) == (None, "nothing to add")


async def test_skills_that_are_off_are_not_added():
    outcome = await Conversation(enabled=False).say("about alpha")
    assert (outcome.body, outcome.reason) == (None, "nothing to add")


async def test_the_saved_state_gives_the_same_bytes_after_a_restart_even_before_an_index_is_there(tmp_path):
    talk = Conversation()
    first = await talk.say("about alpha")
    again = Conversation(sessions=talk.sessions)
    again.messages = talk.messages
    again.index = None
    assert (await again.send()).body == first.body
    assert skills(await again.say("now beta")) == ("alpha",)
    again.index = library()
    assert skills(await again.say("now beta then")) == ("alpha", "beta")


async def test_a_skill_that_left_the_library_ends_the_epoch():
    talk = Conversation()
    await talk.say("about alpha")
    talk.index = library("beta")
    assert skills(await talk.tool()) == ("alpha",)  # not within a turn
    assert skills(await talk.say("now beta")) == ("beta",)


async def test_a_long_pause_ends_the_epoch():
    talk = Conversation(idle_minutes=1)
    await talk.say("about alpha")
    (key,) = talk.sessions._states
    state = talk.sessions.get(key)
    assert state is not None
    state.used_at = time.time() - 61
    assert skills(await talk.say("now beta")) == ("beta",)


SYSTEM_OF_OPENCLAW = "<!-- openclaw:attempt:STABLE -->\nYou are a tester.\n<!-- openclaw:attempt:DYNAMIC -->"
RUNTIME = "Runtime: agent=main | session=agent:main:main | sessionId=5c89be32-3adc-43ec-b0fd-efea88de0220 | shell=bash"
SUMMARY = "The conversation history before this point was compacted into the following summary:\n\n<summary>\n{}\n</summary>"


async def test_a_compaction_ends_the_epoch_once():
    talk = Conversation()
    talk.messages[0]["content"] = SYSTEM_OF_OPENCLAW

    async def turn(text: str) -> tuple[str, ...]:
        return skills(await talk.say(f"[Mon 2026-11-23 20:38 UTC] {text}\n\n{RUNTIME}"))

    assert await turn("about alpha") == ("alpha",)
    assert await turn("and more") == ("alpha",)
    kept = talk.messages[-1:]
    talk.messages = [talk.messages[0], {"role": "user", "content": SUMMARY.format("We spoke about alpha.")}, *kept]
    assert await turn("now beta") == ("beta",)
    assert await turn("and gamma") == ("beta", "gamma")  # the same summary: the same epoch
    talk.messages[1] = {"role": "user", "content": SUMMARY.format("And about beta.")}
    assert await turn("now delta") == ("delta",)


async def test_a_history_that_shrinks_by_half_ends_the_epoch():
    talk = Conversation()
    for text in ("about alpha", "more", "more still", "and more", "the last"):
        await talk.say(text)
    talk.messages = [*talk.messages[:2]]
    assert skills(await talk.say("now beta")) == ("beta",)


async def test_two_first_requests_side_by_side_choose_one_block():
    class Slow(Named):
        async def retrieve(self, texts, index, k):
            await asyncio.sleep(0.02)
            return await super().retrieve(texts, index, k)

    talk = Conversation(Slow())
    one, two = await asyncio.gather(talk.say("about alpha"), talk.send(), return_exceptions=False)
    assert one.body == two.body is not None
    assert len(talk.retriever.asked) == 1


async def test_a_retriever_that_fails_or_hangs_costs_the_session_nothing_it_has():
    class Broken(Named):
        trouble = ""

        async def retrieve(self, texts, index, k):
            if self.trouble == "raise":
                raise RuntimeError("broken")
            if self.trouble == "hang":
                await asyncio.sleep(60)
            return await super().retrieve(texts, index, k)

    talk = Conversation(Broken())
    talk.retriever.trouble = "raise"
    assert (await talk.say("about alpha")).reason == "nothing to add"
    talk.retriever.trouble = ""
    assert skills(await talk.say("about alpha then")) == ("alpha",)
    talk.retriever.trouble = "raise"
    assert skills(await talk.say("now beta")) == ("alpha",)
    assert talk.rewriter.note == "retrieval failed: RuntimeError('broken')"
    talk.retriever.trouble = "hang"
    talk.rewriter.patience = 0.05
    assert skills(await talk.say("now gamma")) == ("alpha",)
    assert talk.rewriter.note == "retrieval failed: TimeoutError()"


async def test_a_skill_that_the_client_lists_itself_is_not_repeated():
    talk = Conversation()
    talk.messages[0]["content"] = "<available_skills><skill><name>alpha</name></skill></available_skills>"
    assert skills(await talk.say("about alpha and beta")) == ("beta",)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"\xff", b'{"messages":[]}', b'{"messages":"x"}', b"[" * 100_000])
async def test_whatever_a_client_sends_is_answered_with_a_reason_and_never_an_exception(body):
    talk = Conversation()
    outcome = await talk.rewriter.rewrite(CHAT, body, "/v1/chat/completions", Hints(), "p", talk.index)
    assert outcome.body is None
    assert outcome.reason in ("passed: not a request of its dialect", "side turn: unknown", "nothing to add")


async def test_the_reason_of_an_unproven_place_is_one_of_few_and_the_detail_says_more():
    body = b'{"messages":[{"role":"system","content":"x","content":"y"},{"role":"user","content":"about alpha"}]}'
    outcome = await Conversation().rewriter.rewrite(CHAT, body, "/v1/chat/completions", Hints(), "p", library())
    assert outcome.reason == "passed: no proven place for a block"
    assert "twice" in (outcome.detail or "")


async def test_a_block_that_is_there_already_is_left_alone():
    talk = Conversation()
    first = await talk.say("about alpha")
    assert first.body is not None
    outcome = await talk.rewriter.rewrite(CHAT, first.body, "/v1/chat/completions", Hints(), "p", talk.index)
    assert (outcome.body, outcome.reason) == (None, "passed: injected already")


async def test_secrets_in_human_words_do_not_reach_the_saved_state():
    talk = Conversation()
    await talk.say("about alpha with sk-canary0123456789abcdef")
    assert all(b"canary" not in row[1] for row in talk.sink.rows)
