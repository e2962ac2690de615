"""Stores with turns in them and judges that answer by rule, for the tests of the learner."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metaclaw_core.learn.budget import Budget
from metaclaw_core.learn.endpoint import Endpoint
from metaclaw_core.learn.llm import LLMClient, Retry
from metaclaw_core.model import Exchange, Hints
from metaclaw_core.settings import Settings
from metaclaw_core.store.rollouts import Store
from metaclaw_core.testing import ScriptedLLM

START = 1_700_000_000.0  # long ago by any clock: nothing waits for `judge.patience`
QUICK = Retry(attempts=3, wait_initial=0.01, wait_max=0.02, wait_jitter=0.0)


def client_of(llm: ScriptedLLM, store: Store, *, daily_tokens: int | None = None, **fields: Any) -> LLMClient:
    endpoint = Endpoint(f"{llm.url}/v1", "judge-1", "k-0123456789")
    return LLMClient(endpoint, Budget(store, daily_tokens), **{"retry": QUICK, "timeout_s": 5.0, **fields})


def exchange(
    number: int,
    messages: list[dict[str, Any]],
    answer: str = "Done.",
    calls: list[tuple[str, str]] | None = None,
    **fields: Any,
) -> Exchange:
    """A chat completions exchange at `START` + `number` seconds; `calls` are (name, arguments)."""
    message: dict[str, Any] = {"role": "assistant", "content": answer}
    if calls:
        message["tool_calls"] = [
            {"id": f"call_{number}_{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(calls)
        ]
    reply = {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "model": "m-1",
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}],
    }
    values: dict[str, Any] = {
        "flow_id": f"flow-{number}",
        "dialect": "openai_chat",
        "method": "POST",
        "scheme": "https",
        "host": "api.example.com",
        "port": 443,
        "path": "/v1/chat/completions",
        "started_at": START + number,
        "duration_ms": 800.0,
        "principal": "0123456789abcdef0123456789abcdef",
        "hints": Hints(),
        "request_body": json.dumps({"model": "m-1", "messages": messages}).encode(),
        "request_encoding": "",
        "status_code": 200,
        "response_body": json.dumps(reply).encode(),
        "response_encoding": "",
        "response_type": "application/json",
        "complete": True,
        "error": None,
        "live": True,
    }
    return Exchange(**(values | fields))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, calls: list[tuple[str, str, str]] | None = None) -> dict[str, Any]:
    """`calls` are (id, name, arguments)."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in calls
        ]
    return message


def result(call_id: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def many_turns(store: Store, count: int, first: int = 0) -> None:
    """`count` sessions of one turn each."""
    some = [exchange(first + n, [user(f"Question {first + n}?")], f"Answer {first + n}.") for n in range(count)]
    for at in range(0, count, 100):
        store.ingest(some[at : at + 100])


def settings(**judge: Any) -> Settings:
    return Settings.model_validate({"judge": judge})


def rows_of(store: Store, *fields: str) -> list[tuple[Any, ...]]:
    return [tuple(row[f] for f in fields) for row in store.turns()]


def home(path: Path) -> Path:
    return path / "store.db"


type Answer = Callable[[Any], Any]
