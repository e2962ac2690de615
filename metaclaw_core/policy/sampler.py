"""Sampling from our versions through the Tinker SDK: the only module of the policy server that knows it.

Design: one SDK session and a sampling client per served version, made off the event loop, kept while the route names the
version and dropped after. A reply is sampled in segments: 64 tokens, then twice as many each time up to 1,024, each
continuing the very tokens before it. A model has no memory but its tokens, so this is exactly sampling in one go, and the
first words can be sent early. Replies end on token ids only.

The SDK retries by itself for minutes and waits for an unpaid bill for up to an hour; every call here has its own time
limit, and is cancelled when its caller goes away. What went wrong is a `SamplerError` with a kind that is one word.

Limits: a seed, where one is asked for, is counted up per segment, so that segments don't repeat the same draws; a seeded
reply is therefore not the one that a single call with that seed gives. A cancelled call may go on at the server until its
segment ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tinker
from tinker import types

from metaclaw_core.errors import MetaClawError
from metaclaw_core.policy.asked import Sampling

logger = logging.getLogger(__name__)

FIRST_SEGMENT = 64  # tokens
LONGEST_SEGMENT = 1024
CHECK_SECONDS = 5.0  # for a question that costs nothing
_ANEW = "The connection to the sampler was made anew; ask again."
LOAD_SECONDS = 60.0  # an answer that gets lost must not keep new weights from serving for ever
CLOSE_SECONDS = 1.0  # the server ends silent sessions by itself


class SamplerError(MetaClawError):
    """No (more) tokens. `kind`: "version" (not served any more), "weights" (served, but the server does not know them),
    "timeout", "down", "auth", "billing", "rate_limit" or "engine"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Segment:
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # natural, of the temperature sampled at; one per token
    stopped: bool  # the reply ended by itself with this segment


@dataclass(frozen=True, slots=True)
class Model:
    """What the server says of the base model."""

    tokenizer: Any  # of transformers
    max_context: int | None  # tokens, prompt and reply; None: it does not say


