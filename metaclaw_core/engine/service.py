"""What the engine knows of its clients: sessions, models in training, samplers; and the operations on them.

Design: methods run on the event loop and return at once. Work is handed to the worker; its result goes into
`Futures` under an id made of the client's own sequence number. Nothing is shared between sessions but the base model
and the checkpoints. A session's models and samplers are freed when it finishes, or, at the next session's start, when
it was silent for `SESSION_SILENCE` seconds (the SDK sends a heartbeat every 10 s). Requests are executed in the order
of arrival; the SDK is told to send the chunks of one call one after the other, so this is its own order.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from metaclaw_core.engine import protocol
from metaclaw_core.engine.checkpoints import About, Checkpoint, Checkpoints, Place
from metaclaw_core.engine.errors import EngineError, NotFoundError
from metaclaw_core.engine.futures import Futures, Reply
from metaclaw_core.engine.lora import Adapter, LoraConfig
from metaclaw_core.engine.model import BaseModel
from metaclaw_core.engine.sampling import Sampled, SampleRequest
from metaclaw_core.engine.training import Trainee
from metaclaw_core.engine.worker import Worker

SESSION_SILENCE = 900.0  # seconds
ADAPTERS_CACHED = 8  # checkpoints kept loaded for requests by path
log = logging.getLogger(__name__)


@dataclass
class Session:
    user_metadata: Mapping[str, Any] | None
    last_seen: float
    models: set[str] = field(default_factory=set)
    samplers: set[str] = field(default_factory=set)


@dataclass
class Model:
    trainee: Trainee
    created: float
    """Unix seconds."""
    user_metadata: Mapping[str, Any] | None


@dataclass(frozen=True)
class Sampler:
    adapter: Adapter | None
    """None: the base model."""
    model_path: str | None


class Engine:
    def __init__(
        self,
        base: BaseModel,
        checkpoints: Checkpoints,
        *,
        prefix_bytes: int = 2**31,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.base = base
        self.checkpoints = checkpoints
        self.futures = Futures()
        self.worker = Worker(base, prefix_bytes)
        self._clock = clock
        self._sessions: dict[str, Session] = {}
        self._models: dict[str, Model] = {}
        self._samplers: dict[str, Sampler] = {}
        self._loaded: dict[str, tuple[float, Adapter]] = {}  # path → (created, adapter); least recently used first
        self._loading = asyncio.Lock()
        self._running: dict[str, Callable[[Sampled | Exception], None]] = {}
        self._loop = asyncio.get_running_loop()
        self.worker.start()

    def close(self) -> None:
        self.worker.stop()

    # Sessions

    def create_session(self, user_metadata: Mapping[str, Any] | None) -> str:
        self._sweep()
        session_id = str(uuid.uuid4())
        self._sessions[session_id] = Session(user_metadata, self._clock())
        return session_id

    def heartbeat(self, session_id: str) -> None:
        self._session(session_id)

    def finish(self, session_id: str) -> None:
        """Free what the session held; finishing twice is fine."""
        if session := self._sessions.pop(session_id, None):
            for model_id in session.models:
                if model := self._models.pop(model_id, None):
                    self.worker.forget(model.trainee.adapter)
            for sampler_id in session.samplers:
                sampler = self._samplers.pop(sampler_id, None)
                if sampler and sampler.adapter and not self._is_loaded(sampler.adapter):
                    self.worker.forget(sampler.adapter)

    def _sweep(self) -> None:
        for session_id, session in list(self._sessions.items()):
            if session.last_seen < self._clock() - SESSION_SILENCE:
                self.finish(session_id)

    def _session(self, session_id: str) -> Session:
        session = self._sessions.get(session_id)
        if session is None:
            raise NotFoundError(f"The session {session_id} is not known here, or it has ended.")
        session.last_seen = self._clock()
        return session

    # Models in training

    def create_model(self, request: protocol.CreateModel) -> str:
        self._check_base(request.base_model)
        _check_optimizer(request.optimizer_config)
        self._session(request.session_id)
        model_id = f"{request.session_id}:train:{request.model_seq_id}"
        config = LoraConfig(**(request.lora_config or protocol.CreateModel.Lora()).model_dump())

        def work() -> Reply:
            self._adopt(model_id, self.base.lora.new(config, self.base.device), request.user_metadata)
            return protocol.json_reply({"model_id": model_id, "type": "create_model"})

        return self._submit(f"{model_id}:create", work)

    def load_weights(self, request: protocol.LoadWeights) -> str:
        """A new model from a saved state, or (as older SDKs ask) a state into an existing model."""
        if request.base_model is not None:
            self._check_base(request.base_model)
        _check_optimizer(request.optimizer_config)
        place = Place.parse(request.path)
        if place.kind != "weights":
            raise EngineError(f"{request.path} holds weights for sampling; training goes on from …/weights/… only.")
        self.checkpoints.get(place)
        if request.session_id is not None and request.model_seq_id is not None:
            self._session(request.session_id)
            model_id, suffix = f"{request.session_id}:train:{request.model_seq_id}", "create"
        elif request.model_id is not None:
            self.model(request.model_id)
            model_id, suffix = request.model_id, str(request.seq_id)
        else:
            raise EngineError("load_weights needs session_id and model_seq_id, or model_id.")

        def work() -> Reply:
            checkpoint, tensors = self._load(place)
            adapter = self.base.lora.adopt(checkpoint.about.lora, tensors)
            model = self._adopt(model_id, adapter, request.user_metadata)
            if request.optimizer:
                if not checkpoint.about.has_optimizer:
                    raise EngineError(f"{place.path} was saved before the first optim_step: it has no optimizer state.")
                model.trainee.restore_optimizer(tensors)
            return protocol.json_reply({"path": request.path, "model_id": model_id, "type": "load_weights"})

        return self._submit(f"{model_id}:{suffix}", work)

    def forward_backward(self, body: bytes) -> str:
        request = protocol.parse_training(body)

        def work() -> Reply:
            model = self.model(request.model_id)
            data, loss, config = protocol.training_data(request, self.base.vocab_size)
            for i, datum in enumerate(data):
                if datum.tokens.size > self.base.max_context:
                    raise EngineError(f"datum {i} has {datum.tokens.size} tokens; the model takes {self.base.max_context}.")
            outcome = model.trainee.forward_backward(data, loss, config, backward=not request.forward_only)
            return protocol.training_reply(outcome)

        return self._submit(self._request_id(request.model_id, request.seq_id), work)

    def optim_step(self, request: protocol.OptimStep) -> str:
        def work() -> Reply:
            metrics = self.model(request.model_id).trainee.optim_step(request.step())
            return protocol.json_reply({"metrics": metrics, "type": "optim_step"})

        return self._submit(self._request_id(request.model_id, request.seq_id), work)

    def save_weights(self, request: protocol.SaveWeights) -> str:
        def work() -> Reply:
            trainee = self.model(request.model_id).trainee
            optimizer = trainee.optimizer_tensors()
            place = self._save(request, "weights", trainee, optimizer)
            return protocol.json_reply({"path": place.path, "type": "save_weights"})

        return self._submit(self._request_id(request.model_id, request.seq_id), work)

    def save_weights_for_sampler(self, request: protocol.SaveWeights) -> str:
        """With a name: a checkpoint. Without: a sampling session of the weights as they are, kept in memory."""

        def work() -> Reply:
            trainee = self.model(request.model_id).trainee
            if request.path is not None:
                place = self._save(request, "sampler_weights", trainee, {})
                return protocol.json_reply({"path": place.path, "type": "save_weights_for_sampler"})
            session_id = _owner(request.model_id)
            sampler_id = f"{session_id}:sample:{request.sampling_session_seq_id}"
            self._open_sampler(session_id, sampler_id, Sampler(trainee.adapter.snapshot(self.base.dtype), None))
            return protocol.json_reply({"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"})

        return self._submit(self._request_id(request.model_id, request.seq_id), work)

    def model(self, model_id: str) -> Model:
        """Raises NotFoundError."""
        model = self._models.get(model_id)
        if model is None:
            raise NotFoundError(f"The model {model_id} is not in training here; resume it from a saved state.")
        self._session(_owner(model_id))
        return model

    def live_models(self) -> Mapping[str, Model]:
        return dict(self._models)

    # Samplers

    async def create_sampling_session(self, request: protocol.CreateSamplingSession) -> str:
        sampler = Sampler(await self.adapter_of(request.model_path, request.base_model), request.model_path)
        sampler_id = f"{request.session_id}:sample:{request.sampling_session_seq_id}"
        self._open_sampler(request.session_id, sampler_id, sampler)
        return sampler_id

    def sampler(self, sampler_id: str) -> Sampler:
        sampler = self._samplers.get(sampler_id)
        if sampler is None:
            raise NotFoundError(f"The sampling session {sampler_id} is not known here, or its session has ended.")
        return sampler

    async def sample(self, request: protocol.Sample) -> tuple[str, list[str]]:
        """The request's id and the ids of its sequences."""
        if request.sampling_session_id is not None:
            adapter = self.sampler(request.sampling_session_id).adapter
            request_id = self._request_id(request.sampling_session_id, request.seq_id)
        else:
            adapter = await self.adapter_of(request.model_path, request.base_model)
            request_id = str(uuid.uuid4())
        for name in ("target_prompt_logprobs", "prompt_alt_tokens_k", "record_stability_info"):
            if getattr(request, name):
                raise EngineError(f"The engine doesn't serve {name}.")
        work = self.sample_request(request)
        if self.futures.open(request_id):

            def answer(result: Sampled | Exception) -> None:
                self._tell(request_id, result if isinstance(result, Exception) else protocol.sample_reply(result))

            self._running[request_id] = answer
            self.worker.sample(adapter, work, answer)
        return request_id, [f"{request_id}:{i}" for i in range(request.num_samples)]

    def cancel(self, request_id: str) -> None:
        if answer := self._running.pop(request_id, None):
            self.worker.cancel(answer)
            self.futures.drop(request_id)

    def sample_request(self, request: protocol.Sample) -> SampleRequest:
        """Checked against the model. Raises EngineError."""
        params, prompt = request.sampling_params, request.prompt.tokens()
        if prompt.size == 0:
            raise EngineError("The prompt is empty.")
        if prompt.min() < 0 or prompt.max() >= self.base.vocab_size:
            raise EngineError(f"The prompt has an id outside 0…{self.base.vocab_size - 1}.")
        if prompt.size > self.base.max_context:
            raise EngineError(f"The prompt has {prompt.size} tokens; the model takes {self.base.max_context}.")
        if params.max_tokens is not None and params.max_tokens < 1:
            raise EngineError("max_tokens must be 1 or more.")
        last_n, score_from = request.prompt_logprobs_last_n, None
        if last_n is not None and not last_n < prompt.size:
            raise EngineError(f"prompt_logprobs_last_n is {last_n}; the prompt has {prompt.size} tokens.")
        if (request.prompt_logprobs or request.topk_prompt_logprobs) and prompt.size > 1:
            score_from = prompt.size - last_n if last_n is not None else 1
        room = max(1, self.base.max_context - prompt.size)
        stop = [params.stop] if isinstance(params.stop, str) else params.stop
        return SampleRequest(
            prompt=prompt,
            samples=request.num_samples,
            max_tokens=min(params.max_tokens or room, room),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            stop_ids=self.base.eos if stop is None else frozenset(x for x in stop if isinstance(x, int)),
            stop_texts=tuple(x for x in stop or () if isinstance(x, str) and x),
            seed=params.seed,
            score_from=score_from,
            top_prompt=min(request.topk_prompt_logprobs, self.base.vocab_size),
            top_sampled=min(request.topk_sample_logprobs, self.base.vocab_size),
        )

    async def adapter_of(self, model_path: str | None, base_model: str | None) -> Adapter | None:
        """The weights of a checkpoint path, or None for the base model. Raises NotFoundError, EngineError."""
        if model_path is None:
            self._check_base(base_model)
            return None
        place = Place.parse(model_path)
        async with self._loading:
            created = self.checkpoints.get(place).about.created
            found = self._loaded.pop(model_path, None)
            if found is None or found[0] != created:
                # Not on the worker: a reader need not wait for a training call.
                found = created, await asyncio.to_thread(self._load_for_sampling, place)
            self._loaded[model_path] = found
            if len(self._loaded) > ADAPTERS_CACHED:
                self._loaded.pop(next(iter(self._loaded)))
            return found[1]

    # Shared

    def _load_for_sampling(self, place: Place) -> Adapter:
        checkpoint, tensors = self._load(place)
        return self.base.lora.adopt(checkpoint.about.lora, tensors).snapshot(self.base.dtype)

    def _open_sampler(self, session_id: str, sampler_id: str, sampler: Sampler) -> None:
        self._session(session_id).samplers.add(sampler_id)
        self._samplers[sampler_id] = sampler

    def _is_loaded(self, adapter: Adapter) -> bool:
        return any(loaded is adapter for _, loaded in self._loaded.values())

    def _adopt(self, model_id: str, adapter: Adapter, metadata: Mapping[str, Any] | None) -> Model:
        self._session(_owner(model_id)).models.add(model_id)
        model = self._models[model_id] = Model(Trainee(self.base, adapter), self._clock(), metadata)
        return model

    def _load(self, place: Place) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
        checkpoint, tensors = self.checkpoints.load(place, self.base.device)
        if checkpoint.about.base_model != self.base.name:
            raise EngineError(f"{place.path} belongs to {checkpoint.about.base_model}; this engine serves {self.base.name}.")
        return checkpoint, tensors

    def _save(
        self, request: protocol.SaveWeights, kind: str, trainee: Trainee, optimizer: Mapping[str, torch.Tensor]
    ) -> Place:
        if request.path is None:
            raise EngineError("save_weights needs a name.")
        place = Place(request.model_id, kind, request.path)
        about = About(self.base.name, trainee.adapter.config, self._clock(), bool(optimizer), request.user_metadata)
        self.checkpoints.save(
            place,
            about,
            {**trainee.adapter.tensors(), **optimizer},
            ttl=request.ttl_seconds,
            overwrite=request.overwrite,
        )
        return place

    def _check_base(self, name: str | None) -> None:
        if name is not None and name.partition(":")[0] != self.base.name.partition(":")[0]:
            raise NotFoundError(f"The model {name} is not served here; this engine serves {self.base.name}.")

    def _request_id(self, owner: str, seq_id: int | None) -> str:
        return f"{owner}:{seq_id}" if seq_id is not None else str(uuid.uuid4())

    def _submit(self, request_id: str, work: Callable[[], Reply]) -> str:
        if self.futures.open(request_id):
            self.worker.call(work, lambda result: self._tell(request_id, result))
        return request_id

    def _tell(self, request_id: str, result: Reply | Exception) -> None:
        """Called on the worker's thread."""
        reply = _failure(result) if isinstance(result, Exception) else result

        def on_loop() -> None:
            self._running.pop(request_id, None)
            self.futures.resolve(request_id, reply)

        self._loop.call_soon_threadsafe(on_loop)


def _owner(model_id: str) -> str:
    """The session of a model."""
    return model_id.partition(":")[0]


def _check_optimizer(config: Mapping[str, Any] | None) -> None:
    if config and config.get("type", "adamw") != "adamw":
        raise EngineError(f"The optimizer {config['type']!r} is not served here; the engine knows adamw.")


def _failure(error: Exception) -> Reply:
    if isinstance(error, EngineError):
        return protocol.json_reply({"error": str(error), "category": error.category})
    log.error("A request failed in the engine", exc_info=error)
    return protocol.json_reply({"error": f"{type(error).__name__} in the engine: {error}", "category": "server"})
