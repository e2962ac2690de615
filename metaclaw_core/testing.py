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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import h11


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
        events = list(_events(dialect, script))
        if not stream:
            await asyncio.sleep(script.first_after)
            return await _whole(connection, writer, script, json.dumps(_answer_json(dialect, script)).encode(), "application/json")
        kind = "application/x-ndjson" if dialect == "ollama" else "text/event-stream"
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
    except (ValueError, AttributeError):
        flag = False
    return dialect, bool(flag)


def _pieces(script: Script) -> list[str]:
    size = max(1, -(-len(script.text) // script.pieces))
    return [script.text[i : i + size] for i in range(0, len(script.text), size)]


def _sse(data: Any, event: str | None = None) -> bytes:
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()


def _events(dialect: str, script: Script) -> Iterator[bytes]:
    """The answer as stream records, one HTTP chunk each."""
    if dialect == "openai_chat":
        base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "scripted"}

        def chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
            return _sse({**base, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

        yield chunk({"role": "assistant", "content": ""})
        if script.tool:
            name, arguments = script.tool
            call = {"name": name, "arguments": json.dumps(arguments)}
            yield chunk({"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": call}]})
        else:
            for piece in _pieces(script):
                yield chunk({"content": piece})
        yield chunk({}, "tool_calls" if script.tool else "stop")
        yield _sse("[DONE]")
    elif dialect == "openai_responses":
        answer = _answer_json(dialect, script)
        yield _sse({"type": "response.created", "response": {**answer, "status": "in_progress", "output": []}}, "response.created")
        if not script.tool:
            for piece in _pieces(script):
                event = {"type": "response.output_text.delta", "item_id": "msg_1", "output_index": 0, "content_index": 0, "delta": piece}
                yield _sse(event, "response.output_text.delta")
        yield _sse({"type": "response.completed", "response": answer}, "response.completed")
    elif dialect == "anthropic":
        answer = _answer_json(dialect, script)
        yield _sse({"type": "message_start", "message": {**answer, "content": [], "stop_reason": None}}, "message_start")
        block = answer["content"][0]
        empty = {**block, "input": {}} if script.tool else {**block, "text": ""}
        yield _sse({"type": "content_block_start", "index": 0, "content_block": empty}, "content_block_start")
        deltas: list[dict[str, Any]] = (
            [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]
            if script.tool
            else [{"type": "text_delta", "text": piece} for piece in _pieces(script)]
        )
        for delta in deltas:
            yield _sse({"type": "content_block_delta", "index": 0, "delta": delta}, "content_block_delta")
        yield _sse({"type": "content_block_stop", "index": 0}, "content_block_stop")
        usage = {"output_tokens": answer["usage"]["output_tokens"]}
        yield _sse({"type": "message_delta", "delta": {"stop_reason": answer["stop_reason"]}, "usage": usage}, "message_delta")
        yield _sse({"type": "message_stop"}, "message_stop")
    elif dialect == "gemini":
        answer = _answer_json(dialect, script)
        if not script.tool:
            *_, candidate = answer["candidates"]
            for piece in _pieces(script):
                yield _sse({"candidates": [{"content": {"role": "model", "parts": [{"text": piece}]}, "index": candidate["index"]}]})
            answer["candidates"][0]["content"]["parts"] = [{"text": ""}]
        yield _sse(answer)
    else:
        answer = _answer_json(dialect, script)
        if not script.tool:
            for piece in _pieces(script):
                message = {"role": "assistant", "content": piece}
                yield json.dumps({"model": "scripted", "created_at": "2026-01-01T00:00:00Z", "message": message, "done": False}).encode() + b"\n"
            answer["message"]["content"] = ""
        yield json.dumps(answer).encode() + b"\n"


def _answer_json(dialect: str, script: Script) -> dict[str, Any]:
    """The same answer as one JSON object."""
    text, tool = script.text, script.tool
    if dialect == "openai_chat":
        message: dict[str, Any] = {"role": "assistant", "content": None if tool else text}
        if tool:
            message["tool_calls"] = [{"id": "call_1", "type": "function", "function": {"name": tool[0], "arguments": json.dumps(tool[1])}}]
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if tool else "stop"}
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "scripted", "choices": [choice], "usage": usage}
    if dialect == "openai_responses":
        item: dict[str, Any] = (
            {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": tool[0], "arguments": json.dumps(tool[1]), "status": "completed"}
            if tool
            else {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [{"type": "output_text", "text": text, "annotations": []}]}
        )
        usage = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}
        return {"id": "resp_1", "object": "response", "created_at": 1, "status": "completed", "model": "scripted", "output": [item], "usage": usage}
    if dialect == "anthropic":
        block: dict[str, Any] = {"type": "tool_use", "id": "toolu_1", "name": tool[0], "input": tool[1]} if tool else {"type": "text", "text": text}
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "scripted",
            "content": [block],
            "stop_reason": "tool_use" if tool else "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": 10, "output_tokens": 5},
        }
    if dialect == "gemini":
        part: dict[str, Any] = {"functionCall": {"name": tool[0], "args": tool[1]}} if tool else {"text": text}
        candidate = {"content": {"role": "model", "parts": [part]}, "index": 0, "finishReason": "STOP"}
        counts = {"promptTokenCount": 10, "candidatesTokenCount": 5, "totalTokenCount": 15}
        return {"candidates": [candidate], "usageMetadata": counts, "modelVersion": "scripted", "responseId": "r1"}
    reply: dict[str, Any] = {"role": "assistant", "content": "" if tool else text}
    if tool:
        reply["tool_calls"] = [{"function": {"name": tool[0], "arguments": tool[1]}}]
    return {
        "model": "scripted",
        "created_at": "2026-01-01T00:00:00Z",
        "message": reply,
        "done": True,
        "done_reason": "stop",
        "prompt_eval_count": 10,
        "eval_count": 5,
    }
