"""The HTTP face: Tinker's routes under ``/api/v1``, the OpenAI ones under ``/oai/api/v1``; loopback only.

Design: handlers parse, call the engine and answer at once; only the long poll waits. Every request needs the key,
whatever process on this machine sends it. An error is ``{"detail": one sentence}`` with a status that the SDK doesn't
retry. Unknown paths are named in the 404, so that a missing feature shows as one.
"""

from __future__ import annotations

import hmac
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from metaclaw_core.engine import oai, protocol
from metaclaw_core.engine.checkpoints import KINDS, Checkpoint, Place
from metaclaw_core.engine.errors import EngineError, NotFoundError
from metaclaw_core.engine.service import Engine
from metaclaw_core.listener import loopback_listener

POLL = 30.0  # seconds; the SDK gives up a poll after 45
log = logging.getLogger(__name__)

type Handler = Callable[[Engine, Request], Awaitable[Response]]


class KeyCheck:
    """401 without the key, in Tinker's header or as a bearer token."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            given = headers.get(b"x-api-key") or headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(given, self._key):
                response = JSONResponse({"detail": "The API key is not this engine's: set TINKER_API_KEY."}, 401)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def client_config(engine: Engine, request: Request) -> Response:
    # Chunks one after the other: the engine executes in the order of arrival.
    return JSONResponse({"pjwt_auth_enabled": False, "parallel_fwdbwd_chunks": False, "proto_compress_fwdbwd": False})


async def dynamic_config(engine: Engine, request: Request) -> Response:
    return JSONResponse({"sample_cancel_enabled": True})


async def healthz(engine: Engine, request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def capabilities(engine: Engine, request: Request) -> Response:
    model = {"model_name": engine.base.name, "max_context_length": engine.base.max_context}
    return JSONResponse({"supported_models": [{**model, "trainable": True, "sampleable": True}]})


async def telemetry(engine: Engine, request: Request) -> Response:
    return JSONResponse({"status": "accepted"})


async def create_session(engine: Engine, request: Request) -> Response:
    session_id = engine.create_session((await request.json()).get("user_metadata"))
    return JSONResponse({"session_id": session_id, "type": "create_session"})


async def heartbeat(engine: Engine, request: Request) -> Response:
    engine.heartbeat(str((await request.json()).get("session_id")))
    return JSONResponse({"type": "session_heartbeat"})


async def finish_session(engine: Engine, request: Request) -> Response:
    engine.finish(request.path_params["session_id"])
    return JSONResponse({})


async def create_model(engine: Engine, request: Request) -> Response:
    return _promise(engine.create_model(protocol.parse(protocol.CreateModel, await request.body())))


async def load_weights(engine: Engine, request: Request) -> Response:
    return _promise(engine.load_weights(protocol.parse(protocol.LoadWeights, await request.body())))


async def forward_backward(engine: Engine, request: Request) -> Response:
    return _promise(engine.forward_backward(await request.body()))


async def optim_step(engine: Engine, request: Request) -> Response:
    return _promise(engine.optim_step(protocol.parse(protocol.OptimStep, await request.body())))


async def save_weights(engine: Engine, request: Request) -> Response:
    return _promise(engine.save_weights(protocol.parse(protocol.SaveWeights, await request.body())))


async def save_weights_for_sampler(engine: Engine, request: Request) -> Response:
    return _promise(engine.save_weights_for_sampler(protocol.parse(protocol.SaveWeights, await request.body())))


async def save_weights_external(engine: Engine, request: Request) -> Response:
    raise EngineError("The engine has no bucket for external weights: use `metaclaw engine export`.")


async def get_info(engine: Engine, request: Request) -> Response:
    model_id = str((await request.json()).get("model_id"))
    config = engine.model(model_id).trainee.adapter.config
    base = engine.base
    return JSONResponse(
        {
            "type": "get_info",
            "model_id": model_id,
            "model_name": base.name,
            "model_data": {"arch": base.arch, "model_name": base.name, "tokenizer_id": base.path},
            "is_lora": True,
            "lora_rank": config.rank,
        }
    )


async def create_sampling_session(engine: Engine, request: Request) -> Response:
    wanted = protocol.parse(protocol.CreateSamplingSession, await request.body())
    sampler_id = await engine.create_sampling_session(wanted)
    return JSONResponse({"sampling_session_id": sampler_id, "type": "create_sampling_session"})


async def get_sampler(engine: Engine, request: Request) -> Response:
    sampler_id = request.path_params["sampler_id"]
    sampler = engine.sampler(sampler_id)
    return JSONResponse({"sampler_id": sampler_id, "base_model": _loadable(engine.base.name), "model_path": sampler.model_path})


async def sample(engine: Engine, request: Request) -> Response:
    request_id, sequence_ids = await engine.sample(protocol.parse(protocol.Sample, await request.body()))
    return JSONResponse({"request_id": request_id, "sample_sequence_ids": sequence_ids})


async def cancel_future(engine: Engine, request: Request) -> Response:
    engine.cancel(str((await request.json()).get("request_id")))
    return JSONResponse({})


async def retrieve_future(engine: Engine, request: Request) -> Response:
    request_id = str((await request.json()).get("request_id"))
    try:
        reply = await engine.futures.wait(request_id, POLL)
    except KeyError:
        return JSONResponse({"detail": f"The result of {request_id} is not here: unknown, or freed."}, 410)
    if reply is None:
        return JSONResponse({"type": "try_again", "request_id": request_id, "queue_state": "active"})
    return Response(reply.content, media_type=reply.media_type)


async def weights_info(engine: Engine, request: Request) -> Response:
    about = engine.checkpoints.get(Place.parse(str((await request.json()).get("tinker_path")))).about
    lora = about.lora
    trained = {"train_unembed": lora.train_unembed, "train_mlp": lora.train_mlp, "train_attn": lora.train_attn}
    return JSONResponse({"base_model": about.base_model, "is_lora": True, "lora_rank": lora.rank, **trained})


async def list_checkpoints(engine: Engine, request: Request) -> Response:
    found = engine.checkpoints.find(request.path_params.get("run"))
    if "run" in request.path_params:
        return JSONResponse({"checkpoints": [_checkpoint(c) for c in found]})
    offset, limit = _page(request, 100)
    cursor = {"offset": offset, "limit": limit, "total_count": len(found)}
    return JSONResponse({"checkpoints": [_checkpoint(c) for c in found[offset : offset + limit]], "cursor": cursor})


async def delete_checkpoint(engine: Engine, request: Request) -> Response:
    engine.checkpoints.delete(_place(request))
    return JSONResponse({})


async def set_ttl(engine: Engine, request: Request) -> Response:
    ttl = (await request.json()).get("ttl_seconds")
    if ttl is not None and type(ttl) is not int:
        raise EngineError("ttl_seconds must be a whole number or null.")
    engine.checkpoints.set_ttl(_place(request), ttl)
    return JSONResponse({})


async def list_runs(engine: Engine, request: Request) -> Response:
    runs = sorted({c.place.run for c in engine.checkpoints.find()} | set(engine.live_models()))
    offset, limit = _page(request, 20)
    cursor = {"offset": offset, "limit": limit, "total_count": len(runs)}
    shown = [_run(engine, run) for run in runs[offset : offset + limit]]
    return JSONResponse({"training_runs": shown, "cursor": cursor})


async def get_run(engine: Engine, request: Request) -> Response:
    return JSONResponse(_run(engine, request.path_params["run"]))


def _run(engine: Engine, run: str) -> dict[str, Any]:
    live, found = engine.live_models().get(run), engine.checkpoints.find(run)
    if live is None and not found:
        raise NotFoundError(f"There is no training run {run}.")
    last = {kind: next((_checkpoint(c) for c in found if c.place.kind == kind), None) for kind in KINDS}
    lora = live.trainee.adapter.config if live else found[0].about.lora
    times = [c.about.created for c in found] + ([live.created] if live else [])
    return {
        "training_run_id": run,
        "base_model": engine.base.name if live else found[0].about.base_model,
        "model_owner": "local",
        "is_lora": True,
        "lora_rank": lora.rank,
        "last_request_time": _time(max(times)),
        "last_checkpoint": last["weights"],
        "last_sampler_checkpoint": last["sampler_weights"],
        "user_metadata": live.user_metadata if live else None,
    }


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    place = checkpoint.place
    return {
        "checkpoint_id": f"{place.kind}/{place.name}",
        "checkpoint_type": KINDS[place.kind],
        "time": _time(checkpoint.about.created),
        "tinker_path": place.path,
        "size_bytes": checkpoint.size,
        "public": False,
        "user_metadata": checkpoint.about.user_metadata,
        "expires_at": _time(checkpoint.expires) if checkpoint.expires is not None else None,
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _place(request: Request) -> Place:
    params = request.path_params
    return Place(params["run"], params["kind"], params["name"]).checked()


def _page(request: Request, limit: int) -> tuple[int, int]:
    try:
        return int(request.query_params.get("offset", 0)), int(request.query_params.get("limit", limit))
    except ValueError as e:
        raise EngineError("offset and limit must be whole numbers.") from e


def _loadable(name: str) -> str:
    # The SDK loads the tokenizer from this, and takes a path with exactly two slashes for org/model/variant.
    return f"{name}/" if name.startswith("/") and name.count("/") == 2 else name


def _promise(request_id: str) -> Response:
    return JSONResponse({"request_id": request_id})


_CHECKPOINT = "/training_runs/{run}/checkpoints/{kind}/{name}"
_ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/healthz", healthz),
    ("GET", "/get_server_capabilities", capabilities),
    ("POST", "/client/config", client_config),
    ("POST", "/client/dynamic_config", dynamic_config),
    ("POST", "/telemetry", telemetry),
    ("POST", "/create_session", create_session),
    ("POST", "/session_heartbeat", heartbeat),
    ("POST", "/sessions/{session_id}/finish", finish_session),
    ("POST", "/create_model", create_model),
    ("POST", "/load_weights", load_weights),
    ("POST", "/get_info", get_info),
    ("POST", "/forward_backward", forward_backward),
    ("POST", "/optim_step", optim_step),
    ("POST", "/save_weights", save_weights),
    ("POST", "/save_weights_for_sampler", save_weights_for_sampler),
    ("POST", "/save_weights_external", save_weights_external),
    ("POST", "/create_sampling_session", create_sampling_session),
    ("GET", "/samplers/{sampler_id}", get_sampler),
    ("POST", "/asample", sample),
    ("POST", "/cancel_future", cancel_future),
    ("POST", "/retrieve_future", retrieve_future),
    ("POST", "/weights_info", weights_info),
    ("GET", "/checkpoints", list_checkpoints),
    ("GET", "/training_runs", list_runs),
    ("GET", "/training_runs/{run}", get_run),
    ("GET", "/training_runs/{run}/checkpoints", list_checkpoints),
    ("PUT", f"{_CHECKPOINT}/ttl", set_ttl),
    ("DELETE", _CHECKPOINT, delete_checkpoint),
)


def create_app(make: Callable[[], Engine], api_key: str) -> Starlette:
    """`make` is called on the running loop, so that the engine can answer into it."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.engine = make()
        yield
        app.state.engine.close()

    def route(method: str, path: str, handler: Handler) -> Route:
        async def endpoint(request: Request) -> Response:
            return await handler(request.app.state.engine, request)

        return Route(path, endpoint, methods=[method])

    async def refuse(request: Request, error: Exception) -> Response:
        if not isinstance(error, EngineError):
            raise error
        body = oai.error_body(error) if request.url.path.startswith("/oai/") else {"detail": str(error)}
        return JSONResponse(body, error.status)

    async def unknown(request: Request, error: Exception) -> Response:
        return JSONResponse({"detail": f"The engine doesn't serve {request.method} {request.url.path}."}, 404)

    return Starlette(
        routes=[
            Mount("/api/v1", routes=[route(*entry) for entry in _ROUTES]),
            Mount("/oai/api/v1", routes=[route(*entry) for entry in oai.ROUTES]),
        ],
        middleware=[Middleware(KeyCheck, key=api_key)],
        exception_handlers={EngineError: refuse, 404: unknown, 405: unknown},
        lifespan=lifespan,
    )


async def serve(app: Starlette, port: int, ready: Callable[[str], None]) -> None:
    """Listen on 127.0.0.1 until interrupted; port 0: any free one. `ready` gets the URL. Raises EngineError."""
    try:
        listener = loopback_listener(port)
    except OSError as e:
        raise EngineError(f"Port {port} can't be used: {e.strerror}.") from e
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready(url)

    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    await Server(config).serve(sockets=[listener])
