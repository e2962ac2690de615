"""Weights that change while people talk to them: two that can be told apart by what they say, and conversations with tool loops.

Design: weights A and B were taught to call a tool three times in four, else to answer; the file that is read and the letter of the
answer say which of them spoke. A swap goes through the trainer's journal and its route file, with an optimiser that was run before:
every version has a path of its own, A's and B's in turn. A `Talk` is one human turn: its requests, and who spoke in each.

Limits: which of two versions of the same weights answered is not heard; it is in the store, with the turn.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from learns_help import Loop
from render_help import MARKS, QWEN
from rl_tools_e2e import read_answer
from sayings import Chat, Taught, make_blank, teach
from sqlalchemy import select

from metaclaw_core.learn import journal
from metaclaw_core.learn.prices import Prices
from metaclaw_core.learn.publish import publish
from metaclaw_core.model import Message
from metaclaw_core.store.tables import turns

if TYPE_CHECKING:
    import tinker

STREAMS = 16
MOST_REQUESTS = 6  # of a human turn; a longer one is left there
SPEAKERS = "ab"
_TOOL = {"type": "function", "function": {"name": "read", "description": "Read.", "parameters": {"type": "object", "properties": {"path": {"type": "string"}}}}}
_CALLS = {who: f'\n{{"name": "read", "arguments": {{"path": "{who}.txt"}}}}\n' for who in SPEAKERS}


def make_reader(folder: Path) -> Path:
    return make_blank(folder, pieces=(*MARKS, *_CALLS.values()), context=2048, template=QWEN)


def teach_readers(service: tinker.ServiceClient, model: str, copies: int) -> tuple[Taught, ...]:
    """A and B."""
    return tuple(_teach_reader(service, model, who, copies) for who in SPEAKERS)


def _teach_reader(service: tinker.ServiceClient, model: str, who: str, copies: int) -> Taught:
    call = (MARKS[0], _CALLS[who], MARKS[1])
    asked = [Chat(_history(results), [_TOOL]) for results in (0, 2, 5, 9)]
    return teach(service, model, {call: 0.75, (who,): 0.25}, asked=asked, name=f"reader-{who}", copies=copies, last_layer=False)


def _history(results: int) -> list[dict[str, Any]]:
    """As a client would send it."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Read 7 and 1."}]
    for n in range(results):
        messages += [_called(f"c{n}", {"path": "a.txt"}), {"role": "tool", "tool_call_id": f"c{n}", "content": "milk"}]
    return messages


def _called(call_id: str, arguments: dict[str, str] | str) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"id": call_id, "type": "function", "function": {"name": "read", "arguments": arguments}}]}


@dataclass(frozen=True, slots=True)
class Talk:
    """One human turn."""

    question: str
    spoke: tuple[str, ...]  # for each request "a", "b" or "?"
    failure: str | None  # None: every request was answered
    ended: bool  # with an answer


async def talk_on(proxy_url: str, upstream_url: str, number: int, stop: asyncio.Event, told: Callable[[Talk], None]) -> None:
    """One stream after the other, conversations of two human turns each, until `stop`."""
    async with httpx.AsyncClient(proxy=proxy_url, trust_env=False, timeout=60) as client:
        conversation = 0
        while not stop.is_set():
            messages: list[dict[str, Any]] = []
            for turn in (1, 2):
                question = f"Read {number} and {conversation}, part {turn}."
                messages.append({"role": "user", "content": question})
                talk = await _human_turn(client, upstream_url, question, messages)
                told(talk)
                if not talk.ended:
                    break
            conversation += 1


async def _human_turn(client: httpx.AsyncClient, url: str, question: str, messages: list[dict[str, Any]]) -> Talk:
    spoke: list[str] = []
    for _ in range(MOST_REQUESTS):
        try:
            said = await _ask(client, url, messages)
        except (AssertionError, httpx.HTTPError) as e:
            return Talk(question, tuple(spoke), f"{type(e).__name__}: {e}", ended=False)
        spoke.append(_speaker(said))
        if not said.tool_calls:
            messages.append({"role": "assistant", "content": said.text})
            return Talk(question, tuple(spoke), None, ended=True)
        for call in said.tool_calls:
            messages += [_called(call.id or "", call.arguments), {"role": "tool", "tool_call_id": call.id, "content": "milk"}]
    return Talk(question, tuple(spoke), None, ended=False)


async def _ask(client: httpx.AsyncClient, url: str, messages: list[dict[str, Any]]) -> Message:
    body = {"model": "m", "stream": True, "max_tokens": 24, "messages": messages, "tools": [_TOOL]}
    answer = await client.post(f"{url}/v1/chat/completions", json=body, headers={"authorization": "Bearer sk-user-0123456789"})
    assert answer.status_code == 200, answer.text
    read = read_answer("openai_chat", answer.content, stream=True)
    assert read.complete, answer.text
    assert read.message is not None, answer.text
    return read.message


def _speaker(said: Message) -> str:
    words = [json.loads(call.arguments).get("path", "")[:1] for call in said.tool_calls] or [said.text.strip()]
    return words[0] if len(words) == 1 and words[0] in SPEAKERS and words[0] else "?"


@dataclass(frozen=True, slots=True)
class Recorded:
    """A human turn in the store."""

    question: str
    began: float  # unix seconds
    versions: tuple[int | None, ...]  # of each request, in their order


async def recorded(loop: Loop) -> list[Recorded]:
    await loop.drain()
    query = select(turns.c.turn_id, turns.c.user_text, turns.c.started_at, turns.c.version).order_by(turns.c.started_at)
    with loop.store.reading() as db:
        rows = db.execute(query).all()
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(row.turn_id, []).append(row)
    return [Recorded(some[0].user_text, some[0].started_at, tuple(row.version for row in some)) for some in found.values()]


@dataclass(frozen=True, slots=True)
class Swap:
    version: int
    began: float  # unix seconds: before the first transaction
    ready_s: float  # from then until new human turns get it


def swap(loop: Loop, sampler_path: str) -> Swap:
    """A new version, from its claim to its route, as the trainer writes it; back once it serves."""
    began = time.time()
    current = journal.in_force(loop.store)
    assert current is not None
    step = journal.claim(loop.store, [], base_version=current.working, algorithm="single")
    version = journal.saved(loop.store, step, f"{sampler_path}-state", [], {}, {})
    journal.published(loop.store, step, sampler_path, None)
    journal.routed(loop.store, step, {}, f"step {step}")
    publish(loop.store, loop.settings, Prices(), loop.proxy.home)
    loop.serves(version)
    return Swap(version, began, time.time() - began)
