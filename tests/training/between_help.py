"""A real HTTP server between the SDK and the engine: it passes all on, writes down what was asked, and errs where it is told to.

It runs on a thread and an event loop of its own, so that nothing a test or the trainer does holds it up. One server has many lanes,
each with a URL of its own: what one of them is told does not concern the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import httpx
from policy_help import RunningEngine, close_rest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

HANG = 0  # in place of a status: no answer at all


@dataclass(frozen=True)
class Asked:
    path: str  # without /api/v1/
    body: bytes


@dataclass
class Lane:
    """`errs` maps a word of a path to the status that it is answered with while it is in there; "" is in every path."""

    url: str
    errs: dict[str, int] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def paths(self, *words: str) -> list[str]:
        """What was asked and passed on, of the calls that hold one of `words`."""
        return [one.path for one in self.asked if any(word in one.path for word in words)]


class Between:
    def __init__(self, engine: RunningEngine) -> None:
        self.engine = engine
        self.url = ""
        self._lanes: dict[str, Lane] = {}
        self._names = map(str, itertools.count(1))

    @contextlib.contextmanager
    def lane(self) -> Iterator[Lane]:
        """Healed at the end, so that what the SDK still tries on its threads comes through."""
        name = next(self._names)
        lane = self._lanes[name] = Lane(f"{self.url}/{name}")
        try:
            yield lane
        finally:
            lane.errs.clear()
            if lane.asked:
                close_rest(replace(self.engine, url=lane.url))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        await (await self._answer(request))(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        _, name, rest = request.url.path.split("/", 2)
        lane, path, body = self._lanes[name], rest.removeprefix("api/v1/"), await request.body()
        while (word := next((word for word in lane.errs if word in path), None)) is not None:
            status = lane.errs[word]
            lane.refused.append(path)
            if status != HANG:
                return JSONResponse({"detail": f"told to answer {status}"}, status, headers={"x-should-retry": "false"})
            while lane.errs.get(word) == HANG:
                await asyncio.sleep(0.02)
                if await request.is_disconnected():
                    return Response(status_code=499)
        lane.asked.append(Asked(path, body))
        headers = {name: value for name, value in request.headers.items() if name not in ("host", "content-length", "accept-encoding")}
        found = await self._client.request(request.method, f"{self.engine.url}/{rest}", content=body, headers=headers)
        return Response(found.content, found.status_code, media_type=found.headers.get("content-type"))

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        import uvicorn

        async with httpx.AsyncClient(timeout=60, trust_env=False) as self._client:
            config = uvicorn.Config(self, port=0, log_level="error", access_log=False, lifespan="off", timeout_graceful_shutdown=1)
            server = uvicorn.Server(config)
            task = asyncio.ensure_future(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            self.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
            ready.set()
            await stop.wait()
            server.should_exit = True
            await task


@contextlib.contextmanager
def between(engine: RunningEngine) -> Iterator[Between]:
    proxy, ready = Between(engine), threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    def run() -> None:
        with contextlib.closing(loop):
            loop.run_until_complete(proxy.serve(ready, stop))

    thread = threading.Thread(target=run, name="between", daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
