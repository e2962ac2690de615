"""The addon: LLM traffic is recorded, and where it is live, rewritten.

Design: every hook leaves at its first line unless the flow is an LLM exchange. Nothing here may
change a flow by halves: new bytes are built first and assigned last, and a hook that fails leaves the
client's own bytes in place and counts it (`_guard`). `response` and `error` only queue; the spool's
thread writes. Headers are never changed, content-length and our own ``x-metaclaw`` apart.

A flow read from a capture (`flow.live` False) is recorded and never injected or routed, and reading
one starts no child process. In rl mode a request may be turned to the policy server (`route`); headers do change then.

A setting that is wrong when mitmproxy starts ends it with one sentence; one that becomes wrong later is
refused and the last good settings stay in use.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mitmproxy import command, contentviews, ctx, exceptions, http
from mitmproxy.addonmanager import Loader
from mitmproxy.utils import asyncio_utils

from metaclaw_core.agents import agents
from metaclaw_core.agents.base import hints_from_headers
from metaclaw_core.decode import decode_body
from metaclaw_core.errors import MetaClawError
from metaclaw_core.proxy import capture, options, route, runtime
from metaclaw_core.proxy.contentview import META, LLMView
from metaclaw_core.proxy.dumps import RedactDumps
from metaclaw_core.proxy.logs import survive_full_disk
from metaclaw_core.proxy.rewrite import Rewriter, Rewritten, prior_of
from metaclaw_core.proxy.runtime import Flight, Runtime
from metaclaw_core.proxy.service import Service
from metaclaw_core.proxy.tee import Tee
from metaclaw_core.proxy.tls import TunnelUntrusting
from metaclaw_core.routes import FAILED_HEADER
from metaclaw_core.settings import Settings, home, load_settings
from metaclaw_core.wire import dialects, find_route, websocket_route

logger = logging.getLogger(__name__)

_STREAM_TYPES = ("text/event-stream", "application/x-ndjson", "application/jsonl")
_TEE_LIMIT = 64 << 20


type _Hook = Callable[[MetaClaw, http.HTTPFlow], None]
type _AsyncHook = Callable[[MetaClaw, http.HTTPFlow], Coroutine[Any, Any, None]]


def _guard(hook: _Hook) -> _Hook:
    """The boundary of fail-open: a bug of ours must not be the agent's problem. Logged once per hook, counted always."""

    @functools.wraps(hook)
    def guarded(self: MetaClaw, flow: http.HTTPFlow) -> None:
        try:
            hook(self, flow)
        except Exception:  # noqa: BLE001
            self.failed(hook.__name__)

    return guarded


def _guard_async(hook: _AsyncHook) -> _AsyncHook:
    """The same for a hook that may wait."""

    @functools.wraps(hook)
    async def guarded(self: MetaClaw, flow: http.HTTPFlow) -> None:
        try:
            await hook(self, flow)
        except Exception:  # noqa: BLE001
            self.failed(hook.__name__)

    return guarded


