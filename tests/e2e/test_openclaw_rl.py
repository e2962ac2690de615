"""The real OpenClaw in rl mode: mitmdump, our policy server and the engine answer it; behind them stands a scripted LLM.

A tiny model, taught through the SDK, calls a tool and then answers. So whole turns run without anybody else's model: what
the LLM of the kit receives is what the policy server could not or must not answer.

The tests share one stage and its record; the last ones look at all that was sampled in it. Most of the 200 turns they want
are short ones of a plain client through the same proxy, as OpenClaw's have up to 20,000 tokens each.
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from e2e_tools import environment
from openclaw_tools import RecordingLLM, Stage
from policy_help import RunningEngine, close_rest, running_engine
from rl_tools_e2e import KEY, URLS, Conversation, Nothing, Reuse, holds_in_order, sent
from sqlalchemy import insert, select
from taught_model import CODE, READ, make_untaught, teach

from metaclaw_core.learn import journal
from metaclaw_core.model import Role
from metaclaw_core.policy.render import Renderer
from metaclaw_core.policy.tokens import decode
from metaclaw_core.proxy.control import call, running_proxies
from metaclaw_core.store.db import open_store
from metaclaw_core.store.samplefile import unpack_ids, unpack_logprobs
from metaclaw_core.store.tables import samples, turns, versions

pytestmark = [
    pytest.mark.openclaw,
    pytest.mark.local,
    pytest.mark.slow,
]

CHAT, RESPONSES, ANTHROPIC = "example/fake-1", "openai/gpt-5.5", "anthropic/claude-opus-4-6"
SAYS_READ, SAYS_CODE = 2, 3  # versions


class Taught:
    """The engine with two versions that were taught."""

    def __init__(self, engine: RunningEngine, tokenizer: Any, service: Any) -> None:
        self.engine, self.tokenizer, self.service = engine, tokenizer, service
        self.paths = {
            SAYS_READ: teach(service, engine.model, tokenizer, READ),
            SAYS_CODE: teach(service, engine.model, tokenizer, CODE),
        }


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Taught]:
    import tinker
    from transformers import AutoTokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_TELEMETRY", "0")
        patch.setenv("HF_HUB_OFFLINE", "1")
        model = make_untaught(tmp_path_factory.mktemp("untaught") / "model")
        with running_engine(model, tmp_path_factory.mktemp("engine-home")) as engine:
            service = tinker.ServiceClient(base_url=engine.url, api_key=engine.key)
            yield Taught(engine, AutoTokenizer.from_pretrained(model), service)
            service.close("success").result(30)
            close_rest(engine)


class RLStage(Stage):
    """A user whose proxy is in rl mode, with the taught versions in the store."""

    def __init__(self, folder: Path, llm: RecordingLLM, taught: Taught) -> None:
        super().__init__(folder, llm)
        self.taught = taught

    def make_home(self) -> None:
        super().make_home()
        engine = self.taught.engine
        rl = {
            "model": engine.model, "tinker_base_url": engine.url, "tinker_api_key": engine.key,
            "train": False, "warmup_turns": 0, "control_share": 0,
        }  # fmt: skip
        (self.home / "config.yaml").write_text(json.dumps({"mode": "rl", "rl": rl}))
        with open_store(self.home / "store.db") as store:
            journal.begin(store, engine.model)
            made = {"base_model": engine.model, "created_at": time.time(), "status": "candidate", "state_path": "tinker://none"}
            with store.transaction() as db:
                for number, path in self.taught.paths.items():
                    assert db.execute(insert(versions).values(sampler_path=path, **made).returning(versions.c.id)).scalar_one() == number
        self.metaclaw("route", "pin", str(SAYS_READ))

    def metaclaw(self, *words: str) -> str:
        tool = str(Path(sys.executable).with_name("metaclaw"))
        done = subprocess.run([tool, *words], env=environment(self.home), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def status(self) -> dict[str, Any]:
        (proxy,) = running_proxies(self.home)
        return call(proxy, "status")

    def serve(self, version: int) -> None:
        """Pin it, and wait until the next human turn gets it."""
        self.metaclaw("route", "pin", str(version))
        self.wait_for(lambda: self.answers_with(version))

    def answers_with(self, version: int) -> bool:
        found = self.status()["route"]
        return found["ready"] and found["working"] == version and version in found["versions"]

    def exchanges(self, session: str) -> list[dict[str, Any]]:
        """Of the session with that name, oldest first, each with its sample under "sample" (None: an upstream answered)."""
        self.metaclaw("turns", "--json")  # takes the spools in
        with open_store(self.home / "store.db") as store:
            rows = [row for row in store.turns() if row["session_key"] == f"agent:main:{session}"]
            with store.reading() as db:
                kept = {row.flow_id: dict(row._mapping) for row in db.execute(select(samples))}
        return [{**row, "sample": kept.get(row["flow_id"])} for row in rows]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, taught: Taught) -> Iterator[RLStage]:
    with RecordingLLM() as llm, RLStage(tmp_path_factory.mktemp("openclaw"), llm, taught) as stage:
        stage.wait_for(lambda: stage.answers_with(SAYS_READ), 90)
        yield stage


CASES = {CHAT: (SAYS_READ, READ), ANTHROPIC: (SAYS_READ, READ), "exresp/fake-1": (SAYS_READ, READ), RESPONSES: (SAYS_CODE, CODE)}
MORE = 3  # things a human says after the first


@pytest.mark.parametrize("model", CASES)
def test_the_own_model_calls_a_tool_and_answers_in_the_agents_own_dialect(stage: RLStage, model: str) -> None:
    version, lesson = CASES[model]
    stage.serve(version)
    session, before = "rl-" + model.replace("/", "-").replace(".", ""), len(stage.llm.received)
    assert stage.post("Please read notes.txt.", model, session) in lesson.answers
    for number in range(MORE):
        assert stage.post(f"And again, for the {number + 2}. time?", model, session) in lesson.answers
    first, second, *more = rows = stage.exchanges(session)
    assert [row["kind"] for row in rows] == ["main", "tool", *["main"] * MORE]
    assert first["turn_id"] == second["turn_id"]
    assert first["tool_calls"][0]["name"] == lesson.tool
    for row in rows:
        assert (row["version"], row["stream"], row["state"], row["error"]) == (version, True, "captured", None)
        assert (row["sample"]["klass"], row["sample"]["version"], row["sample"]["malformed"]) == ("A", version, False)
    assert "127.0.0.1" not in first["host"]  # the record names the LLM that was meant
    # The call that came back is the very tokens that were sampled, and so is each answer after it.
    assert [row["sample"]["reused"] for row in rows[:2]] == [0, first["sample"]["length"]]
    assert all(row["sample"]["reused"] > first["sample"]["length"] for row in more)
    if model == RESPONSES:
        assert first["response_id"].startswith("resp_mc_")
        assert [row["previous_response_id"] for row in rows[1:]] == [row["response_id"] for row in rows[:-1]]
    assert [m.answered for m in stage.llm.received[before:] if m.dialect != "other"] == []  # nobody else was asked


def test_an_engine_that_stalls_leaves_the_turn_to_the_upstream_by_the_agents_own_retry(stage: RLStage, taught: Taught) -> None:
    stage.serve(SAYS_READ)
    process = taught.engine.process
    os.kill(process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert stage.post("Say something please.", CHAT, "rl-stalled") not in READ.answers
        assert time.monotonic() - began < 45
    finally:
        os.kill(process.pid, signal.SIGCONT)
    rows = stage.exchanges("rl-stalled")
    assert rows[0]["error"] == "policy: timeout"
    assert (rows[-1]["state"], rows[-1]["version"], rows[-1]["sample"]) == ("captured", None, None)
    stage.wait_for(lambda: stage.answers_with(SAYS_READ), 90)
    assert stage.post("And now read notes.txt.", CHAT, "rl-after") in READ.answers


def test_a_native_responses_conversation_goes_on_at_the_upstream_with_all_of_its_history(stage: RLStage) -> None:
    stage.serve(SAYS_CODE)
    assert stage.post("Please read notes.txt.", RESPONSES, "rl-chain") in CODE.answers
    config = json.loads((stage.home / "config.yaml").read_text())
    (stage.home / "config.yaml").write_text(json.dumps({**config, "mode": "skills_only"}))
    (proxy,) = running_proxies(stage.home)
    call(proxy, "reload")
    try:
        before = len(stage.llm.received)
        stage.post("What did it say?", RESPONSES, "rl-chain")
        asked = [m for m in stage.llm.received[before:] if m.dialect != "other"]
        assert "previous_response_id" not in asked[0].json()
        assert b"Please read notes.txt." in asked[0].body
    finally:
        (stage.home / "config.yaml").write_text(json.dumps(config))
        call(proxy, "reload")
        stage.wait_for(lambda: stage.status()["route"] is not None and stage.answers_with(SAYS_CODE), 90)
    rows = stage.exchanges("rl-chain")
    assert [row["status_code"] for row in rows] == [200, 200, 503, 200]


def test_plain_clients_of_three_dialects_run_their_tool_loops_at_the_same_time(stage: RLStage) -> None:
    stage.serve(SAYS_READ)
    before = len(stage.llm.received)
    with ThreadPoolExecutor(len(URLS)) as threads:
        answers = list(threads.map(lambda dialect: talk(stage, dialect), URLS))
    assert [len(some) for some in answers] == [TALKS * (1 + MORE)] * len(URLS)
    assert {text.strip() for some in answers for text in some} <= READ.answers
    assert [m.answered for m in stage.llm.received[before:] if m.dialect != "other"] == []


TALKS = 12  # of each dialect, each with 2 + MORE requests


def talk(stage: RLStage, dialect: str) -> list[str]:
    trust = ssl.create_default_context(cafile=stage.folder / "mitmproxy/mitmproxy-ca-cert.pem")
    answers = []
    with httpx.Client(proxy=f"http://127.0.0.1:{stage.proxy_port}", verify=trust, trust_env=False, timeout=60) as client:
        for number in range(TALKS):
            conversation = Conversation(client, dialect, stream=number % 2 == 0, linked=dialect == "openai_responses" and number % 3 == 0)
            answers.append(conversation.human(f"Please read notes.txt, {dialect} {number}."))
            answers += [conversation.human(f"And for the {again + 2}. time?") for again in range(MORE)]
    return answers


# --- the record of all of the above ---------------------------------------------------------------


def kept(stage: RLStage) -> list[Any]:
    """Every sample with its exchange's session, oldest first."""
    stage.metaclaw("turns", "--json")
    with open_store(stage.home / "store.db") as store, store.reading() as db:
        found = select(samples, turns.c.session, turns.c.version.label("turn_version")).join(turns, turns.c.flow_id == samples.c.flow_id)
        return list(db.execute(found.order_by(samples.c.id)).all())


