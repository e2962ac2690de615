"""A user's OpenClaw conversations as exchanges in a store, and a model that proposes what a test says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from metaclaw_core.learn.llm import Completion
from metaclaw_core.model import Exchange, Hints
from metaclaw_core.store.rollouts import Store

START = 1_795_466_400.0
LATER = START + 7200
PRINCIPAL, OTHER = "a" * 32, "b" * 32
SYSTEM = (
    "<!-- openclaw:attempt:STABLE -->\nYou are a personal assistant running inside OpenClaw.\n"
    "<!-- /openclaw:attempt:STABLE -->\n<!-- openclaw:attempt:DYNAMIC -->\nToday.\n<!-- /openclaw:attempt:DYNAMIC -->"
)
SUMMARY = "The conversation history before this point was compacted into the following summary:"
TOOLS = [{"type": "function", "function": {"name": "exec", "description": "Run a command.", "parameters": {}}}]

_EXCHANGE = Exchange(
    flow_id="",
    dialect="openai_chat",
    method="POST",
    scheme="https",
    host="api.openai.com",
    port=443,
    path="/v1/chat/completions",
    started_at=START,
    duration_ms=500.0,
    principal=PRINCIPAL,
    hints=Hints(),
    request_body=b"",
    request_encoding="",
    status_code=200,
    response_body=b"",
    response_encoding="",
    response_type="application/json",
    complete=True,
    error=None,
    live=True,
)


class Talk:
    """One OpenClaw session. Each call is a request of the client with its whole history, one second apart unless `at`
    says when; what it makes is in `made` until `into` stores it."""

    count = 0

    def __init__(self, session: str = "s-1", key: str = "agent:main:main", at: float = START, **fields: Any) -> None:
        self.session, self.key, self.now = session, key, at
        self.fields = fields
        self.history: list[dict[str, Any]] = []
        self.made: list[Exchange] = []

    def say(
        self,
        text: str,
        answer: str | None = "Done.",
        *,
        call: tuple[str, str] | None = None,
        after: float = 1.0,
        **fields: Any,
    ) -> Talk:
        """The human speaks; the agent answers, or calls a tool (name, what it brings) first. `answer` None: an error."""
        self.history.append({"role": "user", "content": self._wrapped(text)})
        if call is not None:
            self._call(*call, after=after, **fields)
            after = 1.0
        self._send({"role": "assistant", "content": answer} if answer is not None else None, after, fields)
        return self

    def compacted(self, summary: str = "They spoke about a project.", *, after: float = 1.0) -> Talk:
        """The client replaces its history by a summary; what follows begins with it."""
        self.now += after
        self.history = [{"role": "user", "content": f"{SUMMARY}\n\n{summary}\n\n{self._line()}"}]
        return self

    def reset(self) -> Talk:
        """/new: the same session id, an empty history."""
        self.history = []
        return self

    def into(self, store: Store) -> Talk:
        store.ingest(self.made)
        self.made = []
        return self

    def _call(self, name: str, brings: str, *, after: float, **fields: Any) -> None:
        call = {
            "id": f"call{len(self.history)}",
            "type": "function",
            "function": {"name": name, "arguments": '{"what":"look"}'},
        }
        self._send({"role": "assistant", "content": None, "tool_calls": [call]}, after, fields)
        self.history.append({"role": "tool", "tool_call_id": call["id"], "content": brings})

    def _send(self, reply: dict[str, Any] | None, after: float, fields: Mapping[str, Any]) -> None:
        Talk.count += 1
        self.now += after
        body = {
            "model": "m-1",
            "messages": [{"role": "system", "content": SYSTEM}, *self.history],
            "tools": fields.get("tools", TOOLS),
        }
        choice = {
            "index": 0,
            "message": reply,
            "finish_reason": "tool_calls" if reply and "tool_calls" in reply else "stop",
        }
        usage = {"prompt_tokens": 20_000, "completion_tokens": 100, "total_tokens": 20_100}
        answer = {
            "id": f"c{Talk.count}",
            "object": "chat.completion",
            "model": "m-1",
            "choices": [choice],
            "usage": usage,
        }
        made = replace(
            _EXCHANGE,
            flow_id=f"flow-{Talk.count}",
            started_at=self.now,
            request_body=json.dumps(body).encode(),
            response_body=json.dumps(answer).encode() if reply else b'{"error":{"message":"no"}}',
            status_code=200 if reply else 500,
        )
        known = {k: v for k, v in {**self.fields, **fields}.items() if k != "tools"}
        self.made.append(replace(made, **known))
        if reply is not None:
            self.history.append(reply)

    def _wrapped(self, text: str) -> str:
        stamped = f"[Wed 2026-11-25 07:24 UTC] {text}"
        return stamped if self.history else f"{stamped}\n\n{self._line()}"

    def _line(self) -> str:
        return f"Runtime: agent=main | session={self.key} | sessionId={self.session} | host=h"


class Model:
    """Answers what it was given, in order; the last answer again and again. Keeps what it was asked."""

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)
        self.asked: list[Sequence[Mapping[str, str]]] = []

    async def complete(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        purpose: str,
        max_tokens: int,
        temperature: float = 0.0,
        json_object: bool = False,
    ) -> Completion:
        self.asked.append([dict(m) for m in messages])
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return Completion(answer if isinstance(answer, str) else json.dumps(answer), "m-evolver", 100, 50)

    @property
    def text(self) -> str:
        """All that was ever sent to it."""
        return "\n".join(m["content"] for messages in self.asked for m in messages)


BODY = (
    "When you work in this repository, install and run everything with pnpm. Before you add a dependency, look whether it is "
    "there already. After a change of the lock file run the tests once more and say what changed. Avoid npm and yarn here, "
    "because they write a second lock file that nobody wants to review."
)


def add(name: str = "use-pnpm", *quotes: str, body: str = BODY, **fields: Any) -> dict[str, Any]:
    """An edit that adds a skill."""
    edit = {
        "op": "add",
        "name": name,
        "description": "Use pnpm, never npm, for installs and scripts in this repository.",
        "body": body,
        "triggers": ["install a package"],
        "evidence": [{"quote": quote} for quote in quotes or ("use pnpm, not npm",)],
    }
    return edit | fields


def edits(*items: dict[str, Any]) -> dict[str, Any]:
    return {"edits": list(items)}