class MetaClaw:
    name = "metaclaw"

    def __init__(self, *, worker: bool = True, policy: str | None = None) -> None:
        """`worker` False: start no worker (for replaying and for tests). `policy`: the module that serves the policy in rl
        mode; None: our own where there is a worker, else none."""
        self._policy = policy or ("metaclaw_core.policy" if worker else None)
        self.settings: Settings | None = None
        self.home: Path = home()
        self._worker = worker
        self._runtime: Runtime | None = None
        self._rewriter: Rewriter | None = None
        self._service: Service | None = None
        self._view = LLMView()
        self._begun = False
        self._starting: Any = None  # the task of `_begin`

    # --- life: `load`, `configure` and `running` must be plain functions, or a reload of the script breaks

    def load(self, loader: Loader) -> None:
        options.register(loader)

    def configure(self, updated: set[str]) -> None:
        if self.settings is None:
            self._first_settings()
        elif any(name in options.OPTIONS for name in updated):
            self.reload_settings()
        if "stream_large_bodies" in updated and ctx.options.stream_large_bodies:
            logger.warning(
                "metaclaw: stream_large_bodies=%s: requests above that size reach the LLM before they can be read, "
                "so they get no skills and are not recorded.",
                ctx.options.stream_large_bodies,
            )

    def _first_settings(self) -> None:
        """An exception would show as a traceback; an error in the log ends mitmproxy's start just as well."""
        problems = options.unknown(ctx.options)
        before = runtime.current(self.home)
        try:
            self.settings = load_settings(options.layer(ctx.options))
        except MetaClawError as e:
            self.settings = before.settings if before else None  # the script was reloaded: go on as it was
            problems.append(str(e))
        for problem in problems:
            logger.error("metaclaw: %s", problem)

    def reload_settings(self) -> None:
        """Raises OptionsError, and then the settings are what they were."""
        try:
            settings = load_settings(options.layer(ctx.options))
            if self._runtime is not None and self._rewriter is not None:
                self._make_rewriter(settings, self._runtime)
        except MetaClawError as e:
            raise exceptions.OptionsError(f"metaclaw: {e}") from e
        changed, self.settings = settings != self.settings, settings
        if self._runtime is not None:
            self._runtime.settings = settings
            if not _lends_keys(settings):
                self._runtime.callers.forget()
        if changed and self._service is not None:
            self._service.renew_children(options.environment(ctx.options))

    def _make_rewriter(self, settings: Settings, current: Runtime) -> None:
        old = self._rewriter
        self._rewriter = Rewriter(settings, current.sessions, current.spool)
        if old is not None:
            asyncio_utils.create_task(old.aclose(), name="metaclaw-retriever-close", keep_ref=True)

    def forget(self) -> None:
        """The recorded was purged: nothing of it may come back out of this process's memory, nor the worker's."""
        if self._service is not None:
            self._service.tell_worker({"type": "forget"})
        if self._runtime is not None:
            self._runtime.sessions.forget(self._runtime.home / "run" / "sessions.db")
        if self._rewriter is not None:
            self._rewriter.forget()

    @property
    def retrieval_note(self) -> str | None:
        """Why the last retrieval was not what was asked for; None: it was."""
        return self._rewriter.note if self._rewriter else None

    @property
    def redacts_dumps(self) -> bool:
        """Is ``proxy.redact_dumps`` on?"""
        return self.settings is not None and self.settings.proxy.redact_dumps

    def running(self) -> Any:
        """Once: when mitmproxy says so, or with a request that comes before. It listens a moment earlier than it says so, and
        clients that wait for a restart come in that moment."""
        if not self._begun:
            self._begun, self._starting = True, self._begin()
        return self._starting

    def _begin(self) -> Any:
        if self.settings is None:
            return None
        survive_full_disk()
        try:
            self._runtime = runtime.acquire(self.home)
        except OSError as e:
            logger.warning("metaclaw: %s can't be used (%s): nothing is recorded, traffic goes on.", self.home, e)
            return None
        dialects()  # loads the plug-ins now, not in the first request
        agents()
        self._runtime.settings = self.settings
        contentviews.add(self._view)
        if not ctx.options.server:  # reading a capture: no traffic, no child, no socket
            return None
        try:
            self._make_rewriter(self.settings, self._runtime)
        except MetaClawError as e:
            logger.warning("metaclaw: %s Nothing is injected.", e)
        environment = options.environment(ctx.options)
        self._service = Service(self._runtime, self, worker=self._worker, policy=self._policy, environment=environment)
        try:
            self._service.prepare()
        except Exception as e:  # noqa: BLE001 - whatever is wrong with a skill, an error here would end mitmproxy's start
            logger.warning("metaclaw: %s Traffic goes on without skills until the worker has built an index.", e)
        return asyncio.ensure_future(self._service.start())

    def done(self) -> Any:
        current = self._runtime
        if current is None:
            return None
        if self._service is not None:
            self._service.stop()
        stopping = ctx.master.should_exit.is_set()
        if stopping:
            for flight in list(current.flights.values()):  # mitmproxy calls no hook for what a shutdown cuts off
                self._cut_off(flight.flow)
        self._runtime = None
        if stopping:
            if runtime.release(current):
                current.close()
            return None
        # The script is being reloaded: its successor takes over within moments, or nobody does.
        return asyncio.ensure_future(runtime.release_later(current))

    # --- one flow -----------------------------------------------------------------------------

    @_guard
    def requestheaders(self, flow: http.HTTPFlow) -> None:
        if not self._begun:
            self.running()
        if self._runtime is None:
            return
        found = find_route(flow.request.method, flow.request.path)
        if found is None:
            self._runtime.counters["passed: no LLM path"] += 1
            return
        dialect, route = found
        headers = capture.plain_headers(flow.request)
        self._runtime.flights[flow.id] = Flight(
            flow=flow,
            dialect=dialect,
            route=route,
            hints=hints_from_headers(headers),
            principal=capture.principal(flow.request, self._runtime.key, headers),
            encoding=headers.get("content-encoding", ""),
            bypass=headers.get("x-metaclaw"),
        )

    @_guard_async
    async def request(self, flow: http.HTTPFlow) -> None:
        if self._runtime is None:
            return
        flight = self._runtime.flights.get(flow.id)
        if flight is None:
            self._websocket(flow)
            return
        if flow.request.stream:  # stream_large_bodies: the body has gone by
            del self._runtime.flights[flow.id]
            self._runtime.counters["passed: the request was streamed, not recorded"] += 1
            return
        if flow.live and time.monotonic() < self._runtime.refuse_until:
            del self._runtime.flights[flow.id]
            self._runtime.counters["refused: the proxy is about to end"] += 1
            flow.response = _error(503, "The proxy is restarting; try again.", "server_error", "restarting", {"retry-after": "2"})
            return
        flight.body = flow.request.raw_content or b""
        if not flow.live:
            return
        if flight.bypass is not None:
            flow.request.headers.pop("x-metaclaw", None)
        bypassed = (flight.bypass or "").strip().lower() == "off" or self._runtime.bypass
        if bypassed or flow.response is not None or self._rewriter is None:
            self._runtime.counters["bypassed"] += bypassed
            self._refuse_own_chain(flow, flight)
            return
        began = time.perf_counter()
        outcome = await self._rewritten(flow, flight)
        self._runtime.added.append(time.perf_counter() - began)
        if outcome.identity is not None:
            flight.identity, flight.session = outcome.identity, outcome.session
        flight.like = outcome.like
        self._runtime.counters[outcome.reason or "injected"] += 1
        if outcome.body is not None:
            flight.injection = outcome.injection
            _assign(flow.request, outcome.body)
        _annotate(flow, outcome)
        self._route(flow, flight)
        self._refuse_own_chain(flow, flight)

    @_guard
    def responseheaders(self, flow: http.HTTPFlow) -> None:
        flight = self._runtime.flights.get(flow.id) if self._runtime else None
        if flight is None or not flow.live or flow.response is None:
            return
        if flight.routed is not None and not self._answered(flight, flight.routed, flow.response):
            return
        # No length: the answer is made as it is sent, whatever its type says. And what is redacted has to be sent before.
        streams = capture.media_type(flow.response) in _STREAM_TYPES or "content-length" not in flow.response.headers
        if streams or self.redacts_dumps:
            flight.tee = Tee(_TEE_LIMIT)
            flow.response.stream = flight.tee

    @_guard
    def _cut_off(self, flow: http.HTTPFlow) -> None:
        self._record(flow, "the proxy was stopped")

    @_guard
    def response(self, flow: http.HTTPFlow) -> None:
        self._record(flow)

    @_guard
    def error(self, flow: http.HTTPFlow) -> None:
        self._record(flow)

    # --- parts of the hooks -------------------------------------------------------------------

    async def _rewritten(self, flow: http.HTTPFlow, flight: Flight) -> Rewritten:
        if self._rewriter is None or self.settings is None or not (body := flight.body):
            return Rewritten(None, "passed: no body")
        limit = self.settings.proxy.max_body_mb << 20
        if len(body) > limit:
            return Rewritten(None, "passed: body over the limit")
        if flight.encoding:
            try:
                body, whole = decode_body(body, flight.encoding, limit)
            except MetaClawError:
                whole = False
            if not whole:
                return Rewritten(None, "passed: content-encoding can't be undone")
        index = self._service.index if self._service else None
        return await self._rewriter.rewrite(flight.dialect, body, flow.request.path, flight.hints, flight.principal, index)

    def _route(self, flow: http.HTTPFlow, flight: Flight) -> None:
        """Mode rl: to the policy server, where it is ready and the session's turn is its."""
        router, settings, current = self._service.router if self._service else None, self.settings, self._runtime
        if router is None or settings is None or current is None or flow.response is not None or flight.identity is None:
            return
        state = current.sessions.get(flight.session) if flight.session else None
        before = (state.pin_turn, state.pin_version) if state else None
        choice = router.choose(flight.identity, flight.session, state, settings.rl)
        if state is not None and flight.session is not None and before != (state.pin_turn, state.pin_version):
            current.sessions.put(flight.session, state, current.spool)
        if isinstance(choice, str) or flight.session is None:
            current.counters[f"to the upstream: {choice}"] += 1
            return
        body = None
        if "content-encoding" in flow.request.headers:  # nothing was injected
            body = decode_body(flight.body or b"", flight.encoding, settings.proxy.max_body_mb << 20)[0]
        origin = route.turn_away(flow, body, choice, token=router.token, principal=flight.principal, session=flight.session)
        flight.routed = route.Routed(choice, origin, router.breaker)
        current.counters["to the policy server"] += 1
        route.annotate(flow, choice)

    def _refuse_own_chain(self, flow: http.HTTPFlow, flight: Flight) -> None:
        """An upstream doesn't know the answers of our own model: a client that would continue one there is told to try
        again, and then sends the whole history."""
        if flight.routed is not None or flow.response is not None or flight.dialect.name != "openai_responses":
            return
        if route.continues_ours(flight.body or b"", flight.encoding):
            if self._runtime is not None:
                self._runtime.counters["refused: continues an answer of our own model"] += 1
            message = "The response that this request continues is not known to this model; send the whole conversation."
            flow.response = _error(503, message, "server_error", "previous_response_not_found", {"retry-after": "1"})

    def _answered(self, flight: Flight, routed: route.Routed, response: http.Response) -> bool:
        """Whether the policy server answers the turn. If not, its upstream will, at the client's next attempt."""
        word = response.headers.get(FAILED_HEADER)
        route.strip(response)
        if word is None and response.status_code < 400:
            routed.succeeded()
            return True
        self._failed_there(flight, routed, word or f"status {response.status_code}")
        # Whatever it is, an agent must not take it for its provider's word: after a 401 it would drop its key.
        response.status_code, response.reason = 503, "Service Unavailable"
        response.headers["retry-after"] = "1"
        return False

    def _failed_there(self, flight: Flight, routed: route.Routed, word: str) -> None:
        if self._runtime is None:
            return
        self._runtime.counters[f"the policy server failed: {word}"] += 1
        if self._service is not None and self._service.router is not None and flight.session is not None:
            self._service.router.give_back(flight.session, routed.choice.turn)
        state = self._runtime.sessions.get(flight.session) if flight.session else None
        if routed.failed(word, state) and state is not None and flight.session is not None:
            self._runtime.sessions.put(flight.session, state, self._runtime.spool)

    def _returned(self, flow: http.HTTPFlow, flight: Flight, routed: route.Routed) -> None:
        """The end of a routed flow: its request is the client's own again."""
        route.turn_back(flow, routed.origin)
        if flow.error is None or routed.failure is not None or route.client_left(flow):
            routed.withdrawn()
        else:
            self._failed_there(flight, routed, "no connection" if flow.response is None else "the answer broke off")

    def _websocket(self, flow: http.HTTPFlow) -> None:
        """A WebSocket on an LLM path can't be learned from; 426 makes the client use plain HTTP."""
        if self._runtime is None or self.settings is None:
            return
        upgrade = flow.request.headers.get("upgrade", "").lower()
        if upgrade != "websocket" or not flow.live or not websocket_route(flow.request.path):
            return
        self._runtime.counters[f"websocket: {self.settings.proxy.websocket}"] += 1
        if self.settings.proxy.websocket == "fallback":
            flow.response = _error(426, "WebSocket is not served here; use HTTP.", "invalid_request_error", "upgrade_required")

    def _record(self, flow: http.HTTPFlow, problem: str | None = None) -> None:
        """`problem`: why the answer is not whole, where the flow itself doesn't say so."""
        if self._runtime is None:
            return
        flight = self._runtime.flights.pop(flow.id, None)
        if flight is None:
            return
        if flight.routed is not None:
            self._returned(flow, flight, flight.routed)
        answer: bytes | None = None
        if flight.tee is not None:
            answer = flight.tee.body()
            if flight.tee.overflow:
                self._runtime.counters["answers too large to keep"] += 1
                problem = f"the answer is larger than {_TEE_LIMIT >> 20} MiB and was not kept"
            elif flow.response is not None and flow.response.data.content is None:
                flow.response.data.content = answer  # so that -w and hardump hold what the client got
        if flight.identity is not None and flight.dialect.name == "openai_responses":
            body = answer if answer is not None else (flow.response.raw_content or b"" if flow.response else b"")
            if response_id := capture.response_id(body):
                self._runtime.sessions.remember_response(flight.principal, response_id, prior_of(flight.identity))
        exchange = capture.exchange(
            flow,
            flight.route,
            self._runtime.key,
            request_body=flight.body,
            request_encoding=flight.encoding,
            response_body=answer,
            hints=flight.hints,
            principal_id=flight.principal,
            injection=flight.injection,
            live=flow.live,
        )
        if flight.routed is not None:
            exchange = flight.routed.recorded(exchange)
        self._runtime.spool.put(exchange if problem is None else replace(exchange, complete=False, error=problem), flight.like)
        self._runtime.counters["exchanges"] += 1
        self._lend(flow, flight, self._runtime)

    def _lend(self, flow: http.HTTPFlow, flight: Flight, current: Runtime) -> None:
        """Tell the worker of an API key that worked, or of one that was refused."""
        if self.settings is None or self._service is None or flight.routed is not None or not _lends_keys(self.settings):
            return
        hosts = self.settings.proxy.hosts
        line = current.callers.seen(flow, flight.dialect.name, flight.principal, flight.identity, hosts)
        if line is not None:
            self._service.tell_worker(line)

    def failed(self, hook: str) -> None:
        """Count a failure of ours and log the first one of each hook with its traceback, as a warning:
        an error-level record during start-up would end mitmdump."""
        if self._runtime is None:
            return
        name = f"failed: {hook}"
        self._runtime.counters[name] += 1
        kind = sys.exc_info()[0]  # its text may hold what was said, and goes to the log only
        self._runtime.last_error = f"{hook}: {kind.__name__ if kind else 'unknown'}"
        if self._runtime.counters[name] == 1:
            logger.warning("metaclaw: %s failed; the flow passes unchanged.", hook, exc_info=True)

    # --- commands: the same functions that the control socket calls -----------------------------

    @command.command("metaclaw.status")
    def status_command(self) -> str:
        """What the proxy does: sessions, queue, counters, children."""
        from metaclaw_core.wire.jsonio import dumps

        return dumps(self._service.status()) if self._service else "metaclaw is not running"

    @command.command("metaclaw.bypass")
    def bypass_command(self, value: str) -> str:
        """on: every request passes unchanged (and is recorded); off: back to normal."""
        if self._service is None:
            return "metaclaw is not running"
        return str(self._service.set_bypass(value))

    @command.command("metaclaw.flush")
    async def flush_command(self) -> None:
        """Wait until every finished exchange is on disk."""
        if self._service is not None:
            await self._service.flush({})

    @command.command("metaclaw.reload")
    def reload_command(self) -> None:
        """Read the configuration and the skill index again."""
        if self._service is not None:
            self._service.reload_now()


