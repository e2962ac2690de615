"""How an answer comes about, segment by segment: with a sampler whose tokens are given, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from policy_help import TOKEN
from render_help import OPENED, QWEN, tokenizer_of

from metaclaw_core.model import Reasoning, Response, StopReason
from metaclaw_core.policy.asked import Sampling
from metaclaw_core.routes import FAILED_HEADER
from metaclaw_core.settings import RL, Settings
from metaclaw_core.store import samplefile
from metaclaw_core.wire import by_name

pytestmark = pytest.mark.local

CHAT = "/v1/chat/completions"
CALL = '<tool_call>\n{"name": "read", "arguments": {"path": "a.txt"}}\n</tool_call>'
THINKING = {"type": "enabled", "budget_tokens": 1024}
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}}
FUNCTION = {"name": "read", "description": "Read a file.", "parameters": SCHEMA}
TOOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "openai_chat": (CHAT, {"messages": [{"role": "user", "content": "Read a.txt"}], "tools": [{"type": "function", "function": FUNCTION}]}),
    "openai_responses": ("/v1/responses", {"input": "Read a.txt", "tools": [{"type": "function", **FUNCTION}]}),
    "anthropic": (
        "/v1/messages",
        {
            "messages": [{"role": "user", "content": "Read a.txt"}],
            "max_tokens": 500,
            "tools": [{"name": "read", "description": "Read a file.", "input_schema": SCHEMA}],
        },
    ),
    "gemini": (
        "/v1beta/models/m:generateContent",
        {"contents": [{"role": "user", "parts": [{"text": "Read a.txt"}]}], "tools": [{"functionDeclarations": [FUNCTION]}]},
    ),
    "ollama": ("/api/chat", {"messages": [{"role": "user", "content": "Read a.txt"}], "tools": [{"type": "function", "function": FUNCTION}]}),
}


def make_policy(home: Path, script: Iterable[Any], template: str) -> Any:
    """A policy whose sampler gives the segments of `script`, one text or exception each; a list of them is one reply."""
    from metaclaw_core.policy.sampler import Model, Sampler, Segment
    from metaclaw_core.policy.service import Policy

    tokenizer = tokenizer_of(template)
    replies = iter(script)

    class Scripted(Sampler):
        def __init__(self) -> None:
            super().__init__("tiny")
            self.prompts: list[list[int]] = []

        async def open(self) -> Model:
            return Model(tokenizer, 4096)

        async def probe(self, ids: Sequence[int]) -> None:
            pass

        async def check(self) -> None:
            pass

        async def sample(self, version: int, prompt: Sequence[int], sampling: Sampling, stop_ids: Sequence[int]) -> AsyncGenerator[Segment]:
            self.prompts.append(list(prompt))
            for piece in next(replies):
                if isinstance(piece, Exception):
                    raise piece
                ids = tuple(tokenizer.encode(piece, add_special_tokens=False))
                yield Segment(ids, tuple(-0.5 for _ in ids), ids[-1] in stop_ids)

    return Policy(Settings(rl=RL(model="tiny")), home, 0, Scripted())


def run(home: Path, script: Iterable[Any], work: Callable[[httpx.AsyncClient], Awaitable[None]], template: str = QWEN) -> Any:
    """`work` with a client of the server; gives the sampler."""
    from metaclaw_core.policy.server import create_app

    policy = make_policy(home, script, template)

    async def whole() -> None:
        living = asyncio.ensure_future(policy.run())
        async with asyncio.timeout(30):
            while policy.unready is not None:
                await asyncio.sleep(0.01)
        headers = {"authorization": f"Bearer {TOKEN}", "x-metaclaw-explore": "1", "x-metaclaw-session": "s", "x-metaclaw-principal": "p"}
        transport = httpx.ASGITransport(create_app(policy, TOKEN))
        async with httpx.AsyncClient(transport=transport, base_url="http://policy", headers=headers) as client:
            await work(client)
        living.cancel()
        await asyncio.wait((living,))

    asyncio.run(whole())
    return policy.sampler


def ask_once(
    home: Path, segments: Sequence[Any], dialect: str = "openai_chat", *, stream: bool = False, template: str = QWEN, **more: Any
) -> httpx.Response:
    answers: list[httpx.Response] = []

    async def work(client: httpx.AsyncClient) -> None:
        path, body = TOOLS[dialect]
        if dialect == "gemini" and stream:
            path = path.replace(":generate", ":streamGenerate") + "?alt=sse"
        answers.append(await client.post(path, json={"model": "m", "stream": stream, **body, **more}, headers={"x-metaclaw-flow": "flow"}))

    run(home, [segments], work, template)
    return answers[0]


def parsed(dialect: str, answer: httpx.Response, *, stream: bool) -> Response:
    if not stream:
        return by_name(dialect).parse_response(answer.content)
    parser = by_name(dialect).stream_parser()
    parser.feed(answer.content)
    return parser.finish()


def sample_in(home: Path) -> dict[str, Any]:
    [(_, values)] = samplefile.pending(home / "run" / samplefile.FILE)
    return values


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("dialect", TOOLS)
def test_a_call_over_a_segments_end_is_a_call_in_every_dialect(tmp_path: Path, dialect: str, stream: bool) -> None:
    said = f"Let me look.\n{CALL}<|im_end|>"
    middle = said.index('"arguments"')
    answer = ask_once(tmp_path, [said[:middle], said[middle:]], dialect, stream=stream)
    assert answer.status_code == 200, answer.text
    found = parsed(dialect, answer, stream=stream)
    assert found.complete
    assert found.message is not None
    assert found.message.text == "Let me look."
    [call] = found.message.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("read", {"path": "a.txt"})
    # Ollama and Gemini have no word of their own for it.
    assert found.stop_reason in (StopReason.TOOL_CALLS, StopReason.STOP)
    sample = sample_in(tmp_path)
    assert tokenizer_of(QWEN).decode(samplefile.unpack_ids(sample["tokens"]).tolist()) == said
    assert (sample["klass"], sample["segments"], sample["stop_reason"], sample["malformed"]) == ("A", 2, "stop", False)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_malformed_call_is_text(tmp_path: Path, stream: bool) -> None:
    said = '<tool_call>\n{"name": "read", "arguments": {"path": \n</tool_call>'
    found = parsed("openai_chat", ask_once(tmp_path, [said + "<|im_end|>"], stream=stream), stream=stream)
    assert found.message is not None
    assert (found.message.text, found.message.tool_calls) == (said, ())
    assert found.stop_reason is StopReason.STOP
    assert sample_in(tmp_path)["malformed"] is True


def test_reasoning_is_told_apart_from_the_answer(tmp_path: Path) -> None:
    answer = ask_once(tmp_path, ["<think>\nHm.\n</think>", "\n\nYes.<|im_end|>"], "anthropic", stream=True, thinking=THINKING)
    found = parsed("anthropic", answer, stream=True)
    assert found.message is not None
    assert found.message.text == "Yes."
    assert [part.text for part in found.message.parts if isinstance(part, Reasoning)] == ["Hm."]


def test_reasoning_that_the_prompt_has_opened_is_reasoning(tmp_path: Path) -> None:
    answer = ask_once(tmp_path, ["Hm.\n</think>\n\nYes.<|im_end|>"], "anthropic", template=OPENED, thinking=THINKING)
    found = parsed("anthropic", answer, stream=False)
    assert found.message is not None
    assert [part.text for part in found.message.parts if isinstance(part, Reasoning)] == ["Hm."]
    assert found.message.text == "Yes."


def test_a_tool_loop_continues_the_sampled_tokens_whatever_the_client_made_of_the_call(tmp_path: Path) -> None:
    async def loop(client: httpx.AsyncClient) -> None:
        path, body = TOOLS["openai_chat"]
        first = await client.post(path, json=body, headers={"x-metaclaw-flow": "one"})
        [call] = first.json()["choices"][0]["message"]["tool_calls"]
        rewritten = {**call, "id": "call123", "function": {"name": "read", "arguments": '{ "path":"a.txt" }'}}
        more = [
            *body["messages"],
            {"role": "assistant", "content": None, "tool_calls": [rewritten]},
            {"role": "tool", "tool_call_id": "call123", "content": "It is empty."},
        ]
        second = await client.post(path, json={**body, "messages": more}, headers={"x-metaclaw-flow": "two"})
        assert second.json()["choices"][0]["message"]["content"] == "Empty."

    sampler = run(tmp_path, [[f"{CALL}<|im_end|>"], ["Empty.<|im_end|>"]], loop)
    rows = {values["flow_id"]: values for _, values in samplefile.pending(tmp_path / "run" / samplefile.FILE)}
    one, two = (samplefile.unpack_ids(rows[flow]["prompt_ids"]).tolist() for flow in ("one", "two"))
    said = samplefile.unpack_ids(rows["one"]["tokens"]).tolist()
    assert two[: len(one) + len(said)] == one + said
    assert rows["two"]["reused"] == len(said)
    assert sampler.prompts == [one, two]


def test_the_sample_is_on_disk_before_the_last_byte_is_sent(tmp_path: Path) -> None:
    from metaclaw_core.policy.server import create_app

    policy = make_policy(tmp_path, [["Yes.<|im_end|>"]], QWEN)
    kept_at: list[tuple[bool, int]] = []

    async def whole() -> None:
        living = asyncio.ensure_future(policy.run())
        while policy.unready is not None:
            await asyncio.sleep(0.01)
        body = json.dumps({**TOOLS["openai_chat"][1], "stream": True}).encode()
        scope = {
            "type": "http",
            "method": "POST",
            "path": CHAT,
            "query_string": b"",
            "headers": [(b"authorization", f"Bearer {TOKEN}".encode()), (b"x-metaclaw-flow", b"flow")],
        }
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                kept_at.append((message["more_body"], len(samplefile.pending(tmp_path / "run" / samplefile.FILE))))

        await create_app(policy, TOKEN)(scope, receive, send)
        living.cancel()
        await asyncio.wait((living,))

    asyncio.run(whole())
    assert kept_at[-1] == (False, 1)
    assert kept_at[0] == (True, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_can_not_be_kept_is_an_answer_all_the_same(tmp_path: Path, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def ask(client: httpx.AsyncClient) -> None:
        with contextlib.closing(sqlite3.connect(tmp_path / "run" / samplefile.FILE)) as db:
            db.execute("DROP TABLE samples")  # what a full disk does is what any failed write does
        path, body = TOOLS["openai_chat"]
        answer = await client.post(path, json={**body, "stream": stream}, headers={"x-metaclaw-flow": "one"})
        assert answer.status_code == 200
        assert "Yes." in answer.text
        assert "error" not in answer.text
        assert answer.text.endswith("data: [DONE]\n\n") == stream

    run(tmp_path, [["Yes.<|im_end|>"]], ask)
    assert "An answer could not be kept, and trains nothing: " in caplog.text


KINDS = ("timeout", "down", "auth", "billing", "rate_limit", "weights", "engine")


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_before_the_first_token_is_a_503_that_may_be_retried(tmp_path: Path, kind: str) -> None:
    from metaclaw_core.policy.sampler import SamplerError

    answer = ask_once(tmp_path, [SamplerError(kind, "It does not work.")], stream=True)
    assert (answer.status_code, answer.headers[FAILED_HEADER], answer.headers["retry-after"]) == (503, kind, "1")
    assert answer.json()["error"]["message"] == "It does not work."
    assert samplefile.pending(tmp_path / "run" / samplefile.FILE) == []


@pytest.mark.parametrize("dialect", TOOLS)
def test_a_failure_in_the_middle_is_told_inside_the_stream(tmp_path: Path, dialect: str) -> None:
    from metaclaw_core.policy.sampler import SamplerError

    answer = ask_once(tmp_path, ["Let me see", SamplerError("engine", "It broke.")], dialect, stream=True)
    assert answer.status_code == 200
    found = parsed(dialect, answer, stream=True)
    assert found.error is not None
    assert "It broke." in found.error.message
    sample = sample_in(tmp_path)
    assert (sample["klass"], sample["klass_reason"], sample["stop_reason"]) == ("C", "failed: It broke.", "aborted")


def test_a_failure_in_the_middle_is_a_503_where_nothing_was_sent(tmp_path: Path) -> None:
    from metaclaw_core.policy.sampler import SamplerError

    answer = ask_once(tmp_path, ["Let me see", SamplerError("engine", "It broke.")])
    assert (answer.status_code, answer.headers[FAILED_HEADER]) == (503, "engine")


def test_what_is_cut_by_the_limit_says_so(tmp_path: Path) -> None:
    answer = ask_once(tmp_path, ["one two three four"], max_tokens=len(tokenizer_of(QWEN).encode("one two three four")))
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert (sample_in(tmp_path)["stop_reason"], sample_in(tmp_path)["klass"]) == ("length", "A")


def test_a_reply_that_holds_a_secret_reaches_the_client_and_not_the_disk(tmp_path: Path) -> None:
    secret = "sk-ant-abcdefghijklmnop"
    answer = ask_once(tmp_path, [f"It is {secret}<|im_end|>"], "openai_responses")
    assert secret in answer.text
    assert sample_in(tmp_path)["redacted"] is True
    ids = samplefile.pack_ids(tokenizer_of(QWEN).encode(f"It is {secret}<|im_end|>", add_special_tokens=False))
    for path in (tmp_path / "run").iterdir():
        assert secret.encode() not in path.read_bytes()
        assert ids not in path.read_bytes()


def test_no_provider_key_is_written_down(tmp_path: Path) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        path, body = TOOLS["anthropic"]
        await client.post(path, json=body, headers={"x-api-key": "a-key-of-the-provider", "x-metaclaw-flow": "flow"})

    run(tmp_path, [["Yes.<|im_end|>"]], work)
    assert all(b"a-key-of-the-provider" not in path.read_bytes() for path in (tmp_path / "run").iterdir())
