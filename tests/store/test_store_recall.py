"""What is read and stored by what came before must be what a store without a memory makes of each exchange alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from metaclaw_core.model import Exchange, Hints, Injection
from metaclaw_core.store.db import open_store
from metaclaw_core.store.reading import Reading, read
from metaclaw_core.store.recall import MAX_BYTES, Recall
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import blobs, counters, messages, sessions, turns

SEAL = "<!-- metaclaw:"
SECRET = "[redacted:"
WORDS = ["hi", "and é{", ',{"', "]}", "", SEAL, SECRET, SEAL[:9], SECRET[4:], "a long text " * 30]

PATHS = {"openai_chat": "/v1/chat/completions", "openai_responses": "/v1/responses", "anthropic": "/v1/messages", "ollama": "/api/chat"}
ANSWERS = {
    "openai_chat": lambda text: {"id": "a", "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]},
    "openai_responses": lambda text: {
        "id": f"r-{text}",
        "status": "completed",
        "output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}],
    },
    "anthropic": lambda text: {"id": "a", "content": [{"type": "text", "text": text}], "stop_reason": "end_turn", "role": "assistant"},
    "ollama": lambda text: {"message": {"role": "assistant", "content": text}, "done": True, "done_reason": "stop"},
}

turn = st.tuples(st.sampled_from(["user", "assistant", "call", "result"]), st.sampled_from(WORDS))


def item(dialect: str, role: str, text: str) -> dict[str, Any]:
    if role == "call":
        call = {"id": "c", "function": {"name": "f", "arguments": {"x": text} if dialect == "ollama" else json.dumps({"x": text})}}
        shapes: dict[str, dict[str, Any]] = {
            "openai_responses": {"type": "function_call", "name": "f", "arguments": text, "call_id": "c"},
            "anthropic": {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"x": text}}]},
        }
        return shapes.get(dialect, {"role": "assistant", "content": None, "tool_calls": [call]})
    if role == "result":
        shapes = {
            "openai_responses": {"type": "function_call_output", "output": text, "call_id": "c"},
            "anthropic": {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": text}]},
        }
        return shapes.get(dialect, {"role": "tool", "content": text, "tool_call_id": "c"})
    return {"role": role, "content": text}


def body(dialect: str, system: str, history: list[tuple[str, str]], tools: int) -> dict[str, Any]:
    items = [item(dialect, *one) for one in history]
    declared = [{"type": "function", "function": {"name": f"f{i}"}, "name": f"f{i}"} for i in range(tools)]
    if dialect == "openai_responses":
        return {"model": "m", "instructions": system, "input": items, "tools": declared}
    if dialect == "anthropic":
        return {"model": "m", "messages": items, "system": system, "max_tokens": 9, "tools": declared}
    return {"model": "m", "stream": False, "messages": [{"role": "system", "content": system}, *items], "tools": declared}


@st.composite
def traffic(draw: st.DrawFn, dialects: list[str] | None = None) -> list[Exchange]:
    """Exchanges of a few conversations that grow, fork, are cut and begin anew, some of them twice."""
    names = dialects or sorted(PATHS)
    histories: list[list[tuple[str, str]]] = [[("user", "hello")]]
    made: list[Exchange] = []
    for number in range(draw(st.integers(2, 7))):
        if made and draw(st.integers(0, 9)) == 0:
            made.append(draw(st.sampled_from(made)))
            continue
        history = draw(st.sampled_from(histories))
        history = history[: draw(st.integers(0, len(history)))] if draw(st.booleans()) else history
        history = [*history, *draw(st.lists(turn, max_size=3))]
        histories.append(history)
        dialect = draw(st.sampled_from(names))
        sent = body(dialect, draw(st.sampled_from(["rules", "rules", f"rules {SEAL}", "other"])), history, draw(st.integers(0, 2)))
        if dialect == "openai_responses" and draw(st.booleans()):
            sent["previous_response_id"] = f"r-{draw(st.sampled_from(WORDS))}"
        text = draw(st.sampled_from(WORDS))
        histories.append([*history, ("assistant", text)])
        made.append(
            Exchange(
                flow_id=f"flow-{number}",
                dialect=dialect,
                method="POST",
                scheme="https",
                host="api.example.com",
                port=443,
                path=PATHS[dialect],
                started_at=1_795_466_303.25 + draw(st.sampled_from([0, number, number * 100])),
                duration_ms=1.0,
                principal=draw(st.sampled_from(["p" * 32, "p" * 32, "q" * 32])),
                hints=Hints(
                    trace_id=draw(st.sampled_from([None, "1" * 32, "2" * 32])),
                    session_id=draw(st.sampled_from([None, "s-1", "s-2"])),
                    client=draw(st.sampled_from([None, "openclaw"])),
                ),
                request_body=json.dumps(sent, separators=draw(st.sampled_from([(",", ":"), (", ", ": ")]))).encode(),
                request_encoding="",
                status_code=draw(st.sampled_from([200, 200, 200, 500])),
                response_body=json.dumps(ANSWERS[dialect](text)).encode(),
                response_encoding="",
                response_type="application/json",
                complete=True,
                error=None,
                live=True,
                injection=draw(st.sampled_from([None, Injection("block", ("s",), 1)])),
            )
        )
    return made


@settings(max_examples=400)
@given(traffic())
def test_an_exchange_reads_the_same_whatever_is_remembered(exchanges: list[Exchange]) -> None:
    recall = Recall()
    for exchange in exchanges:
        assert forgetful(read(exchange, redacted=True, recall=recall)) == forgetful(read(exchange, redacted=True))


def forgetful(reading: Reading) -> Reading:
    return replace(reading, shared=0, ids=list(reading.ids))


@settings(max_examples=25, deadline=None)
@given(traffic(["openai_chat", "openai_responses"]), st.integers(2, 4))
def test_a_batch_stores_what_its_exchanges_one_by_one_do(
    tmp_path_factory: pytest.TempPathFactory, exchanges: list[Exchange], size: int
) -> None:
    folder = tmp_path_factory.mktemp("stores")
    with open_store(folder / "together.db") as together, open_store(folder / "alone.db") as alone:
        for at in range(0, len(exchanges), size):
            together.ingest(exchanges[at : at + size], redacted=True)
        for exchange in exchanges:
            Store(alone.engine).ingest([exchange], redacted=True)  # of a worker that has just begun
        assert contents(together) == contents(alone)
        assert together.verify().problems == ()


def contents(store: Store) -> list[list[tuple[Any, ...]]]:
    columns = [c for c in turns.columns if c.name != "id"]
    queries = [
        select(*columns).order_by(turns.c.id),
        *(select(t).order_by(t.c.id) for t in (messages, blobs, sessions)),
        select(counters).where(counters.c.value > 0).order_by(counters.c.name),
    ]
    with store.reading() as db:
        return [[tuple(row) for row in db.execute(query)] for query in queries]


def chat(history: list[tuple[str, str]], number: int, **fields: Any) -> Exchange:
    plain = Exchange(
        flow_id=f"flow-{number}",
        dialect="openai_chat",
        method="POST",
        scheme="https",
        host="api.example.com",
        port=443,
        path=PATHS["openai_chat"],
        started_at=1_795_466_303.25 + number,
        duration_ms=1.0,
        principal="p" * 32,
        hints=Hints(session_id="s-1"),
        request_body=json.dumps(body("openai_chat", "rules", history, 1)).encode(),
        request_encoding="",
        status_code=200,
        response_body=json.dumps(ANSWERS["openai_chat"](f"answer {number}")).encode(),
        response_encoding="",
        response_type="application/json",
        complete=True,
        error=None,
        live=True,
    )
    return replace(plain, **fields)


def grown(turns_: int) -> list[tuple[str, str]]:
    return [("user" if i % 2 == 0 else "assistant", f"message {i}") for i in range(turns_)]


def test_a_continuation_is_read_and_hashed_by_what_it_adds() -> None:
    recall = Recall()
    read(chat(grown(41), 1), recall=recall)
    reading = read(chat(grown(43), 2), recall=recall)
    assert (len(reading.ids), reading.shared) == (44, 42)


def test_what_was_purged_in_between_is_written_again(tmp_path: Path) -> None:
    with open_store(tmp_path / "store.db") as store:
        store.ingest([chat(grown(21), 1)])
        with store.transaction() as db:
            for table in (turns, messages, blobs, sessions):
                db.execute(table.delete())
        store.ingest([chat(grown(23), 2)])
        assert store.verify().problems == ()
        [row] = store.turns()
        assert [m.text for m in store.conversation(row["prompt_tip"])] == ["rules", *(f"message {i}" for i in range(23))]


def test_two_conversations_in_turns_are_both_remembered() -> None:
    recall = Recall()
    other = [("user", "another beginning"), *grown(20)[1:]]
    read(chat(grown(21), 1), recall=recall)
    read(chat([*other, ("user", "x")], 2), recall=recall)
    assert read(chat(grown(23), 3), recall=recall).shared == 22
    assert read(chat([*other, ("user", "x"), ("assistant", "y"), ("user", "z")], 4), recall=recall).shared == 22


def test_the_memory_is_bounded() -> None:
    kept = Recall()
    large = [("user", "x" * 1_000_000)]
    for number in range(30):
        read(chat([("user", f"beginning {number}"), *large], number), recall=kept)
    assert kept.size <= MAX_BYTES


def test_a_body_larger_than_the_memory_drives_out_no_other() -> None:
    kept = Recall()
    read(chat([("user", "a small one " * 2_000)], 1), recall=kept)
    before = kept.size
    read(chat([("user", "x" * (MAX_BYTES + 1))], 2), recall=kept)
    assert kept.size == before > 0


def test_what_was_purged_is_forgotten(tmp_path: Path) -> None:
    with open_store(tmp_path / "store.db") as store:
        store.ingest([chat([("user", "a small one " * 2_000)], 1)])
        assert store._recall.size > 0
        store.forget()
        assert store._recall.size == 0
        store.ingest([chat([("user", "a small one " * 2_000), ("user", "more")], 2)])
        assert len(list(store.turns())) == 2
