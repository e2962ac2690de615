"""The clients of a soak: sessions in all five dialects that grow, and what a bad day brings beside them.

Each request has an id of its own in its URL's query, which the store keeps, so one can tell for every request what became of
it whatever its body is. A client writes down, as one JSON line, when the answer was complete and whether it was, byte for
byte, what the LLM gives without us. It never tries a request again: what it lost, the soak must show.

In mode rl an answer may also be the policy server's: complete in its dialect, and of letters only, which is all its model can say.
There a client does ask again, under another id, where it got a 502, a 503 or half an answer, as agents do: a policy server that
fails costs one attempt, and the second must be answered.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_hooks import PATHS, prose, render

from metaclaw_core.errors import WireError
from metaclaw_core.testing import Received, dialect_of
from metaclaw_core.wire import by_name

HEADERS = {"content-type": "application/json", "authorization": "Bearer sk-soak-0000000000000000", "connection": "keep-alive"}
WEIGHTS = {"ok": 91, "slow": 1, "cut": 3, "e500": 3, "e429": 2, "stuck": 0.3}
PATIENCE = 6.0  # seconds until a client gives a request up
THINKS = 0.05  # seconds between two requests in mode rl: what the upstream answers at once would else be nearly all
HUGE = 64 << 20


@dataclass
class Journal:
    """One JSON line per request and per fault; the lines are what the invariants are checked against."""

    path: Path
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, **line: Any) -> None:
        with self._lock, self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class Seen:
    reusable: bool  # the connection, for the next request
    again: bool  # the policy server failed: ask once more


@dataclass
class Load:
    """Clients of one proxy. `expected` maps (dialect, stream, kind) to (status, body) as the LLM gives them directly."""

    journal: Journal
    proxy: int
    llm: int
    bodies: dict[str, list[bytes]]  # of the captures, to be damaged
    stop: threading.Event = field(default_factory=threading.Event)
    served: int = 0
    sessions: int = 0
    routed: bool = False  # mode rl: the policy server may answer
    expected: dict[tuple[str, bool, str], tuple[int, bytes]] = field(default_factory=dict)

    def learn(self) -> None:
        for dialect in PATHS:
            for stream in (True, False):
                for kind in ("ok", "cut", "e500", "e429"):
                    body = body_of(dialect, stream, "You help.", [("human", "hello")], "", 0)
                    self.expected[dialect, stream, kind] = self.send(self.llm, dialect, stream, "direct", kind, body)
                self.expected[dialect, stream, "slow"] = self.expected[dialect, stream, "stuck"] = self.expected[dialect, stream, "ok"]

    def send(
        self, port: int, dialect: str, stream: bool, name: str, kind: str, body: bytes, over: http.client.HTTPConnection | None = None
    ) -> tuple[int, bytes]:
        """(status, body); of an answer that was cut, what came. Raises OSError or HTTPException."""
        path = path_of(dialect, stream)
        url = f"http://127.0.0.1:{self.llm}{path}{'&' if '?' in path else '?'}id={name}&kind={kind}"
        client = over or http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        try:
            client.request("POST", url if port != self.llm else url.partition(f":{self.llm}")[2], body, HEADERS)
            response = client.getresponse()
            try:
                return response.status, response.read()
            except http.client.IncompleteRead as e:
                return response.status, e.partial
        finally:
            if over is None:
                client.close()

    # --- clients ----------------------------------------------------------------------------------

    def client(self, number: int) -> None:
        chance = random.Random(number)
        over: http.client.HTTPConnection | None = None
        opened = 0.0
        count = 0
        # In mode rl the captured sessions are one client's: a failed turn goes to its upstream only if no other is asked beside it.
        bodies = self.bodies if number == 0 or not self.routed else {}
        while not self.stop.is_set():
            self.sessions += 1
            for dialect, stream, body in session(chance, bodies):
                if self.stop.is_set():
                    break
                kind = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
                count += 1
                for name in (f"c{number}-{count}", f"c{number}-{count}-again"):
                    if over is None:
                        over, opened = http.client.HTTPConnection("127.0.0.1", self.proxy, timeout=PATIENCE), time.time()
                    seen = self.one(name, dialect, stream, kind, body, over, opened)
                    if not seen.reusable:
                        over.close()
                        over = None
                    if not seen.again:
                        break
                    self.stop.wait(0.5)
                if self.routed:
                    self.stop.wait(THINKS)
        if over is not None:
            over.close()

    def one(
        self, name: str, dialect: str, stream: bool, kind: str, body: bytes, over: http.client.HTTPConnection | None = None, opened: float | None = None
    ) -> Seen:
        """One request, written down. `opened`: when `over` was, None: now."""
        sent, problem, same, status = time.time(), None, None, None
        by, again, answer = None, False, b""
        try:
            status, answer = self.send(self.proxy, dialect, stream, name, kind, body, over)
            same = (status, answer) == self.expected[dialect, stream, kind]
            self.served += 1
        except (OSError, http.client.HTTPException) as e:
            problem = type(e).__name__
        answered = time.time()
        if self.routed and same is False:
            by = "policy" if status == 200 and by_the_policy(dialect, stream, answer) else None
            again = by is None and status in (200, 502, 503)
        said = repr(answer[-300:]) if again else None
        self.journal.write(
            request=name, dialect=dialect, stream=stream, kind=kind, opened=opened or sent, sent=sent, answered=answered, status=status,
            same=same, problem=problem, by=by, again=again, said=said,
        )  # fmt: skip
        if isinstance(problem, str) and problem in ("ConnectionRefusedError",):
            self.stop.wait(0.05)  # no proxy at the moment
        return Seen(problem is None and (by is not None or (kind != "cut" and not again)), again)

    def loris(self) -> None:
        """Clients that send a byte now and then and never finish; and some that leave in the middle of a body."""
        chance = random.Random(3)
        open_: list[socket.socket] = []
        while not self.stop.wait(0.25):
            try:
                if len(open_) < 20:
                    made = socket.create_connection(("127.0.0.1", self.proxy), 2)
                    made.sendall(b"POST http://127.0.0.1:%d/v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n" % self.llm)
                    open_.append(made)
                which = chance.choice(open_)
                which.sendall(b"\r\n{" if chance.random() < 0.05 else b"x-a: b\r\n"[: 1 + chance.randrange(8)])
                if chance.random() < 0.1:
                    which.close()
                    open_.remove(which)
            except OSError:
                for one in open_:
                    one.close()
                open_.clear()
        for one in open_:
            one.close()

    def huge(self, name: str) -> None:
        """A body that is over the limit of what we look at; it must arrive all the same."""
        text = "x" * (HUGE - 200)
        body = json.dumps({"model": "m", "stream": False, "messages": [{"role": "user", "content": text}]}).encode()
        self.one(name, "openai_chat", False, "ok", body)


def by_the_policy(dialect: str, stream: bool, answer: bytes) -> bool:
    """Is it a whole answer of the tiny model?"""
    try:
        if not answer.startswith((b"data:", b"event:")) and not (dialect == "ollama" and stream):
            response = by_name(dialect).parse_response(answer)
        else:
            parser = by_name(dialect).stream_parser()
            parser.feed(answer)
            response = parser.finish()
    except WireError:
        return False
    text = response.message.text if response.message is not None else ""
    return response.complete and response.error is None and (not text or (text.isascii() and text.isalpha()))


def path_of(dialect: str, stream: bool) -> str:
    path = PATHS[dialect]
    return path if stream or dialect != "gemini" else "/v1beta/models/m:generateContent"


def body_of(dialect: str, stream: bool, system: str, history: list[tuple[str, str]], runtime: str, tools: int) -> bytes:
    body = render(dialect, system, ["What it does. " * 10] * tools, history, runtime)
    return body if stream else body.replace(b'"stream":true', b'"stream":false')


def session(chance: random.Random, bodies: dict[str, list[bytes]]) -> Iterator[tuple[str, bool, bytes]]:
    """(dialect, stream, body) of up to 12 requests of one session; one in twelve is a damaged body of a capture, if there are any."""
    dialect = chance.choice(list(PATHS))
    name = f"{chance.getrandbits(32):08x}-0000-4000-8000-{chance.getrandbits(40):012x}"
    runtime = f"Runtime: agent=main | session=agent:main:{name[:8]} | sessionId={name} | shell=bash"
    system = f"<!-- openclaw:attempt:STABLE -->\n{prose(chance, chance.choice((500, 5_000, 38_000)))}\n{runtime}\n"
    history: list[tuple[str, str]] = []
    for step in range(chance.randint(2, 12)):
        stream = chance.random() < 0.7
        if bodies and chance.random() < 1 / 12:
            body = damaged(chance.choice(bodies[dialect]), chance)
            # Whether the scripted LLM streams may depend on the damage.
            yield dialect, dialect_of(Received("POST", path_of(dialect, stream), (), body))[1], body
            continue
        history.append(("human", f"{prose(chance, 60)} (step {step})") if not history or step % 3 == 0 else ("result", prose(chance, 600)))
        yield dialect, stream, body_of(dialect, stream, system, history, runtime, 4)
        history.append(("call", f"call{step}") if (step + 1) % 3 else ("assistant", prose(chance, 200)))


# --- damaged bodies -------------------------------------------------------------------------------


def captured_bodies(folder: Path) -> dict[str, list[bytes]]:
    """Request bodies of the captures by dialect."""
    from mitmproxy import http as mitm
    from mitmproxy import io

    from metaclaw_core.wire import find_route

    found: dict[str, list[bytes]] = {dialect: [] for dialect in PATHS}
    for file in sorted(folder.glob("*.mitm")):
        with file.open("rb") as data:
            for flow in io.FlowReader(data).stream():
                if not isinstance(flow, mitm.HTTPFlow) or not flow.request.raw_content:
                    continue
                if (route := find_route(flow.request.method, flow.request.path)) is not None and route[0].name in found:
                    found[route[0].name].append(flow.request.raw_content)
    return found


def damaged(body: bytes, chance: random.Random) -> bytes:
    """A body as no client should send it: cut, bytes changed, pieces doubled or moved, JSON that is valid and wrong."""
    for _ in range(chance.randint(1, 3)):
        body = chance.choice(_DAMAGE)(body, chance)
    return body


def _cut(body: bytes, chance: random.Random) -> bytes:
    return body[: chance.randrange(len(body) + 1)]


def _flip(body: bytes, chance: random.Random) -> bytes:
    changed = bytearray(body)
    for _ in range(min(len(body), chance.randint(1, 8))):
        changed[chance.randrange(len(changed))] = chance.choice(b'"{}[],:\\\x00\xff e1')
    return bytes(changed)


def _double(body: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(body) + 1)
    piece = body[start : start + chance.randint(1, 400)]
    place = chance.randrange(len(body) + 1)
    return body[:place] + piece + body[place:]


def _drop(body: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(body) + 1)
    return body[:start] + body[start + chance.randint(1, 400) :]


def _deep(body: bytes, chance: random.Random) -> bytes:
    place, depth = body.find(b"[") + 1, chance.choice((10, 2_000, 100_000))
    return body[:place] + b"[" * depth + b"]" * depth + b"," + body[place:]


def _wrong(body: bytes, chance: random.Random) -> bytes:
    """Valid JSON with a value that does not belong there."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return body
    places: list[tuple[Any, Any]] = []

    def walk(inner: Any, depth: int = 0) -> None:
        keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        for key in keys:
            places.append((inner, key))
            if depth < 50:
                walk(inner[key], depth + 1)

    walk(value)
    if places:
        inner, key = chance.choice(places)
        inner[key] = chance.choice((None, True, -1, 1e308, 10**400, "", "\ud800", [], {}, [[]], {"type": None}, "x" * 5_000, [None, 1]))
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return body


_DAMAGE: tuple[Callable[[bytes, random.Random], bytes], ...] = (_cut, _flip, _double, _drop, _deep, _wrong, _wrong)