def test_stored_ids_and_logprobs_are_those_of_the_weights(stage: RLStage, taught: Taught) -> None:
    from tinker import types

    rows = kept(stage)
    assert len(rows) >= 200
    assert sum(row.prompt_length > 10_000 for row in rows) >= 20
    assert {(row.klass, row.turn_version == row.version) for row in rows} == {("A", True)}
    clients = {path: taught.service.create_sampling_client(model_path=path).result(60) for path in {row.checkpoint for row in rows}}
    worst, unsure = 0.0, 0
    for number, row in enumerate(rows):
        prompt, said = unpack_ids(row.prompt_ids).tolist(), unpack_ids(row.tokens).tolist()
        # All positions are seconds of work for a long prompt, but they owe nothing to what the engine remembers of it.
        last = None if number % 3 == 0 else len(said)
        again = clients[row.checkpoint].compute_logprobs(types.ModelInput.from_ints(prompt + said), last).result(60)
        logprobs = unpack_logprobs(row.logprobs)
        assert len(logprobs) == len(said) > 0
        worst = max(worst, float(np.abs(logprobs - np.asarray(again[len(prompt) :], dtype=np.float32)).max()))
        unsure += int((logprobs < -0.1).sum())
    print(f"{len(rows)} turns, at most {worst:.1e} apart; {unsure} tokens that were not certain")  # -s shows it
    assert worst < 1e-4
    assert unsure > 200


