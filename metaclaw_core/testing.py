"""A scripted LLM: a real HTTP server on loopback that speaks the five dialects. For tests and try-outs.

Design: a fake that ships instead of patches. It answers each request by a `Script` (what to say, which
tool to call, how fast, which error) and keeps what it received byte for byte. HTTP/1.1 by h11, one
thread, TLS where a certificate is given.

Limits: it parses a body only to find the model and whether to stream; no WebSocket, no HTTP/2.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import h11

from metaclaw_core.model import Request, StopReason, Usage
from metaclaw_core.wire.answer import AnswerWriter, Call, Event, TextDelta, answer_writer


@dataclass(frozen=True, slots=True)
class Received:
    method: str
    path: str
    headers: tuple[tuple[str, str], ...]  # as sent, order and spelling kept
    body: bytes

    def header(self, name: str) -> str | None:
        return next((v for k, v in self.headers if k.lower() == name.lower()), None)

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Script:
    """One answer. Times in seconds."""

    text: str = "ok"
    pieces: int = 3  # events of text in a stream
    tool: tuple[str, dict[str, Any]] | None = None  # (name, arguments) instead of text
    first_after: float = 0.0
    every: float = 0.0
    status: int = 200
    cut_after: int | None = None  # close the connection after this many events
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None  # this body as JSON, with this status, instead of an answer of the dialect


class ScriptedLLM:
    """``with ScriptedLLM(answer) as llm: … llm.url … llm.received``. `answer` maps a request to its script."""

    def __init__(self, answer: Callable[[Received], Script] = lambda _: Script(), tls: ssl.SSLContext | None = None) -> None:
        self._answer = answer
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scripted-llm", daemon=True)
        self.received: list[Received] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(10):
            raise RuntimeError("the scripted LLM did not start")
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(asyncio.sleep(0))  # closed connections say so one round later
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        try:
            while True:
                request, body = await _read(connection, reader)
                if request is None:
                    break
                received = Received(
                    request.method.decode(),
                    request.target.decode(),
                    tuple((k.decode(), v.decode("latin-1")) for k, v in request.headers.raw_items()),
                    body,
                )
                self.received.append(received)
                if not await self._reply(connection, writer, received):
                    break
                connection.start_next_cycle()
        except (ConnectionError, h11.RemoteProtocolError, asyncio.IncompleteReadError):
            pass  # the client went away; what it sent is recorded
        except asyncio.CancelledError:
            pass  # the server stops; asyncio's streams complain of a cancelled handler
        finally:
            writer.close()

    async def _reply(self, connection: h11.Connection, writer: asyncio.StreamWriter, received: Received) -> bool:
        script = self._answer(received)
        dialect, stream = dialect_of(received)
        if script.raw is not None:
            await asyncio.sleep(script.first_after)
            return await _whole(connection, writer, script, script.raw, "application/json")
        if script.status != 200:
            body = json.dumps({"error": {"message": "scripted", "type": "scripted_error", "code": str(script.status)}}).encode()
            return await _whole(connection, writer, script, body, "application/json")
        if not stream:
            await asyncio.sleep(script.first_after)
            return await _whole(connection, writer, script, _answer(_writer(dialect, stream=False), script), "application/json")
        events, kind = _events(dialect, script), _writer(dialect, stream=True).media_type
        head = [("content-type", kind), ("transfer-encoding", "chunked"), *script.headers.items()]
        writer.write(connection.send(h11.Response(status_code=200, headers=head)) or b"")
        loop = asyncio.get_running_loop()
        due = loop.time() + script.first_after
        for n, event in enumerate(events):
            if script.cut_after is not None and n >= script.cut_after:
                return False
            # The schedule is absolute, so that a slow reader does not stretch it.
            await asyncio.sleep(max(0.0, due + n * script.every - loop.time()))
            writer.write(connection.send(h11.Data(data=event)) or b"")
            await writer.drain()
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()
        return connection.our_state is not h11.MUST_CLOSE


async def _read(connection: h11.Connection, reader: asyncio.StreamReader) -> tuple[h11.Request | None, bytes]:
    request: h11.Request | None = None
    parts: list[bytes] = []
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(1 << 18))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            parts.append(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage):
            return request, b"".join(parts)
        else:
            return None, b""


async def _whole(
    connection: h11.Connection, writer: asyncio.StreamWriter, script: Script, body: bytes, kind: str
) -> bool:
    head = [("content-type", kind), ("content-length", str(len(body))), *script.headers.items()]
    for event in (h11.Response(status_code=script.status, headers=head), h11.Data(data=body), h11.EndOfMessage()):
        writer.write(connection.send(event) or b"")
    await writer.drain()
    return connection.our_state is not h11.MUST_CLOSE


def dialect_of(received: Received) -> tuple[str, bool]:
    """(dialect, whether a stream is asked for), from the path and a glance at the body."""
    path = received.path.partition("?")[0]
    if ":streamGenerateContent" in path or ":generateContent" in path:
        return "gemini", ":stream" in path
    name = {"chat/completions": "openai_chat", "responses": "openai_responses", "messages": "anthropic", "api/chat": "ollama"}
    dialect = next((v for k, v in name.items() if path.endswith(k)), "openai_chat")
    try:
        flag = received.json().get("stream", dialect == "ollama")
    except (ValueError, AttributeError, RecursionError):
        flag = False
    return dialect, bool(flag)


def _pieces(script: Script) -> list[str]:
    size = max(1, -(-len(script.text) // script.pieces))
    return [script.text[i : i + size] for i in range(0, len(script.text), size)]


def _writer(dialect: str, *, stream: bool) -> AnswerWriter:
    ids = {"openai_chat": "chatcmpl-1", "openai_responses": "resp_1", "anthropic": "msg_1"}
    request = Request(dialect, "scripted", stream, ())
    return answer_writer(dialect, request, model="scripted", response_id=ids.get(dialect, "r1"), created=1.0, stream=stream)


def _answer(writer: AnswerWriter, script: Script) -> bytes:
    said: list[Event] = [TextDelta(piece) for piece in _pieces(script)]
    if script.tool is not None:
        name, arguments = script.tool
        said = [Call(name, json.dumps(arguments), "call_1")]
    return b"".join((writer.start(), *map(writer.feed, said), writer.finish(StopReason.STOP, Usage(10, 5))))


def _events(dialect: str, script: Script) -> list[bytes]:
    """The answer as stream records, one HTTP chunk each."""
    end = b"\n" if dialect == "ollama" else b"\n\n"
    return [record + end for record in _answer(_writer(dialect, stream=True), script).split(end)[:-1]]
