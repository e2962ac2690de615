"""What the policy server remembers of a session, and where a conversation is found that a response id names."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from metaclaw_core.model import Exchange, Hints, Message, Role, Text
from metaclaw_core.policy.memory import Memory
from metaclaw_core.store import samplefile
from metaclaw_core.store.db import open_store
from metaclaw_core.store.purge import Found, Selection, purge_policy_file
from metaclaw_core.store.samplefile import Reply, Response

ANSWERED = Exchange(
    flow_id="flow-1",
    dialect="openai_responses",
    method="POST",
    scheme="https",
    host="api.openai.com",
    port=443,
    path="/v1/responses",
    started_at=1_790_000_000.0,
    duration_ms=10.0,
    principal="p",
    hints=Hints(),
    request_body=json.dumps({"model": "m", "instructions": "Be brief.", "input": "Hi"}).encode(),
    request_encoding="",
    status_code=200,
    response_body=json.dumps(
        {
            "id": "resp_theirs",
            "object": "response",
            "status": "completed",
            "model": "m",
            "output": [{"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [{"type": "output_text", "text": "Hello"}]}],
        }
    ).encode(),
    response_encoding="",
    response_type="application/json",
    complete=True,
    error=None,
    live=True,
)


def run[T](home: Path, work: Callable[[Memory], Awaitable[T]]) -> T:
    async def whole() -> T:
        memory = Memory(home / "run" / samplefile.FILE, home / "store.db")
        try:
            return await work(memory)
        finally:
            await memory.close()

    return asyncio.run(whole())


def said(role: Role, text: str) -> Message:
    return Message(role, (Text(text),))


def test_a_conversation_that_the_upstream_answered_is_found_in_the_store(tmp_path: Path) -> None:
    with open_store(tmp_path / "store.db") as store:
        store.ingest([ANSWERED])
    past = run(tmp_path, lambda memory: memory.past("p", "resp_theirs"))
    assert past is not None
    assert ([message.text for message in past.messages], past.ours) == (["Be brief.", "Hi", "Hello"], False)


def test_a_conversation_that_is_ingested_a_moment_later_is_waited_for(tmp_path: Path) -> None:
    async def late(memory: Memory) -> bool:
        looking = asyncio.ensure_future(memory.past("p", "resp_theirs"))
        await asyncio.sleep(0.2)

        def ingest() -> None:
            with open_store(tmp_path / "store.db") as store:
                store.ingest([ANSWERED])

        await asyncio.to_thread(ingest)
        return await looking is not None

    assert run(tmp_path, late)


def test_another_principals_conversation_is_not_given_away(tmp_path: Path) -> None:
    with open_store(tmp_path / "store.db") as store:
        store.ingest([ANSWERED, replace(ANSWERED, flow_id="flow-2", started_at=1_790_000_001.0, principal="q")])
    assert run(tmp_path, lambda memory: memory.past("somebody", "resp_theirs")) is None


def test_our_own_answer_is_known_at_once_and_after_a_restart(tmp_path: Path) -> None:
    answer = Response("resp_ours", "p", None, (said(Role.USER, "Hi"), said(Role.ASSISTANT, "Hello")))

    async def keep(memory: Memory) -> bool:
        await memory.keep("s", None, None, answer, secret=False)
        past = await memory.past("p", "resp_ours")
        return past is not None and past.ours

    assert run(tmp_path, keep)
    past = run(tmp_path, lambda memory: memory.past("p", "resp_ours"))
    assert past is not None
    assert [message.text for message in past.messages] == ["Hi", "Hello"]


def test_a_reply_with_a_secret_is_known_in_memory_only(tmp_path: Path) -> None:
    async def keep(memory: Memory) -> list[int] | None:
        known = await memory.tokens("s")
        await memory.keep("s", None, Reply("key", (1, 2)), None, secret=True)
        found = known.tokens_of("key")
        return None if found is None else list(found)

    async def after(memory: Memory) -> object:
        return (await memory.tokens("s")).tokens_of("key")

    assert run(tmp_path, keep) == [1, 2]
    assert run(tmp_path, after) is None


def test_a_session_without_a_name_is_not_remembered(tmp_path: Path) -> None:
    async def keep(memory: Memory) -> object:
        await memory.keep(None, None, Reply("key", (1, 2)), None, secret=False)
        return (await memory.tokens(None)).tokens_of("key")

    assert run(tmp_path, keep) is None


def test_a_purge_reaches_a_running_servers_memory(tmp_path: Path) -> None:
    async def purged(memory: Memory) -> object:
        await memory.tokens("s")
        await memory.keep("s", None, Reply("key", (1, 2)), None, secret=False)
        found = Found(Selection(), 0, frozenset(), frozenset(), frozenset(), frozenset(), False, ())
        assert purge_policy_file(tmp_path / "run" / samplefile.FILE, found) == []
        await memory.look_after(0.0, prune=False)
        return (await memory.tokens("s")).tokens_of("key")

    assert run(tmp_path, purged) is None
