"""A store on each database there is, and exchanges to put into it."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mitmproxy import http
from mitmproxy.io import FlowReader
from sqlalchemy import create_engine, make_url, text

from metaclaw_core.model import Exchange, Hints
from metaclaw_core.proxy.capture import exchange as exchange_of_flow
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.wire import find_route

POSTGRES = os.environ.get("METACLAW_TEST_POSTGRES")
CAPTURES = Path(__file__).resolve().parents[1] / "captures"


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'store.db'}"
        return
    if not POSTGRES:
        pytest.skip("METACLAW_TEST_POSTGRES names no PostgreSQL database")
    schema = f"metaclaw_{secrets.token_hex(6)}"
    admin = create_engine(make_url(POSTGRES).set(drivername="postgresql+psycopg"))
    with admin.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    try:
        url = make_url(POSTGRES).update_query_dict({"options": f"-csearch_path={schema}"})
        yield url.render_as_string(hide_password=False)
    finally:
        with admin.begin() as connection:
            connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
        admin.dispose()


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    with open_store(database) as opened:
        yield opened


def stream(
    answer: str, response_id: str = "chatcmpl-1", calls: list[dict[str, Any]] | None = None, **delta: Any
) -> bytes:
    """A chat completions stream with this answer."""
    message: dict[str, Any] = {"role": "assistant", "content": answer, **delta}
    if calls:
        message["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
    head = {"id": response_id, "object": "chat.completion.chunk", "model": "m-1-2026"}
    chunks = [
        {**head, "choices": [{"index": 0, "delta": message, "finish_reason": None}]},
        {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls" if calls else "stop"}]},
    ]
    return "".join(f"data: {json.dumps(c)}\n\n" for c in chunks).encode() + b"data: [DONE]\n\n"


_CHAT = Exchange(
    flow_id="flow-1",
    dialect="openai_chat",
    method="POST",
    scheme="https",
    host="api.example.com",
    port=443,
    path="/v1/chat/completions",
    started_at=1_795_466_303.25,
    duration_ms=812.5,
    principal="0123456789abcdef0123456789abcdef",
    hints=Hints(),
    request_body=b"",
    request_encoding="",
    status_code=200,
    response_body=b"",
    response_encoding="",
    response_type="text/event-stream",
    complete=True,
    error=None,
    live=True,
)


class Chat:
    """Makes exchanges of one unknown client; each call is a second later than the one before."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, *messages: Any, answer: str | bytes = "Hello.", **fields: Any) -> Exchange:
        """`messages` are chat messages; a plain string is the next of user, assistant, user …"""
        self.made += 1
        sent = [
            {"role": "assistant" if i % 2 else "user", "content": m} if isinstance(m, str) else m
            for i, m in enumerate(messages)
        ]
        body = fields.pop("body", {})
        made = replace(
            _CHAT,
            flow_id=f"flow-{self.made}",
            started_at=_CHAT.started_at + self.made,
            request_body=json.dumps({"model": "m-1", "stream": True, "messages": sent, **body}).encode(),
            response_body=answer if isinstance(answer, bytes) else stream(answer),
        )
        return replace(made, **fields)


@pytest.fixture
def chat() -> Chat:
    return Chat()


@pytest.fixture
def chat_stream() -> Callable[..., bytes]:
    return stream


@pytest.fixture
def captured() -> Callable[..., list[Exchange]]:
    """The exchanges of a recording in tests/captures."""

    def load(name: str, **changes: Any) -> list[Exchange]:
        with (CAPTURES / name).open("rb") as f:
            flows = [flow for flow in FlowReader(f).stream() if isinstance(flow, http.HTTPFlow)]
        found = [(flow, find_route(flow.request.method, flow.request.path)) for flow in flows]
        made = [exchange_of_flow(flow, route[1], b"key", live=False) for flow, route in found if route]
        return [replace(exchange, **changes) for exchange in made]

    return load
