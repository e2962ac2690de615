"""The HTTP face: a request of any dialect in, an answer of our own version in the same dialect out; loopback only.

Design: one `_Answer` per request goes through the same steps whether the client streams or not: parse, find what was said
before, render, sample in segments, read the tokens, write. There is no response head before the first segment exists, so
whatever fails until then is a 503 that a client retries, with one word in `FAILED_HEADER`, and the agent's retry of the
turn reaches its upstream. After the head a failure is told as the dialect tells it. The exact tokens are committed before
the last byte of the answer is sent. When the client goes away sampling stops, and what was sampled so far is kept as class
C. Of the request's headers only those in `routes` and the token are read: no provider key comes through here.

Limits: `x-metaclaw-flow` makes a sample; without it (a request by hand) none is kept. Usage has no count of cached tokens,
for the sampler does not tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from metaclaw_core import model
from metaclaw_core.errors import MetaClawError, StoreError, WireError
from metaclaw_core.model import StopReason, Usage
from metaclaw_core.policy.asked import Plan, RefusedError, plan
from metaclaw_core.policy.canonical import reply_key
from metaclaw_core.policy.memory import Past
from metaclaw_core.policy.parse import ReplyReader
from metaclaw_core.policy.render import Prompt, Renderer, RenderError
from metaclaw_core.policy.sampler import SamplerError, Segment
from metaclaw_core.policy.service import Policy
from metaclaw_core.redact import redact, redact_text
from metaclaw_core.routes import (
    EXPLORE_HEADER,
    FAILED_HEADER,
    FLOW_HEADER,
    PRINCIPAL_HEADER,
    RESPONSE_ID_PREFIX,
    SESSION_HEADER,
    VERSION_HEADER,
)
from metaclaw_core.store import samplefile
from metaclaw_core.store.chain import pack_message
from metaclaw_core.wire import find_route
from metaclaw_core.wire.answer import JSON_TYPE, AnswerWriter, answer_writer, error_body
from metaclaw_core.wire.jsonio import dumps

logger = logging.getLogger("metaclaw.policy")

KEEP_ALIVE_SECONDS = 5.0
SEGMENT_SECONDS = 300.0  # for one that isn't the first: 1,024 tokens on a slow machine
SILENCES = 2  # checks in a row that the sampler may fail meanwhile
_IDS = {"openai_chat": "chatcmpl-", "openai_responses": RESPONSE_ID_PREFIX, "anthropic": "msg_"}


class FailedError(MetaClawError):
    """This turn can't be answered here. `kind` is the word for `FAILED_HEADER`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the proxy says beside the body; None: it did not."""

    flow: str | None
    session: str | None
    principal: str | None
    version: int | None
    explore: bool


def create_app(policy: Policy, token: str) -> Starlette:
    """Every path and method; `token` is the bearer token that each request must bring."""
    return Starlette(routes=[Route("/{path:path}", endpoint=_Endpoint(policy, token))])


class _Endpoint:
    """An ASGI application, so that it can watch for the client's leaving while it works."""

    def __init__(self, policy: Policy, token: str) -> None:
        self._policy = policy
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.encode(), self._token):
            await JSONResponse({"detail": "This server answers its own proxy only."}, 401)(scope, receive, send)
            return
        path = scope["path"] + ("?" + scope["query_string"].decode("latin-1") if scope["query_string"] else "")
        found = find_route(request.method, path)
        if found is None:
            await JSONResponse({"detail": f"{request.method} {scope['path']} is no request for an answer."}, 404)(scope, receive, send)
            return
        try:
            body = await request.body()
        except ClientDisconnect:
            return
        answer = _Answer(self._policy, found[0].name, _Sender(send))
        work = asyncio.ensure_future(answer.run(lambda: found[0].parse_request(body, path), body, path, _asked(request)))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _asked(request: Request) -> _Asked:
    headers = request.headers
    version = headers.get(VERSION_HEADER, "")
    return _Asked(
        flow=headers.get(FLOW_HEADER) or None,
        session=headers.get(SESSION_HEADER) or None,
        principal=headers.get(PRINCIPAL_HEADER) or None,
        version=int(version) if version.isascii() and version.isdigit() else None,
        explore=headers.get(EXPLORE_HEADER) == "1",
    )