class Sampler:
    """One base model at one server. Used on one event loop."""

    def __init__(
        self, base_model: str, *, base_url: str | None = None, api_key: str | None = None, load_s: float = LOAD_SECONDS
    ) -> None:
        """None: what the SDK finds in its environment. `load_s`: seconds after which a version is tried to be loaded anew."""
        self.base_model = base_model
        self._load_s = load_s
        self._where: Any = {"base_url": base_url, "api_key": api_key}
        self._service: Any = None
        self._rest: Any = None
        self._paths: dict[int, str | None] = {}
        self._clients: dict[str | None, asyncio.Task[Any]] = {}  # by path; None: the base model
        self._told: dict[str | None, str] = {}

    async def open(self) -> Model:
        """Connect, or connect anew, and load the tokenizer. Raises SamplerError. Takes as long as the SDK tries."""
        await self.close()
        with _named(self.base_model):
            self._service, self._rest = await asyncio.to_thread(self._connect)
            base = await self._client(None)
            tokenizer = await asyncio.to_thread(base.get_tokenizer)
            served = (await self._rest.get_server_capabilities()).supported_models
        found = next((m for m in served if m.model_name == self.base_model), None)
        for path in set(self._paths.values()):
            self._client(path)
        return Model(tokenizer, found.max_context_length if found is not None else None)

    def _connect(self) -> tuple[Any, Any]:
        # The SDK keeps the connections behind a RestClient for the life of the process, whoever made it.
        return tinker.ServiceClient(**self._where), self._rest or tinker.RestClient(**self._where)

    async def close(self) -> None:
        for task in self._clients.values():
            task.cancel()
        self._clients.clear()
        service, self._service = self._service, None
        if service is not None:
            with contextlib.suppress(Exception):  # it may be what just broke
                await asyncio.wait_for(service.close("success"), CLOSE_SECONDS)

    def serve(self, versions: Mapping[int, str | None]) -> None:
        """From now on these, number → path (None: the base model), and no others. Clients are made in the background; one
        that could not be made is tried again at each call."""
        self._paths = dict(versions)
        wanted = {*self._paths.values(), None}
        for path in [path for path in self._clients if path not in wanted]:
            self._clients.pop(path).cancel()
        if self._service is not None:
            for path in wanted:
                self._client(path)

    @property
    def versions(self) -> tuple[int, ...]:
        """Those that can be sampled from now."""
        return tuple(sorted(version for version, path in self._paths.items() if self._is_loaded(path)))

    def path_of(self, version: int) -> str | None:
        """None: the base model. Raises SamplerError for a version that is not served."""
        try:
            return self._paths[version]
        except KeyError:
            raise SamplerError("version", f"Version {version} is not served any more.") from None

    def _is_loaded(self, path: str | None) -> bool:
        task = self._clients.get(path)
        return task is not None and task.done() and not task.cancelled() and task.exception() is None

    def _client(self, path: str | None) -> asyncio.Task[Any]:
        """The client of a path in the making, or made. One that failed is tried again."""
        task = self._clients.get(path)
        if task is None or (task.done() and not self._is_loaded(path)):
            task = self._clients[path] = asyncio.ensure_future(self._make(path))
            task.add_done_callback(lambda done: self._heard(path, done))
        return task

    def _heard(self, path: str | None, task: asyncio.Task[Any]) -> None:
        """Say once what is wrong with a version."""
        error = None if task.cancelled() else task.exception()
        if error is None:
            self._told.pop(path, None)
        elif self._told.get(path) != str(error):
            self._told[path] = str(error)
            logger.warning("%s can't be sampled from: %s: %s", path or self.base_model, type(error).__name__, error)

    async def _make(self, path: str | None) -> Any:
        where = {"base_model": self.base_model} if path is None else {"model_path": path}
        try:
            async with asyncio.timeout(self._load_s):
                future = await asyncio.to_thread(self._service.create_sampling_client, **where)  # the first call makes the session
                return await future
        except TimeoutError:
            raise SamplerError("timeout", f"The sampler was not ready for it in {self._load_s:g} s.") from None

    async def _made(self, path: str | None) -> Any:
        making = self._client(path)
        await asyncio.wait((making,))  # not `await making`: to be cancelled here must not cancel what others wait for
        if making.cancelled():
            raise SamplerError("down", _ANEW)
        return making.result()

    async def check(self) -> None:
        """Does the server answer? Costs nothing. Raises SamplerError."""
        if self._rest is None:
            raise SamplerError("down", "There is no connection to the sampler yet.")
        with _named(self.base_model):
            await asyncio.wait_for(self._rest.get_server_capabilities(), CHECK_SECONDS)

    async def probe(self, ids: Sequence[int]) -> None:
        """One token of the base model after `ids`. Raises SamplerError; without a time limit."""
        with _named(self.base_model):
            await self._segment(None, list(ids), Sampling(1), 0, 1, ())

    async def sample(
        self, version: int, prompt: Sequence[int], sampling: Sampling, stop_ids: Sequence[int]
    ) -> AsyncGenerator[Segment]:
        """Segments until the reply ends or has `sampling.max_tokens`. Raises SamplerError; without a time limit."""
        path = self.path_of(version)
        ids, done, size = list(prompt), 0, FIRST_SEGMENT
        for count in range(sampling.max_tokens):
            with _named(path or self.base_model):
                segment = await self._segment(path, ids, sampling, count, min(size, sampling.max_tokens - done), stop_ids)
            yield segment
            done += len(segment.tokens)
            if segment.stopped or done >= sampling.max_tokens:
                return
            ids += segment.tokens
            size = min(2 * size, LONGEST_SEGMENT)

    async def _segment(
        self, path: str | None, ids: list[int], sampling: Sampling, count: int, size: int, stop_ids: Sequence[int]
    ) -> Segment:
        if self._service is None:
            raise SamplerError("down", "There is no connection to the sampler yet.")
        client = await self._made(path)
        asked = types.SamplingParams(
            max_tokens=size,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=None if sampling.seed is None else (sampling.seed + count) % 2**31,
            stop=list(stop_ids),
        )
        try:
            sequence = (await client.sample(types.ModelInput.from_ints(ids), 1, asked)).sequences[0]
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            raise SamplerError("down", _ANEW) from None  # the SDK gave up, not our caller
        tokens, logprobs = tuple(map(int, sequence.tokens)), sequence.logprobs
        if logprobs is None or len(logprobs) != len(tokens):
            given = "none" if logprobs is None else len(logprobs)
            raise SamplerError("engine", f"The sampler gave {len(tokens)} tokens and {given} logprobs.")
        stopped = sequence.stop_reason == "stop"
        if not stopped and not tokens:
            raise SamplerError("engine", "The sampler gave no token and no reason to stop.")
        return Segment(tokens, tuple(map(float, logprobs)), stopped)


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """What the SDK raises, as a SamplerError."""
    try:
        yield
    except SamplerError:
        raise
    except Exception as e:
        word, text = _explained(e, what)
        raise SamplerError(word, text) from e


def _explained(error: Exception, what: str) -> tuple[str, str]:
    match error:
        case TimeoutError() | tinker.APITimeoutError():
            return "timeout", f"The sampler did not answer in time for {what}."
        case tinker.APIConnectionError():
            return "down", "The sampler can't be reached: is the engine running, is rl.tinker_base_url right?"
        case tinker.AuthenticationError() | tinker.PermissionDeniedError():
            return "auth", "The sampler refuses the key: check rl.tinker_api_key."
        case tinker.BillingError():
            return "billing", "The sampler wants to be paid first (status 402)."
        case tinker.RateLimitError():
            return "rate_limit", "The sampler asks to be called less often (status 429)."
        case tinker.NotFoundError():
            return "weights", f"The sampler does not know {what}: {error}"
        case _:
            return "engine", f"The sampler failed for {what}: {type(error).__name__}: {error}"
