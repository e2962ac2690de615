"""People who ask through the proxy at a steady rate, whatever else goes on: what they notice, in a process of its own.

Design: open loop. Each request has its time, and what it took is counted from then, so a stall is seen by all that were due in it.
The upstream is one more process: none of the times holds a wait for the interpreter of a test. The times are of the system's
monotonic clock, which all processes share, so a test can say which requests fell into what it did.

Limits: `LANES` requests at once at most; one that is late delays the next of its lane.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import astuple, dataclass
from itertools import count
from pathlib import Path

LANES = 6
SAID = "passed on"
Span = tuple[float, float]  # of the monotonic clock, seconds


@dataclass(frozen=True, slots=True)
class Asked:
    due: float
    ended: float
    failure: str | None  # None: it was answered as the upstream answered

    @property
    def ms(self) -> float:
        return 1000 * (self.ended - self.due)

    def within(self, spans: Sequence[Span]) -> bool:
        """Did it overlap one of them?"""
        return any(self.due < end and self.ended > begin for begin, end in spans)


class Load:
    """Asks within `going` only."""

    def __init__(self, client: subprocess.Popen[str]) -> None:
        self._client = client

    @asynccontextmanager
    async def going(self) -> AsyncIterator[list[Asked]]:
        """The list is filled at the end."""
        found: list[Asked] = []
        self._tell("go")
        try:
            yield found
        finally:
            self._tell("stop")
            assert self._client.stdout is not None
            line = await asyncio.to_thread(self._client.stdout.readline)
            found += [Asked(*row) for row in json.loads(line)]

    def _tell(self, word: str) -> None:
        assert self._client.stdin is not None
        self._client.stdin.write(word + "\n")
        self._client.stdin.flush()


@contextmanager
def steady_load(proxy_port: int, per_second: float) -> Iterator[Load]:
    """The requests are marked ``x-metaclaw: off``: they pass in every mode."""
    with _child("serve") as upstream:
        assert upstream.stdout is not None
        port = int(upstream.stdout.readline())
        with _child("ask", str(proxy_port), str(port), str(per_second)) as client:
            yield Load(client)


@contextmanager
def _child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, __file__, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# --- the processes --------------------------------------------------------------------------------


def serve() -> None:
    from metaclaw_core.testing import Script, ScriptedLLM

    with ScriptedLLM(lambda _: Script(text=SAID)) as llm:
        print(llm.port, flush=True)
        sys.stdin.read()


def ask(proxy: int, upstream: int, per_second: float) -> None:
    """Each line of stdin begins or ends a time of asking; a line of rows of `Asked` is written at its end."""
    url = f"http://127.0.0.1:{upstream}/v1/chat/completions"
    lanes = [Lane(http.client.HTTPConnection("127.0.0.1", proxy, timeout=30), url, n, per_second) for n in range(LANES)]
    while sys.stdin.readline():
        stop, began = threading.Event(), time.monotonic()
        threads = [threading.Thread(target=lane.run, args=(began, stop)) for lane in lanes]
        for thread in threads:
            thread.start()
        sys.stdin.readline()
        stop.set()
        for thread in threads:
            thread.join()
        found = sorted((one for lane in lanes for one in lane.taken()), key=lambda one: one.due)
        print(json.dumps([astuple(one) for one in found]), flush=True)


class Lane:
    """Every `LANES`-th request."""

    def __init__(self, connection: http.client.HTTPConnection, url: str, number: int, per_second: float) -> None:
        self._connection, self._url, self._number, self._per_second = connection, url, number, per_second
        self._found: list[Asked] = []
        self._turn = number

    def run(self, began: float, stop: threading.Event) -> None:
        for n in count(self._number, LANES):
            due = began + n / self._per_second
            if stop.wait(max(0.0, due - time.monotonic())):
                return
            failure = _one(self._connection, self._url, self._turn)
            self._found.append(Asked(due, time.monotonic(), failure))
            self._turn += LANES

    def taken(self) -> list[Asked]:
        found, self._found = self._found, []
        return found


def _one(connection: http.client.HTTPConnection, url: str, turn: int) -> str | None:
    """Why it failed; None: it did not."""
    messages = [{"role": "system", "content": "You help. " * 1000}, {"role": "user", "content": f"What is {turn}?"}]
    headers = {"content-type": "application/json", "authorization": "Bearer sk-beside-0123456789", "x-metaclaw": "off"}
    try:
        connection.request("POST", url, json.dumps({"model": "m", "messages": messages}), headers)
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as e:
        connection.close()
        return f"{type(e).__name__}: {e}"
    right = answer.status == 200 and json.loads(body)["choices"][0]["message"]["content"] == SAID
    return None if right else f"status {answer.status}: {body[:200]!r}"


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        ask(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