def _lends_keys(settings: Settings) -> bool:
    """Only where skills are written and no LLM is configured for it."""
    llm = settings.llm
    named = llm.api_key or llm.api_base or llm.provider == "ollama" or settings.rl.evolver_api_base
    return llm.use_caller_credentials and settings.skills.auto_evolve and not named


def _error(status: int, message: str, kind: str, code: str, headers: Mapping[str, str] | None = None) -> http.Response:
    """An answer of our own, in the form that clients of all dialects can read."""
    body = json.dumps({"error": {"message": message, "type": kind, "code": code}}, separators=(",", ":")).encode()
    return http.Response.make(status, body, {"content-type": "application/json", "connection": "close", **(headers or {})})


def _assign(request: http.Request, body: bytes) -> None:
    """The one place where a request changes: its body, and what says how long and how encoded it is."""
    length, told = b"%d" % len(body), False
    fields: list[tuple[bytes, bytes]] = []
    for name, value in request.headers.fields:  # in one pass: each question to mitmproxy's own headers takes one
        kind = name.lower()
        if kind == b"content-encoding":
            continue
        told |= kind in (b"content-length", b"transfer-encoding")
        fields.append((name, length if kind == b"content-length" else value))
    if not told:
        fields.append((b"content-length", length))
    request.raw_content, request.headers.fields = body, tuple(fields)


def _annotate(flow: http.HTTPFlow, outcome: Rewritten) -> None:
    """Notes for people who look at the flow; plain values only, or saving the flow fails."""
    identity, injection = outcome.identity, outcome.injection
    notes: dict[str, Any] = {"passed": ": ".join(filter(None, (outcome.reason, outcome.detail)))}
    session = (identity.session_id or "").encode("utf-8", "replace").decode() if identity else ""
    if identity is not None:
        notes |= {"agent": identity.agent, "kind": str(identity.kind), "session": session}
    if injection is not None:
        notes |= {"skills": list(injection.skills), "block": injection.text}
    flow.metadata[META] = notes
    if identity is not None:
        added = f" + {', '.join(injection.skills)}" if injection else ""
        flow.comment = f"metaclaw: {identity.kind} {session[:8]}{added}"


def addons_for_script() -> list[Any]:
    """What ``addons/metaclaw.py`` lists."""
    metaclaw = MetaClaw()
    return [metaclaw, TunnelUntrusting(), RedactDumps(lambda: metaclaw.redacts_dumps)]
