"""A client that nobody knows and that sends only what is new: its session is the one whose answer it continues."""

from __future__ import annotations

import json
from typing import Any

from metaclaw_core.model import Hints, Kind
from metaclaw_core.proxy.rewrite import Rewriter, Rewritten, prior_of
from metaclaw_core.proxy.sessions import Sessions
from metaclaw_core.settings import Settings
from metaclaw_core.wire import by_name

RESULT = {"type": "function_call_output", "call_id": "c", "output": "milk"}


class Nowhere:
    def put_session(self, row: Any) -> None:
        pass


async def test_what_continues_a_response_belongs_to_its_session() -> None:
    sessions = Sessions()
    rewriter = Rewriter(Settings(), sessions, Nowhere())

    async def send(answered_as: str, **body: Any) -> Rewritten:
        content = json.dumps({"model": "m", **body}).encode()
        outcome = await rewriter.rewrite(by_name("openai_responses"), content, "/v1/responses", Hints(), "p", None)
        assert outcome.identity is not None
        sessions.remember_response("p", answered_as, prior_of(outcome.identity))
        return outcome

    first = await send("r1", input=[{"role": "user", "content": "Read it."}])
    result = await send("r2", input=[RESULT], previous_response_id="r1")
    later = await send("r3", input=[{"role": "user", "content": "And again?"}], previous_response_id="r2")
    other = await send("r4", input=[{"role": "user", "content": "And again?"}])
    assert result.identity is not None
    assert result.identity.kind is Kind.TOOL
    assert first.session == result.session == later.session
    assert other.session != first.session
    await rewriter.aclose()
