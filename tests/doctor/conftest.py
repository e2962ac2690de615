"""One recorded exchange."""

from __future__ import annotations

import json

import pytest

from metaclaw_core.model import Exchange, Hints


@pytest.fixture
def exchange() -> Exchange:
    message = {"role": "assistant", "content": "Hello."}
    answer = {"id": "r", "object": "chat.completion", "model": "m", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    return Exchange(
        flow_id="f",
        dialect="openai_chat",
        method="POST",
        scheme="https",
        host="api.example.com",
        port=443,
        path="/v1/chat/completions",
        started_at=1_795_466_303.25,
        duration_ms=1.0,
        principal="0" * 32,
        hints=Hints(),
        request_body=json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}]}).encode(),
        request_encoding="",
        status_code=200,
        response_body=json.dumps(answer).encode(),
        response_encoding="",
        response_type="application/json",
        complete=True,
        error=None,
        live=True,
    )
