"""The training server behind the Tinker SDK: the only module of `learn` that knows it.

Design: plain arrays in and out, one coroutine a call, each with a time limit longer than the SDK's own retries (five minutes)
and shorter than its wait for an unpaid bill (an hour). The client of a state is kept as long as the next step begins there;
whatever goes wrong in a step drops it, because the server may have taken a part of it, and the next one is opened from what was
saved. What the SDK does without a time limit (it opens its session on first use, and waits for a bill even then) has a thread of
its own that nothing waits for, neither the loop nor the end of the process. The first adapter is made with a fixed seed, so a first step that is done again is the same step.

What the SDK raises becomes a `ServerError` with a kind that is one word; none of it is retried here. It waits for an unpaid bill
without a word, so where a call ran out of time the server is asked once whether it serves us at all: a person has to know.

Limits: one model and one run at a time. The SDK's telemetry is its own affair (TINKER_TELEMETRY=0 turns it off).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tinker
from numpy.typing import NDArray
from tinker import types

from metaclaw_core.errors import MetaClawError
from metaclaw_core.learn.batch import Datum, Float32
from metaclaw_core.learn.losses import Call, Inputs

SEED = 0
TIMEOUT = 600.0  # seconds for one call
_CLOSE_SECONDS = 5.0
_ASK_SECONDS = 10.0  # for the question after a call that ran out of time
_REFUSALS = (tinker.BadRequestError, tinker.UnprocessableEntityError)
_ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "grad_clip_norm": 1.0}  # eps: the SDK's 1e-12 turns rounding noise into steps


class ServerError(MetaClawError):
    """A call failed. `kind`: "timeout", "down", "auth", "billing", "rate_limit", "missing" (unknown path), "refused" (this very
    call can't be served, and trying again changes nothing) or "server"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Sampled:
    tokens: tuple[int, ...]
    logprobs: Float32  # (T,)
    stopped: bool  # by itself, not by max_tokens


class TrainingServer:
    """One base model at one server. Used on one event loop; close it with `aclose`."""

    def __init__(
        self, base_model: str, *, base_url: str | None = None, api_key: str | None = None, lora_rank: int = 32, timeout_s: float = TIMEOUT
    ) -> None:
        """None: what the SDK finds in its environment."""
        self.base_model = base_model
        self._where: Any = {"base_url": base_url, "api_key": api_key}
        self._rank = lora_rank
        self._timeout_s = timeout_s
        self._service: Any = None
        self._rest: Any = None
        self._training: Any = None
        self._at: tuple[str | None] | None = None  # the saved state that the client is at; None: it is at none
        self._samplers: dict[str | None, Any] = {}
        self._sampling = asyncio.Lock()

    # --- training -----------------------------------------------------------------------------

    async def open(self, state_path: str | None) -> None:
        """Be at a saved state, optimiser included; None: at the beginning."""
        if self._training is not None and self._at == (state_path,):
            return
        self.drop()
        service = await self._connected()
        if state_path is None:
            made = self._made(service.create_lora_training_client, self.base_model, rank=self._rank, seed=SEED)
        else:
            made = self._made(service.create_training_client_from_state_with_optimizer, state_path)
        self._training = await self._wait(made, state_path or self.base_model)
        self._at = (state_path,)

    def drop(self) -> None:
        """Forget the client: where it stands is not known any more."""
        self._training = self._at = None

    async def forward(self, datums: Sequence[Datum]) -> list[Float32]:
        """(N,) logprobs of each datum's targets by the present weights."""
        data = [_datum(d.input_ids, target_tokens=d.targets, weights=d.mask) for d in datums]
        found = await self._wait(self._training.forward(data, "cross_entropy"), "a forward pass")
        return [np.asarray(out["logprobs"].to_numpy(), dtype=np.float32) for out in found.loss_fn_outputs]

    async def step(self, call: Call, learning_rate: float) -> dict[str, float]:
        """One forward_backward and one optimiser step; the server's metrics. After it the client is at no saved state."""
        self._at = None
        data = [_of(inputs) for inputs in call.inputs]
        found = await self._wait(self._training.forward_backward(data, call.loss, dict(call.config) or None), "a backward pass")
        await self._wait(self._training.optim_step(types.AdamParams(learning_rate=learning_rate, **_ADAM)), "an optimiser step")
        return {name: float(value) for name, value in (found.metrics or {}).items()}

    async def save_state(self, name: str, ttl_seconds: int | None = None) -> str:
        """Weights and optimiser; their path. A state of that name is replaced: it is of the same step, done again."""
        saved = await self._wait(self._training.save_state(name, ttl_seconds=ttl_seconds, overwrite=True), f"saving {name}")
        self._at = (str(saved.path),)
        return str(saved.path)

    async def save_weights(self, name: str, ttl_seconds: int | None = None) -> str:
        """Weights to sample from; their path. It ends in letters by chance: such a name can't be used twice."""
        made = self._training.save_weights_for_sampler(f"{name}-{secrets.token_hex(3)}", ttl_seconds=ttl_seconds)
        saved = await self._wait(made, f"saving {name}")
        return str(saved.path)

    async def keep(self, path: str, ttl_seconds: int | None) -> None:
        """Let what is saved at `path` live for so long from now; None: for good."""
        await self._connected()
        await self._wait(self._rest.set_checkpoint_ttl_from_tinker_path(path, ttl_seconds), path)

    # --- sampling, for checks and siblings ------------------------------------------------------

    async def tokenizer(self) -> Any:
        sampler = await self._sampler(None)
        return await self._wait(_aside(sampler.get_tokenizer), f"the tokenizer of {self.base_model}")

    async def sample(self, path: str | None, prompt: Sequence[int], *, n: int, max_tokens: int, stop_ids: Sequence[int]) -> list[Sampled]:
        """`n` replies at T=1 from the weights at `path`; None: the base model."""
        sampler = await self._sampler(path)
        asked = types.SamplingParams(max_tokens=max_tokens, temperature=1.0, top_p=1.0, top_k=-1, stop=list(stop_ids) or None)
        found = await self._wait(sampler.sample(types.ModelInput.from_ints(list(prompt)), n, asked), path or self.base_model)
        replies = []
        for sequence in found.sequences:
            logprobs = np.asarray(sequence.logprobs if sequence.logprobs is not None else [], dtype=np.float32)
            if len(logprobs) != len(sequence.tokens):
                raise ServerError("server", f"{len(sequence.tokens)} tokens came with {len(logprobs)} logprobs.")
            replies.append(Sampled(tuple(map(int, sequence.tokens)), logprobs, sequence.stop_reason == "stop"))
        return replies

    async def logprobs(self, path: str | None, ids: Sequence[int], last: int) -> Float32:
        """(last,) of the last tokens of `ids` by the weights at `path`. Raises ServerError also where one is missing."""
        sampler = await self._sampler(path)
        scores = await self._wait(
            sampler.compute_logprobs(types.ModelInput.from_ints(list(ids)), prompt_logprobs_last_n=last), path or self.base_model
        )
        tail = scores[-last:]
        if len(tail) != last or any(score is None for score in tail):
            raise ServerError("server", f"{last} logprobs were asked for and not all came.")
        return np.asarray(tail, dtype=np.float32)

    async def _sampler(self, path: str | None) -> Any:
        async with self._sampling:  # who asks for the same weights meanwhile shares the client
            if path not in self._samplers:
                service = await self._connected()
                where = {"base_model": self.base_model} if path is None else {"model_path": path}
                if len(self._samplers) > 8:  # of versions long gone
                    self._samplers.clear()
                self._samplers[path] = await self._wait(self._made(service.create_sampling_client, **where), path or self.base_model)
            return self._samplers[path]

    # --- connection ---------------------------------------------------------------------------

    async def _connected(self) -> Any:
        if self._service is None:
            with _named(self.base_model):
                self._service, self._rest = await asyncio.wait_for(_aside(self._connect), self._timeout_s)
        return self._service

    def _connect(self) -> tuple[Any, Any]:
        # The SDK keeps the connections behind a RestClient for the life of the process, whoever made it: it is never closed.
        return tinker.ServiceClient(**self._where), self._rest or tinker.RestClient(**self._where)

    async def _made(self, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A client of the service. The SDK's first call waits for the session, which must not hold up the loop."""
        return await (await _aside(lambda: make(*args, **kwargs)))

    async def aclose(self) -> None:
        """The next call connects anew."""
        self.drop()
        self._samplers.clear()
        service, self._service = self._service, None
        if service is not None:
            with contextlib.suppress(Exception):  # it may be what just broke; the server ends silent sessions by itself
                # Even `close` waits for a session that is still being opened.
                await asyncio.wait_for(_aside(lambda: service.close("success").result(_CLOSE_SECONDS)), min(_CLOSE_SECONDS, self._timeout_s))

    async def _wait(self, future: Any, what: str) -> Any:
        try:
            with _named(what):
                return await asyncio.wait_for(future, self._timeout_s)
        except ServerError as e:
            if e.kind == "timeout":
                await self._may_ask(what)
            raise

    async def _may_ask(self, what: str) -> None:
        """Raises ServerError where the server says at once why it does not serve us: the bill, the key."""
        try:
            await asyncio.wait_for(_aside(self._ask_once), min(_ASK_SECONDS, self._timeout_s))
        except Exception as e:
            kind, sentence = explained(e, what)
            if kind in ("billing", "auth"):
                raise ServerError(kind, sentence) from e

    def _ask_once(self) -> None:
        service = tinker.ServiceClient(**self._where)
        try:
            # The SDK's own check of an account; what is public of it takes no address. Every other call waits while a bill is open.
            service._check_accessible()
        finally:
            service.close("success").result(_CLOSE_SECONDS)


async def _aside[T](work: Callable[[], T]) -> T:
    """What `work` gives, from a daemon thread. The loop's own threads are few, and at its end it waits for them."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work())
            except Exception as e:  # noqa: BLE001 - it is handed on
                future.set_exception(e)

    threading.Thread(target=run, name="tinker", daemon=True).start()
    return await asyncio.wrap_future(future)


def _datum(input_ids: NDArray[np.int32], **inputs: NDArray[Any]) -> types.Datum:
    return types.Datum(model_input=types.ModelInput.from_ints(input_ids.tolist()), loss_fn_inputs=inputs)


def _of(inputs: Inputs) -> types.Datum:
    return _datum(inputs.input_ids, target_tokens=inputs.targets, logprobs=inputs.logprobs, advantages=inputs.advantages)


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """What the SDK raises, as a ServerError."""
    try:
        yield
    except ServerError:
        raise
    except Exception as e:
        raise ServerError(*explained(e, what)) from e


def explained(error: Exception, what: str) -> tuple[str, str]:
    """Kind and sentence of what the SDK raised while doing `what`. Some of its errors stand for another one, their cause."""
    kinds: Mapping[type[Exception] | tuple[type[Exception], ...], tuple[str, str]] = {
        (TimeoutError, tinker.APITimeoutError): ("timeout", "The training server did not answer in time"),
        tinker.APIConnectionError: ("down", "The training server can't be reached: is the engine running, is rl.tinker_base_url right?"),
        (tinker.AuthenticationError, tinker.PermissionDeniedError): ("auth", "The training server refuses the key: check rl.tinker_api_key"),
        tinker.BillingError: ("billing", "The training server wants to be paid first (status 402)"),
        tinker.RateLimitError: ("rate_limit", "The training server asks to be called less often (status 429)"),
        tinker.NotFoundError: ("missing", "The training server does not know it"),
    }
    said = f"The training server failed ({what}): {type(error).__name__}: {error}"
    found: BaseException | None = error
    while found is not None:
        for classes, (kind, text) in kinds.items():
            if isinstance(found, classes):
                return kind, f"{text} ({what})."
        if isinstance(found, _REFUSALS) or (isinstance(found, tinker.RequestFailedError) and found.category == "user"):
            return "refused", said
        found = found.__cause__ or found.__context__
    return "server", said
