"""The real OpenClaw through the real mitmdump with our addon, TLS intercepted, a scripted LLM behind.

One gateway serves the whole file, since starting one takes longer than most tests; each test speaks in sessions of
its own, and the last ones look at what all of them left behind. Each test names the kinds of the requests it caused,
in order, so that the store can be asked for exactly these at the end.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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
SECTIONS = ("Decisions", "Open TODOs", "Constraints/Rules", "Pending user asks", "Exact identifiers")
PASTE = " 7f3a91 bc04de 55aa10 e8d2c4"  # words of no skill
BY_ITSELF = ("Follow the heartbeat monitor", "A background task completed")


def beyond_directives(kit: ModuleType, turns: list[Any], body: dict[str, Any]) -> Any:
    """What OpenClaw starts by itself carries no directive: a summary has the sections it asks for, other turns use a tool."""
    if not body.get("tools"):
        return kit.Reply("\n\n".join(f"## {section}\nNone." for section in SECTIONS))
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
    with RecordingLLM(beyond_directives) as llm, Stage(folder, llm, with_telegram) as stage:
        yield stage


class Watch:
    """The turns that came since it was made. A chat without tools is a compaction, and these come when they like."""

    def __init__(self, stage: Stage) -> None:
        self._stage, self._start = stage, len(stage.llm.received)

    def all(self) -> list[Pair]:
        return self._stage.pairs(self._start)

    def turns(self) -> list[Pair]:
        return [pair for pair in self.all() if pair.has_tools]

    def wait(self, n: int) -> None:
        self._stage.wait_for(lambda: len(self.turns()) >= n)

    def __call__(self, *kinds: str) -> list[Pair]:
        """Exactly as many as there are kinds; the store is asked for these at the end."""
        self.wait(len(kinds))
        pairs = self.turns()
        assert [pair.got.answered for pair in pairs[len(kinds) :]] == []
        self._stage.kinds += kinds
        return pairs


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
    if model == "anthropic/claude-opus-4-6":
        assert [pair.got.body.count(b'"cache_control"') for pair in pairs] == [3, 3, 4]  # the API's limit is 4
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
    watch.wait(3)
    stage.post("And now?", model, "main")
    return watch("main", "heartbeat", "heartbeat", "main")


def test_a_heartbeat_and_its_tool_loop_get_nothing(stage: Stage):
    first, beat, loop, last = heartbeat(stage, CHAT)
    assert b"Follow the heartbeat monitor" in beat.got.body
    assert loop.got.json()["messages"][-2]["role"] == "tool"
    assert blocks([beat, loop]) == [None, None]
    assert first.block is not None
    assert last.block == first.block


@pytest.mark.parametrize(("model", "spawn"), [(CHAT, SPAWN), (RESPONSES, SPAWN_BY_CODE)], ids=["chat", "responses"])
def test_a_subagent_gets_its_own_block_and_its_announcement_none(stage: Stage, model: str, spawn: str):
    name = f"parent-{model.partition('/')[0]}"
    stage.call("sessions.patch", key=f"agent:main:{name}", model=model)
    watch = Watch(stage)
    stage.post(f"{REBASE} {spawn}", model, name)
    watch.wait(5)
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
    watch, model = Watch(stage), "example/small-1"
    text = REBASE + " Here is the file:" + PASTE * 800
    while watch.turns() == watch.all():
        assert len(watch.all()) < 12, "the history was never compacted"
        stage.post(text, model, "small")
    stage.post(SLOW, model, "small")
    turns = watch(*["main"] * len(watch.turns()))
    compactions = [pair for pair in watch.all() if not pair.has_tools]
    for pair in compactions:
        assert pair.sent.json()["messages"][0]["content"].startswith("You are a context summarization assistant.")
    assert set(blocks(compactions)) == {None}
    before, after = turns[0].block, turns[-1].block
    assert set(blocks(turns[:-1])) == {before}
    assert b"compacted into the following summary" in turns[-1].sent.body
    assert before is not None
    assert after is not None
    assert "### git-rebase-conflicts" in before
    assert "### sql-slow-query" in after
    assert "git-rebase-conflicts" not in after


# --- the cost -------------------------------------------------------------------------------------


def cached_tokens(bodies: Iterable[bytes], added: Iterable[str | None]) -> tuple[int, int]:
    """What a provider's prefix cache serves of a session's chat completions: all of it, and the client's own part.

    Of each prompt, in the order in which a model reads it (tools, then messages), the longest beginning that an
    earlier prompt had too; four bytes to a token, in whole blocks of 128 tokens.
    """
    seen: list[bytes] = []
    total = own = 0
    for body, block in zip(bodies, added, strict=True):
        request = json.loads(body)
        prompt = json.dumps([request["tools"], request["messages"]]).encode()
        escaped = json.dumps(block or "")[1:-1].encode()
        at = prompt.index(escaped)
        cached = max((common_prefix(prompt, other) for other in seen), default=0)
        total += cached // 4 // 128 * 128
        own += (cached - max(0, min(cached - at, len(escaped)))) // 4 // 128 * 128
        seen.append(prompt)
    return total, own


def test_the_accounting_finds_what_is_repeated_and_leaves_out_what_we_added():
    def body(*messages: str) -> bytes:
        return json.dumps({"tools": [], "messages": list(messages)}).encode()

    a, b, ours = "a" * 2048, "b" * 2048, "x" * 1024
    assert cached_tokens([body(a), body(a, b), body(a, b)], [None] * 3) == (512 + 1024, 512 + 1024)
    assert cached_tokens([body(b, a), body(a, b)], [None] * 2) == (0, 0)
    assert cached_tokens([body(a + ours), body(a + ours, b), body(a + ours, b)], [ours] * 3) == (768 + 1280, 512 + 1024)


def conversation(stage: Stage, session: str) -> None:
    """30 turns about three things, each with a file pasted in; every fifth calls a tool."""
    pasted = PASTE * 60
    for subject in (REBASE, SLOW, "Write a polite email to the customer."):
        for n in range(10):
            stage.post(f"{subject} Part {n}.{pasted} {READ if n % 5 == 4 else ''}".rstrip(), CHAT, session)


KINDS_OF_CONVERSATION = (*["main"] * 5, "tool") * 6


def test_thirty_turns_with_two_changes_of_subject_keep_the_prompt_cache(
    stage: Stage, record_property: Callable[[str, object], None]
):
    watch = Watch(stage)
    conversation(stage, "with")
    pairs = watch(*KINDS_OF_CONVERSATION)
    chosen = blocks(pairs)
    first, second, third = dict.fromkeys(chosen)
    assert (chosen[:12], chosen[12:24], chosen[24:]) == ([first] * 12, [second] * 12, [third] * 12)
    end = "\n</metaclaw-skills>"
    assert second is not None
    assert third is not None
    assert first is not None
    assert second.startswith(first.removesuffix(end))  # it only grows at its end
    assert third.startswith(second.removesuffix(end))

    stage.stop_proxy()
    stage.start_proxy(addon=False)
    watch = Watch(stage)
    conversation(stage, "without")
    plain = watch.turns()
    assert blocks(plain) == [None] * 36
    stage.stop_proxy()
    stage.start_proxy()
    watch = Watch(stage)
    stage.post(f"{REBASE} Once more.", CHAT, "with")
    assert blocks(watch("main")) == [third]  # the new proxy goes on where the old one was

    bare, _ = cached_tokens((pair.got.body for pair in plain), [None] * 36)
    total, own = cached_tokens((pair.got.body for pair in pairs), chosen)
    print(f"cached tokens: {bare:,} without the addon, {total:,} with it ({total / bare:.1%}), {own:,} of the client's own ({own / bare:.1%})")
    record_property("cached_tokens_ratio", round(own / bare, 4))
    assert own / bare >= 0.95


def test_a_heartbeat_whose_history_is_at_the_provider_gets_nothing_in_its_tool_loop_either(stage: Stage):
    """Not beside the other one, for OpenClaw may hold a second heartbeat back for 30 s."""
    first, beat, loop, last = heartbeat(stage, RESPONSES)
    assert b"Follow the heartbeat monitor" in beat.got.body
    assert [item["type"] for item in loop.got.json()["input"]] == ["function_call_output"]
    assert loop.got.json()["previous_response_id"]
    assert blocks([beat, loop]) == [None, None]
    assert first.block is not None
    assert last.block == first.block


# --- what all of it left behind -------------------------------------------------------------------


EXPECTED = {"agent": "openclaw", "state": "captured", "status_code": 200, "live": True, "retry": False}


@pytest.fixture
def after_all(stage: Stage) -> Stage:
    """The stage, with at least one turn played."""
    if not stage.kinds:
        watch = Watch(stage)
        stage.post(REBASE, CHAT, "only")
        watch("main")
    return stage


def command(stage: Stage, tool: str, *arguments: str) -> str:
    line = [str(Path(sys.executable).with_name(tool)), *arguments]
    done = subprocess.run(line, env=environment(stage.home), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def recorded(stage: Stage) -> list[dict[str, Any]]:
    return [json.loads(line) for line in command(stage, "metaclaw", "turns", "--json").splitlines()]


def compactions(stage: Stage) -> list[Pair]:
    return [pair for pair in stage.pairs() if not pair.has_tools]


def test_openclaws_own_state_never_holds_the_block(after_all: Stage):
    files: dict[Path, bytes] = {}
    for path in (path for user in ("user", "other") for path in (after_all.folder / user).rglob("*") if path.is_file()):
        with contextlib.suppress(FileNotFoundError):  # a journal of its databases that ends meanwhile
            files[path] = path.read_bytes()
    marked = [path for path, held in files.items() if MARK in held]
    assert marked == []
    assert [path for path, held in files.items() if b"git rebase conflict" in held]  # what was said is found that way


def test_what_is_no_turn_passes_as_it_is(after_all: Stage):
    sent = Counter((message.method, message.path, message.body) for message in after_all.sent())
    other = Counter((m.method, m.path, m.body) for m in after_all.llm.received if m.dialect == "other")
    assert other <= sent
    assert {pair.block for pair in compactions(after_all)} <= {None}


def test_the_store_has_every_exchange_once_and_in_the_humans_words(after_all: Stage):
    kinds = Counter(after_all.kinds) + Counter({"compaction": len(compactions(after_all))})
    after_all.wait_for(lambda: len(recorded(after_all)) >= kinds.total())
    rows = recorded(after_all)
    assert Counter(row["kind"] for row in rows) == kinds
    assert len({row["flow_id"] for row in rows}) == len(rows)
    for row in rows:
        if row["kind"] == "compaction" and row["state"] == "skipped":  # OpenClaw gives one up where a person speaks meanwhile
            assert row["error"] == "Client disconnected."
            continue
        assert {name: row[name] for name in EXPECTED} == EXPECTED
        assert row["stop_reason"] == ("tool_calls" if row["tool_calls"] else "stop")
        assert row["error"] in (None, "Client disconnected.")  # some clients leave at "[DONE]", before the body's end
        if row["kind"] in ("main", "tool"):
            assert row["user_text"] in after_all.said
            assert row["injected"]
        elif row["kind"] == "subagent":
            assert row["user_text"] == "Write a polite email to the customer."
            assert row["injected"] == ["write-email"]
        else:
            assert (row["user_text"], row["injected"]) == (None, None)


def test_a_capture_of_the_same_traffic_adds_nothing_to_the_store(after_all: Stage):
    after_all.stop_proxy()
    rows = len(recorded(after_all))
    har = after_all.folder / "flows.har"
    command(after_all, "mitmdump", "-nr", str(after_all.flows), "--set", f"hardump={har}")
    flows, entries = (json.loads(command(after_all, "metaclaw", "import", "--json", str(f))) for f in (after_all.flows, har))
    assert (flows["new"], flows["known"], flows["failed"]) == (0, rows, 0)
    assert (entries["new"], entries["failed"]) == (0, 0)
    assert entries["known"] >= rows  # mitmproxy writes a flow that its client left early twice
    assert len(recorded(after_all)) == rows
    assert json.loads(command(after_all, "metaclaw", "store", "verify", "--json"))["problems"] == []
    after_all.start_proxy()