class _Sender:
    """The response: a head once, then pieces."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def head(self, media_type: str) -> None:
        self.started = True
        headers = [(b"content-type", media_type.encode()), (b"cache-control", b"no-store")]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def piece(self, body: bytes, *, last: bool = False) -> None:
        if body or last:
            await self._send({"type": "http.response.body", "body": body, "more_body": not last})

    async def whole(self, response: Response) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await self.piece(bytes(response.body), last=True)


class _Answer:
    """One request on its way."""

    def __init__(self, policy: Policy, dialect: str, sender: _Sender) -> None:
        self._policy = policy
        self._dialect = dialect
        self._sender = sender
        self._writer: AnswerWriter | None = None
        self._began = time.monotonic()

    async def run(self, parse: Callable[[], model.Request], body: bytes, path: str, asked: _Asked) -> None:
        """Answer, whatever happens; only the client's leaving (cancellation) comes out."""
        try:
            await self._answer(parse, body, path, asked)
        except SamplerError as e:
            self._policy.failed(e)
            await self._fail(e.kind, str(e))
        except RenderError as e:
            await self._fail(e.kind, str(e))
        except FailedError as e:
            await self._fail(e.kind, str(e))
        except RefusedError as e:
            await self._fail("unsupported", str(e))
        except MetaClawError as e:
            logger.warning("A request could not be answered: %s", e)
            await self._fail("error", str(e))
        except Exception:  # the boundary of a request
            logger.exception("A request could not be answered")
            await self._fail("error", "The policy server failed; its log says why.")

    async def _fail(self, kind: str, message: str) -> None:
        if self._sender.started:
            await self._sender.piece(self._writer.fail(message) if self._writer is not None else b"", last=True)
            return
        content = error_body(self._dialect, 503, message, "server_error", kind)
        headers = {FAILED_HEADER: kind, "retry-after": "1"}
        await self._sender.whole(Response(content, 503, headers, media_type=JSON_TYPE))

    async def _answer(self, parse: Callable[[], model.Request], body: bytes, path: str, asked: _Asked) -> None:
        policy = self._policy
        if policy.unready is not None or policy.renderer is None:
            raise FailedError("unready", policy.unready or "The policy server is starting.")
        renderer = policy.renderer
        limit = policy.settings.policy.first_segment_timeout
        sampled: _Sampled | None = None
        try:
            async with asyncio.timeout(limit):
                # A long body takes milliseconds to parse, so it is done where nothing waits for it.
                try:
                    request = await asyncio.to_thread(parse) if len(body) > 32_768 else parse()
                except WireError as e:
                    raise FailedError("unsupported", str(e)) from e
                version = asked.version if asked.version is not None else policy.route.working
                checkpoint = policy.sampler.path_of(version)
                planned = plan(request, policy.defaults, explore=asked.explore, max_tokens=policy.settings.policy.max_tokens)
                full, past = await self._with_history(request, asked)
                known = await policy.memory.tokens(asked.session)
                room = self._room(planned)
                prompt = await policy.tokenizing(lambda: renderer.render(full, known, max_tokens=room))
                planned, cut_by_context = self._fitting(planned, prompt)
                sampled = _Sampled(policy, renderer, renderer.reader(full), prompt, planned, version, checkpoint, cut_by_context)
                await sampled.first()
        except TimeoutError:
            if sampled is not None:
                await sampled.stop()
            raise SamplerError("timeout", f"No token came within {limit:g} s.") from None
        policy.succeeded()
        response_id = _IDS.get(self._dialect, "") + secrets.token_hex(16)
        name = request.model or policy.sampler.base_model
        self._writer = writer = answer_writer(
            self._dialect, request, model=name, response_id=response_id, created=time.time(), stream=request.stream, path=path
        )
        keeping = _Keeping(policy, asked, request, past, body, renderer.fingerprint, response_id)
        try:
            await self._say(request, writer, sampled)
        except BaseException as e:
            # The client has gone, or sampling broke: what there is stays as a sample that trains nothing.
            word = "aborted" if isinstance(e, asyncio.CancelledError) else f"failed: {e}"
            await _to_its_end(sampled.stop())
            await _to_its_end(_kept(keeping, sampled, broken=word))
            raise
        await _to_its_end(_kept(keeping, sampled))
        usage = Usage(len(sampled.prompt.ids), len(sampled.kept))
        end = writer.finish(sampled.stop_reason, usage, sampled.reader.stop_sequence)
        if request.stream:
            await self._sender.piece(end, last=True)
        else:
            await self._sender.whole(Response(end, 200, media_type=writer.media_type))

    async def _say(self, request: model.Request, writer: AnswerWriter, sampled: _Sampled) -> None:
        """Send what the tokens say while they come."""
        if request.stream:
            await self._sender.head(writer.media_type)
            await self._sender.piece(writer.start())
        while True:
            said = b"".join(map(writer.feed, await sampled.events()))
            if request.stream:
                await self._sender.piece(said)
            if sampled.ended:
                return
            waiting = asyncio.ensure_future(sampled.next())
            try:
                async with asyncio.timeout(SEGMENT_SECONDS):
                    await self._wait_for(waiting, request.stream, writer)
            except TimeoutError:
                raise SamplerError("timeout", f"No token came within {SEGMENT_SECONDS:g} s.") from None
            finally:
                waiting.cancel()
                await asyncio.wait((waiting,))  # it holds the source, which is closed next

    async def _wait_for(self, waiting: asyncio.Future[None], stream: bool, writer: AnswerWriter) -> None:
        """Until the next segment is there, with signs of life to the client and looks whether the sampler gives any."""
        silences = 0
        while not (await asyncio.wait((waiting,), timeout=KEEP_ALIVE_SECONDS))[0]:
            if stream:
                await self._sender.piece(writer.keep_alive())
            try:
                await self._policy.sampler.check()
                silences = 0
            except SamplerError:
                silences += 1
                if silences >= SILENCES and not waiting.done():
                    raise
        waiting.result()

    async def _with_history(self, request: model.Request, asked: _Asked) -> tuple[model.Request, Past | None]:
        """The request with the whole conversation in it, and what of it was not in the body."""
        if "conversation" in request.extra:
            raise FailedError("history", "The conversation is kept at the provider.")
        if request.previous_response_id is None:
            return request, None
        past = await self._policy.memory.past(asked.principal or "", request.previous_response_id)
        if past is None:
            raise FailedError("history", f"The conversation before {request.previous_response_id} is not known here.")
        return replace(request, messages=samplefile.continued(past.messages, request.messages)), past

    def _room(self, planned: Plan) -> int:
        """Tokens that a prompt may have: a reply needs some too, at most a quarter of the context."""
        limit = self._policy.max_context
        return 2**31 if limit is None else limit - min(planned.sampling.max_tokens, limit // 4)

    def _fitting(self, planned: Plan, prompt: Prompt) -> tuple[Plan, bool]:
        """The plan with no more tokens than the context has left; whether that is less than was asked for."""
        limit = self._policy.max_context
        left = planned.sampling.max_tokens if limit is None else limit - len(prompt.ids)
        if left >= planned.sampling.max_tokens:
            return planned, False
        return replace(planned, sampling=replace(planned.sampling, max_tokens=left)), True


class _Sampled:
    """A reply in the making: its tokens so far, and what they say."""

    def __init__(
        self,
        policy: Policy,
        renderer: Renderer,
        reader: ReplyReader,
        prompt: Prompt,
        planned: Plan,
        version: int,
        checkpoint: str | None,
        by_context: bool,
    ) -> None:
        self.reader = reader
        self.prompt = prompt
        self.planned = planned
        self.version = version
        self.checkpoint = checkpoint
        self.segments = 0
        self.ended = False
        self.stopped = False
        self._policy = policy
        self._by_context = by_context
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._fresh: list[Segment] = []
        self._source = policy.sampler.sample(version, prompt.ids, planned.sampling, renderer.stop_ids)

    async def first(self) -> None:
        await self.next()

    async def next(self) -> None:
        """One more segment. Raises SamplerError."""
        segment = await anext(self._source)
        self.segments += 1
        self.stopped = segment.stopped
        self._tokens += segment.tokens
        self._logprobs += segment.logprobs
        self._fresh.append(segment)

    async def events(self) -> list[Any]:
        """What the newest segment says; sets `ended`."""
        fresh, self._fresh = self._fresh, []
        events: list[Any] = await self._policy.tokenizing(self.reader.feed, [token for segment in fresh for token in segment.tokens])
        full = len(self._tokens) >= self.planned.sampling.max_tokens
        if self.stopped or full or self.reader.stopped:
            events = [*events, *await self._policy.tokenizing(self.reader.finish)]
            self.ended = True  # only now does the reader know which ids count
            await self.stop()
        return events

    async def stop(self) -> None:
        """No more tokens are wanted."""
        await self._source.aclose()

    @property
    def kept(self) -> list[int]:
        """The ids behind what was said: a stop string cuts what follows it."""
        return self._tokens[: self.reader.kept] if self.ended else self._tokens

    @property
    def logprobs(self) -> list[float]:
        return self._logprobs[: len(self.kept)]

    @property
    def stop_reason(self) -> StopReason:
        return StopReason.STOP if self.stopped or self.reader.stopped else StopReason.LENGTH

    @property
    def stop_word(self) -> str:
        """As the table `samples` says it."""
        if self.stop_reason is StopReason.STOP:
            return "stop"
        return "context" if self._by_context else "length"


async def _kept(keeping: _Keeping, sampled: _Sampled, *, broken: str | None = None) -> None:
    """The answer is the agent's whether or not the disk takes it: it trains nothing then."""
    try:
        await keeping.keep(sampled, broken=broken)
    except StoreError as e:
        logger.warning("An answer could not be kept, and trains nothing: %s", e)


@dataclass(frozen=True, slots=True)
class _Keeping:
    """Where an answer goes once it is known."""

    policy: Policy
    asked: _Asked
    request: model.Request  # as the client sent it
    past: Past | None
    body: bytes
    fingerprint: str
    response_id: str

    async def keep(self, sampled: _Sampled, *, broken: str | None = None) -> None:
        """On disk when this returns. `broken`: why the reply has no end; None: it has. Raises StoreError."""
        asked, message = self.asked, sampled.reader.message if broken is None else None
        secret = await self.policy.tokenizing(self._holds_secret, sampled)
        not_a = broken or sampled.planned.not_a
        sampling = sampled.planned.sampling
        sample = samplefile.Sample(
            flow_id=asked.flow or "",
            created_at=time.time(),
            base_model=self.policy.sampler.base_model,
            tokenizer=self.fingerprint,
            version=sampled.version,
            checkpoint=sampled.checkpoint,
            klass="A" if not_a is None else "C",
            klass_reason=not_a,
            sampling={
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "max_tokens": sampling.max_tokens,
                "seed": sampling.seed,
                "stop": sampled.reader.stop_sequence,
            },
            prompt_ids=sampled.prompt.ids,
            tokens=sampled.kept,
            logprobs=sampled.logprobs,
            reused=sampled.prompt.reused_ids,
            segments=sampled.segments,
            stop_reason="aborted" if broken is not None else sampled.stop_word,
            malformed=broken is None and sampled.reader.malformed,
            redacted=secret,
        )
        reply = None
        if message is not None:
            reply = samplefile.Reply(reply_key(message), tuple(sampled.kept[: sampled.reader.shown]))
        await self.policy.memory.keep(asked.session, sample if asked.flow else None, reply, self._response(message), secret=secret)

    def _response(self, message: model.Message | None) -> samplefile.Response | None:
        """What a later `previous_response_id` refers to."""
        if message is None or self.request.dialect != "openai_responses" or self.asked.principal is None:
            return None
        principal, said = self.asked.principal, (*self.request.messages, message)
        if self.past is None:
            return samplefile.Response(self.response_id, principal, None, said)
        if self.past.ours:
            return samplefile.Response(self.response_id, principal, self.request.previous_response_id, said)
        return samplefile.Response(self.response_id, principal, None, samplefile.continued(self.past.messages, said))

    def _holds_secret(self, sampled: _Sampled) -> bool:
        """In the body, in what went before it, or in the reply."""
        before = b"" if self.past is None else dumps([pack_message(message) for message in self.past.messages]).encode()
        if redact(self.body)[1] or redact(before)[1]:
            return True
        said = self.policy.decoded(sampled.kept)
        return redact_text(said) != said


async def _to_its_end[T](work: Awaitable[T]) -> T:
    """Wait for `work` even if the one who waits is cancelled meanwhile; the cancellation comes after it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise
