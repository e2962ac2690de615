"""A client that sends its whole history each time, and again where no answer came or the answer says so, as SDKs do."""

from __future__ import annotations

from typing import Self

import httpx
import stamina

from metaclaw_core.testing import Received


class Agent:
    """``with Agent(proxy, llm) as agent: agent.say("…")``. One session; `retries` counts the requests that had to be sent again."""

    def __init__(self, proxy: str, llm: str) -> None:
        self._client = httpx.Client(proxy=proxy, trust_env=False, timeout=60, headers={"authorization": "Bearer sk-test-0123456789"})
        self._url = llm + "/v1/chat/completions"
        self._said: list[dict[str, str]] = []
        self.retries = 0

    def say(self, text: str) -> str:
        """The answer. Raises httpx.HTTPError after 40 seconds without one."""
        self._said.append({"role": "user", "content": text})
        for attempt in stamina.retry_context(on=httpx.HTTPError, attempts=None, timeout=40, wait_initial=0.1, wait_max=0.5):
            with attempt:
                self.retries += attempt.num > 1
                answer = self._client.post(self._url, json={"model": "m", "messages": self._said})
                answer.raise_for_status()
        reply: str = answer.json()["choices"][0]["message"]["content"]
        self._said.append({"role": "assistant", "content": reply})
        return reply

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.close()


def block(received: Received) -> str:
    """What the proxy put into the system prompt."""
    system = str(received.json()["messages"][0]["content"])
    return system[system.index("<metaclaw-skills>") : system.index("</metaclaw-skills>")]
