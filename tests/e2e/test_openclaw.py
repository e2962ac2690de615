"""The real OpenClaw through the real mitmdump with our addon, TLS intercepted, a scripted LLM behind.

One gateway serves the whole file, since starting one takes longer than most tests; each test speaks in sessions of
its own, and the last ones look at what all of them left behind. Each test names the kinds of the requests it caused,
in order, so that the store can be asked for exactly these at the end.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from e2e_tools import environment
from openclaw_tools import MARK, Pair, RecordingLLM, Stage, Telegram, common_prefix

pytestmark = [pytest.mark.openclaw, pytest.mark.slow]

CHAT, RESPONSES = "example/fake-1", "openai/gpt-5.5"
REBASE = "Help me resolve a git rebase conflict in two files."
SLOW = "Why is this SQL query slow?"
READ = 'TOOL:read {"path":"notes.txt"} END'
READ_BY_CODE = 'TOOL:exec {"code":"text(await read({path:\\"notes.txt\\"}))"} END'
SPAWN = 'TOOL:tool_call {"id":"sessions_spawn","args":{"task":"Write a polite email to the customer."}} END'
SPAWN_BY_CODE = 'TOOL:exec {"code":"text(await sessions_spawn({task:\\"Write a polite email to the customer.\\"}))"} END'
BY_ITSELF = ("Follow the heartbeat monitor", "A background task completed")


def machine_turns_use_a_tool(kit: ModuleType, turns: list[Any], body: dict[str, Any]) -> Any:
    """What OpenClaw starts by itself carries no directive; here the model reads a file, so that it has a tool loop."""
    new = list(takewhile(lambda turn: turn.role != "model", reversed(turns)))
    if any(turn.role == "tool" for turn in new) or not any(mark in turn.text for turn in new for mark in BY_ITSELF):
        return None
    names = {tool.get("name") or tool.get("function", {}).get("name") for tool in body["tools"]}
    if "read" in names:
        return kit.Reply(tool=("read", {"path": "notes.txt"}))
    return kit.Reply(tool=("exec", {"code": 'text(await read({path:"notes.txt"}))'}))


@pytest.fixture(scope="module")
def telegram() -> Iterator[Telegram]:
    with Telegram() as server:
        yield server


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, telegram: Telegram) -> Iterator[Stage]:
    def with_telegram(config: dict[str, Any]) -> None:
        config["channels"] = {"telegram": telegram.settings}
        config["plugins"] = {"entries": {"telegram": {"enabled": True}}}

    folder = tmp_path_factory.mktemp("openclaw")
    with RecordingLLM(machine_turns_use_a_tool) as llm, Stage(folder, llm, with_telegram) as stage:
        yield stage


class Watch:
    """The chats that came since it was made."""

    def __init__(self, stage: Stage) -> None:
        self._stage, self._start = stage, len(stage.llm.received)

    def __call__(self, *kinds: str, session: str | None = None) -> list[Pair]:
        """Waits for as many as there are kinds. With `session`, only the pairs of it are returned."""
        self._stage.wait_for(lambda: self._stage.chats(self._start) >= len(kinds))
        pairs = self._stage.pairs(self._start)
        assert [pair.got.answered for pair in pairs[len(kinds) :]] == []
        self._stage.kinds += kinds
        return [pair for pair in pairs if session is None or pair.in_session(session)]


def blocks(pairs: Iterable[Pair]) -> list[str | None]:
    return [pair.block for pair in pairs]


# --- the dialects ---------------------------------------------------------------------------------

AUTH = {
    CHAT: ("authorization", "Bearer sk-fake-example-0000"),
    "exresp/fake-1": ("authorization", "Bearer sk-fake-example-0000"),
    "exant/fake-1": ("x-api-key", "sk-fake-example-0000"),
    RESPONSES: ("authorization", "Bearer sk-fake-openai-0000"),
    "anthropic/claude-opus-4-6": ("x-api-key", "sk-ant-api03-fake-0000"),
    "google/gemini-2.5-pro": ("x-goog-api-key", "AIzaFake0000"),
    "ollama/fake-1": ("authorization", "Bearer ollama-fake-0000"),
}


@pytest.mark.parametrize("model", AUTH)
def test_the_llm_gets_the_clients_request_and_one_block_that_stays_the_same(stage: Stage, model: str):
    """HTTPS_PROXY and NODE_EXTRA_CA_CERTS are all that OpenClaw is told; Ollama, which ignores them, comes by reverse mode."""
    watch, session = Watch(stage), "d-" + model.replace("/", "-").replace(".", "")
    stage.post(REBASE, model, session)
    answer = stage.post(f"{REBASE} {READ_BY_CODE if model == RESPONSES else READ}", model, session)
    assert answer == "Tool finished. The task is done."
    pairs = watch("main", "main", "tool")
    (block,) = set(blocks(pairs))
    assert block is not None
    assert "### git-rebase-conflicts" in block
    name, value = AUTH[model]
    for pair in pairs:
        assert pair.got.header(name) == value
        assert pair.got.body.count(b'"cache_control"') == pair.sent.body.count(b'"cache_control"') <= 4
    if model == RESPONSES:
        assert ["previous_response_id" in pair.got.json() for pair in pairs] == [False, True, True]
        assert pairs[1].got.body.count(REBASE.encode()) == 1  # a delta: the history is at the provider
        assert REBASE.encode() not in pairs[2].got.body


def test_the_command_line_of_a_user_gets_the_same(stage: Stage):
    watch = Watch(stage)
    assert stage.say(f"{REBASE} {READ}", CHAT, "cli").strip() == "Tool finished. The task is done."
    (block,) = set(blocks(watch("main", "tool")))
    assert block is not None
    assert "### git-rebase-conflicts" in block


def test_ollama_in_the_cloud_comes_through_openclaw_proxy_url(stage: Stage):
    watch = Watch(stage)
    stage.once(f"{REBASE} {READ}", "ollama/fake-1", "managed")
    pairs = watch("main", "tool")
    assert {pair.got.header("host") for pair in pairs} == {"ollama.com"}
    (block,) = set(blocks(pairs))
    assert block is not None
    assert "### git-rebase-conflicts" in block


def test_a_turn_from_telegram_is_looked_up_by_the_humans_words_only(stage: Stage, telegram: Telegram):
    watch, before = Watch(stage), len(telegram.replies)
    text = "Write a polite email to the customer about the delay."
    stage.said.append(text)
    telegram.write(text)
    (pair,) = watch("main")
    stage.wait_for(lambda: len(telegram.replies) > before)
    assert pair.sent.body.count(text.encode()) == 1
    assert pair.block is not None
    assert "### write-email" in pair.block


# --- what is no human's turn ----------------------------------------------------------------------


def heartbeat(stage: Stage, model: str) -> list[Pair]:
    """A turn, a heartbeat with a tool call, a turn, all in the main session."""
    stage.call("sessions.patch", key="agent:main:main", model=model)
    watch = Watch(stage)
    stage.post(REBASE, model, "main")
    stage.call("wake", mode="now", text="The build is red. How do I fix a failing test?")
    stage.wait_for(lambda: len(stage.pairs(watch._start)) >= 3)
    stage.post("And now?", model, "main")
    return watch("main", "heartbeat", "heartbeat", "main")


def test_a_heartbeat_and_its_tool_loop_get_nothing(stage: Stage):
    first, beat, loop, last = heartbeat(stage, CHAT)
    assert b"Follow the heartbeat monitor" in beat.got.body
    assert loop.got.json()["messages"][-2]["role"] == "tool"
    assert blocks([beat, loop]) == [None, None]
    assert first.block is not None
    assert last.block == first.block


@pytest.mark.parametrize(("model", "spawn"), [(CHAT, SPAWN), (RESPONSES, SPAWN_BY_CODE)])
def test_a_subagent_gets_its_own_block_and_its_announcement_none(stage: Stage, model: str, spawn: str):
    name = f"parent-{model.partition('/')[0]}"
    stage.call("sessions.patch", key=f"agent:main:{name}", model=model)
    watch = Watch(stage)
    stage.post(f"{REBASE} {spawn}", model, name)
    stage.wait_for(lambda: len(stage.pairs(watch._start)) >= 5)
    stage.post("And now?", model, name)
    pairs = watch("main", "tool", "subagent", "announce", "announce", "main")
    parent = [pair for pair in pairs if pair.in_session(name)]
    (child,) = [pair for pair in pairs if not pair.in_session(name)]
    call, result, announcement, loop, last = parent
    assert b"[Subagent Task]" in child.sent.body
    assert child.block is not None
    assert "### write-email" in child.block
    assert "git-rebase-conflicts" not in child.block
    assert b"A background task completed" in announcement.sent.body
    assert announcement.got.answered.startswith("tool ")
    assert loop.got.answered == "text Tool finished. The task is done."
    assert blocks([announcement, loop]) == [None, None]
    assert call.block is not None
    assert blocks([result, last]) == [call.block, call.block]


def test_a_compaction_gets_nothing_and_the_turn_after_it_chooses_anew(stage: Stage):
    watch, filler = Watch(stage), " lorem ipsum dolor sit amet" * 800
    turns = 0
    while stage.pairs(watch._start)[-1:] == [] or stage.pairs(watch._start)[-1].sent.json().get("tools"):
        turns += 1
        assert turns < 12, "it never compacted"
        stage.post(f"{REBASE}{filler}", "example/small-1", "long")
        if any(not pair.sent.json().get("tools") for pair in stage.pairs(watch._start)):
            break
    stage.post(SLOW, "example/small-1", "long")
    pairs = stage.pairs(watch._start)
    print([(len(p.sent.body), p.block and len(p.block), p.got.answered[:30]) for p in pairs])


# --- the cost -------------------------------------------------------------------------------------


def cached_tokens(bodies: Iterable[bytes]) -> int:
    """What a provider's prefix cache serves of a session's chat completions.

    Of each prompt, in the order in which a model reads it (tools, then messages), the longest beginning that an
    earlier prompt had too; four bytes to a token, in whole blocks of 128 tokens.
    """
    seen: list[bytes] = []
    total = 0
    for body in bodies:
        request = json.loads(body)
        prompt = json.dumps([request["tools"], request["messages"]]).encode()
        total += max((common_prefix(prompt, other) for other in seen), default=0) // 4 // 128 * 128
        seen.append(prompt)
    return total


def conversation(stage: Stage, session: str) -> None:
    """30 turns about three things; some answers are long, some turns call a tool."""
    for subject in (REBASE, SLOW, "Write a polite email to the customer."):
        for n in range(10):
            stage.post(f"{subject} Part {n}. {READ if n % 5 == 4 else 'LONG:1500'}", CHAT, session)


KINDS_OF_CONVERSATION = (*["main"] * 5, "tool") * 6


def test_thirty_turns_with_two_changes_of_subject_keep_the_prompt_cache(stage: Stage, record_property):
    watch = Watch(stage)
    conversation(stage, "with")
    print([(p.got.answered[:25], len(p.sent.body), p.block and len(p.block)) for p in stage.pairs(watch._start)])
    pairs = watch(*KINDS_OF_CONVERSATION)
    chosen = list(dict.fromkeys(blocks(pairs)))
    print(len(chosen))
    stage.stop_proxy()
    stage.start_proxy(addon=False)
    start = len(stage.llm.received)
    conversation(stage, "without")
    plain = stage.pairs(start)
    assert set(blocks(plain)) == {None}
    assert len(plain) == len(pairs)
    stage.stop_proxy()
    stage.start_proxy()
    mine, theirs = cached_tokens(pair.got.body for pair in pairs), cached_tokens(pair.got.body for pair in plain)
    twin = cached_tokens(pair.sent.body for pair in pairs)
    print(f"cached tokens: {mine:,} with the addon, {theirs:,} without ({mine / theirs:.2%}); {mine / twin:.2%} of what was sent")
