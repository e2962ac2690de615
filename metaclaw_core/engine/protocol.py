"""The Tinker wire format: JSON requests checked, protobuf in and out.

Design: unknown JSON fields are ignored, so that a newer SDK's additions do no harm until they matter. Two messages
are protobuf (mandatory since SDK 0.25): forward_backward in, its result and the sample result out. The classes come
with the SDK. Arrays travel as raw little-endian bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tinker.proto import tinker_public_pb2 as pb

from metaclaw_core.engine.errors import EngineError
from metaclaw_core.engine.futures import Reply
from metaclaw_core.engine.losses import Loss, find_loss
from metaclaw_core.engine.sampling import Sampled
from metaclaw_core.engine.training import AdamStep, Datum, Outcome

PROTOBUF = "application/x-protobuf"
_EMPTY_LOGPROB = -99999.0  # what the SDK documents for cells of a top-k table that hold nothing


class _Wire(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class CreateModel(_Wire):
    class Lora(_Wire):
        rank: int = 32
        seed: int | None = None
        train_unembed: bool = True
        train_mlp: bool = True
        train_attn: bool = True

    session_id: str
    model_seq_id: int
    base_model: str
    lora_config: Lora | None = None
    optimizer_config: dict[str, Any] | None = None
    user_metadata: dict[str, Any] | None = None


class LoadWeights(_Wire):
    path: str
    optimizer: bool
    session_id: str | None = None
    model_seq_id: int | None = None
    model_id: str | None = None
    seq_id: int | None = None
    base_model: str | None = None
    optimizer_config: dict[str, Any] | None = None
    user_metadata: dict[str, Any] | None = None


class OptimStep(_Wire):
    class Adam(_Wire):
        learning_rate: float = 1e-4
        beta1: float = 0.9
        beta2: float = 0.95
        eps: float = 1e-12
        weight_decay: float = 0.0
        grad_clip_norm: float = 0.0

    model_id: str
    seq_id: int | None = None
    adam_params: Adam | None = None

    def step(self) -> AdamStep:
        if self.adam_params is None:
            raise EngineError("The engine knows AdamW only: give adam_params.")
        p = self.adam_params
        return AdamStep(p.learning_rate, p.beta1, p.beta2, p.eps, p.weight_decay, p.grad_clip_norm)


class SaveWeights(_Wire):
    """Both kinds of save."""

    model_id: str
    seq_id: int | None = None
    path: str | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None
    sampling_session_seq_id: int | None = None


class CreateSamplingSession(_Wire):
    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None


class SamplingParams(_Wire):
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = Field(1.0, ge=0)
    top_k: int = -1
    top_p: float = Field(1.0, gt=0, le=1)


class Prompt(_Wire):
    class Chunk(_Wire):
        type: str = "encoded_text"
        tokens: list[int] = []

    chunks: list[Chunk]

    def tokens(self) -> NDArray[np.int32]:
        if odd := {chunk.type for chunk in self.chunks} - {"encoded_text"}:
            raise EngineError(f"The engine reads text tokens only, not {', '.join(sorted(odd))}.")
        return np.asarray([token for chunk in self.chunks for token in chunk.tokens], dtype=np.int32)


class Sample(_Wire):
    prompt: Prompt
    sampling_params: SamplingParams
    num_samples: int = Field(1, ge=1, le=4096)
    sampling_session_id: str | None = None
    seq_id: int | None = None
    base_model: str | None = None
    model_path: str | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = Field(0, ge=0, le=1000)
    topk_sample_logprobs: int = Field(0, ge=0, le=1000)
    prompt_logprobs_last_n: int | None = Field(None, ge=1)
    target_prompt_logprobs: dict[str, Any] | None = None
    prompt_alt_tokens_k: int = 0
    record_stability_info: bool | None = None


def parse[M: _Wire](model: type[M], body: bytes | Mapping[str, Any]) -> M:
    """Raises EngineError that names the field."""
    try:
        return model.model_validate_json(body) if isinstance(body, bytes) else model.model_validate(body)
    except ValidationError as e:
        problems = "; ".join(f"{'.'.join(map(str, x['loc'])) or 'body'}: {x['msg']}" for x in e.errors()[:5])
        raise EngineError(f"The request is not understood: {problems}.") from e


def json_reply(value: Mapping[str, Any]) -> Reply:
    return Reply(json.dumps(value).encode())


def parse_training(body: bytes) -> pb.ForwardBackwardRequest:
    request = pb.ForwardBackwardRequest()
    try:
        request.ParseFromString(body)
    except DecodeError as e:
        raise EngineError(f"The request is no ForwardBackwardRequest: {e}") from e
    return request


def training_data(request: pb.ForwardBackwardRequest, vocab_size: int) -> tuple[list[Datum], Loss, Mapping[str, float]]:
    """The data, the loss and its configuration. Raises EngineError that names datum and field."""
    loss = find_loss(request.loss_fn)
    config = dict(request.loss_fn_config)
    for key, value in request.loss_fn_config_v2.items():
        if value.HasField("text"):
            raise EngineError(f"{loss.name} takes numbers only: loss_fn_config {key} is text.")
        config[key] = value.number
    if not request.data:
        raise EngineError("There is no data in the request.")
    data = [_datum(datum, loss, vocab_size, f"datum {i}") for i, datum in enumerate(request.data)]
    return data, loss, loss.config(config)


def _datum(message: pb.Datum, loss: Loss, vocab_size: int, where: str) -> Datum:
    chunks = []
    for chunk in message.model_input:
        if not chunk.HasField("encoded_text"):
            raise EngineError(f"{where}: the engine reads text tokens only.")
        chunks.append(np.frombuffer(chunk.encoded_text.tokens, dtype="<i4"))
    tokens = np.concatenate(chunks) if chunks else np.empty(0, dtype=np.int32)
    given = {name: _tensor(tensor, f"{where}: {name}") for name, tensor in message.loss_fn_inputs.items()}
    wanted = {"target_tokens", *loss.inputs}
    if set(given) != wanted:
        raise EngineError(f"{where}: {loss.name} takes {', '.join(sorted(wanted))}, not {', '.join(sorted(given)) or 'nothing'}.")
    targets = given.pop("target_tokens").astype(np.int64)
    if tokens.size == 0:
        raise EngineError(f"{where}: model_input is empty.")
    if targets.ndim > 1 and loss.name != "cross_entropy":
        raise EngineError(f"{where}: only cross_entropy takes several targets for one position.")
    if targets.shape[0] != tokens.size or targets.ndim > 2:
        raise EngineError(f"{where}: target_tokens has the shape {targets.shape}, model_input {tokens.size} tokens.")
    for name, array in given.items():
        if array.shape != targets.shape:
            raise EngineError(f"{where}: {name} has the shape {array.shape}, target_tokens {targets.shape}.")
    for name, ids in (("model_input", tokens), ("target_tokens", targets)):
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise EngineError(f"{where}: {name} has an id outside 0…{vocab_size - 1}.")
    return Datum(tokens, targets, {name: array.astype(np.float32) for name, array in given.items()})


_DTYPES = {pb.DTYPE_FLOAT32: "<f4", pb.DTYPE_INT64: "<i8", pb.DTYPE_INT32: "<i4"}


def _tensor(message: pb.Tensor, where: str) -> NDArray[Any]:
    if message.dtype not in _DTYPES:
        raise EngineError(f"{where} must be float32 or int64.")
    dtype, shape = _DTYPES[message.dtype], tuple(message.shape)
    try:
        if message.HasField("sparse_csr"):
            values = np.frombuffer(message.sparse_csr.values, dtype)
            rows = np.diff(np.frombuffer(message.sparse_csr.crow_indices, "<i8"))
            dense = np.zeros(shape, dtype)
            dense[np.repeat(np.arange(rows.size), rows), np.frombuffer(message.sparse_csr.col_indices, "<i8")] = values
            return dense
        flat = np.frombuffer(message.dense, dtype)
        return flat.reshape(shape) if shape else flat
    except (ValueError, IndexError) as e:
        raise EngineError(f"{where} doesn't have the shape it says: {e}") from e


def training_reply(outcome: Outcome) -> Reply:
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics={"loss:sum": outcome.loss})
    count = len(outcome.logprobs)
    uniform = len({array.shape[1:] for array in outcome.logprobs}) == 1
    for start, end in [(0, count)] if uniform else [(i, i + 1) for i in range(count)]:
        record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=end - start)
        _pack_arrays(record.fields["logprobs"], outcome.logprobs[start:end])
        _pack_arrays(record.fields["elementwise_loss"], outcome.losses[start:end])
    return Reply(message.SerializeToString(), PROTOBUF)


def _pack_arrays(field: pb.BatchedTensor, arrays: Sequence[NDArray[np.float32]]) -> None:
    field.dtype = pb.DTYPE_FLOAT32
    field.data = b"".join(np.ascontiguousarray(array, "<f4").tobytes() for array in arrays)
    field.offsets = np.cumsum([0, *(array.nbytes for array in arrays)], dtype="<i8").tobytes()
    field.trailing_shape.extend(arrays[0].shape[1:])


def sample_reply(sampled: Sampled) -> Reply:
    message = pb.SampleResponse(prompt_cache_hit_tokens=sampled.reused)
    for sequence in sampled.sequences:
        out = message.sequences.add(
            stop_reason=pb.STOP_REASON_STOP if sequence.stop_reason == "stop" else pb.STOP_REASON_LENGTH,
            tokens=np.asarray(sequence.tokens, "<i4").tobytes(),
            logprobs=np.asarray(sequence.logprobs, "<f4").tobytes(),
        )
        if sequence.top:
            ids, values = zip(*sequence.top, strict=True)
            _pack_top(out.topk_sampled_logprobs, np.stack(ids), np.stack(values))
    if sampled.prompt_logprobs is not None:
        message.prompt_logprobs = sampled.prompt_logprobs.astype("<f4").tobytes()
    if sampled.prompt_top is not None:
        ids_k, values_k = sampled.prompt_top
        unscored = sampled.request.prompt.size - ids_k.shape[0]
        _pack_top(
            message.topk_prompt_logprobs,
            np.pad(ids_k, ((unscored, 0), (0, 0))),
            np.pad(values_k, ((unscored, 0), (0, 0)), constant_values=_EMPTY_LOGPROB),
        )
    return Reply(message.SerializeToString(), PROTOBUF)


def _pack_top(field: pb.TopkLogprobs, ids: NDArray[np.int32], values: NDArray[np.float32]) -> None:
    field.token_ids, field.logprobs = ids.astype("<i4").tobytes(), values.astype("<f4").tobytes()
    field.length, field.k = ids.shape