def test_every_reply_that_came_back_equal_is_in_the_prompt_as_it_was_sampled(stage: RLStage, taught: Taught) -> None:
    rows = {row.flow_id: row for row in kept(stage)}
    stage.stop_proxy()  # its flow file is whole then
    renderer, reuse, seen = Renderer(taught.tokenizer), Reuse(), 0
    came_back = others = reworded = 0
    for one in sent(stage.flows, {flow: row.session for flow, row in rows.items()}):
        row, seen = rows[one.flow_id], seen + 1
        prompt, expected = unpack_ids(row.prompt_ids).tolist(), reuse.expected(one)
        plain = renderer.render(one.request, Nothing(), max_tokens=2**31)
        assert decode(taught.tokenizer, prompt) == decode(taught.tokenizer, plain.ids)
        assert row.reused == sum(map(len, expected))
        assert holds_in_order(prompt, expected)
        if not expected:
            assert tuple(prompt) == plain.ids
        came_back += len(expected)
        others += sum(message.role is Role.ASSISTANT for message in one.request.messages) - len(expected)
        reworded += tuple(prompt) != plain.ids  # a reply in it was spelled as no tokenizer would
        reuse.add(one, unpack_ids(row.tokens).tolist())
    print(f"{seen} prompts, {came_back} replies came back equal and {others} did not; {reworded} prompts differ from new tokens of the same text")
    assert seen == len(rows) >= 200
    assert came_back > 200
    assert reworded > 50


def test_no_key_of_an_agent_is_in_any_file_of_ours(stage: RLStage) -> None:
    files = [path for path in stage.home.rglob("*") if path.is_file()]
    kept = [path for path in files if any(key in path.read_bytes() for key in (b"sk-fake", b"sk-ant", KEY.encode()))]
    assert kept == []
