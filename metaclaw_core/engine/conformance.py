"""Does a server of the Tinker protocol do what this project relies on? The code behind ``metaclaw doctor --tinker``.

Design: the same checks run against the cloud and are the local engine's test. Each is one small experiment through
the SDK that says what it measured, so that a difference is visible even where it is allowed. Safe with a new key: a
few hundred tokens, rank 8, everything saved lives an hour at most and is deleted at the end. A check that raises is
"failed" with the error's text, and the checks that build on it are "skipped".
Not imported with the engine: it needs the SDK and numpy only, no torch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import httpx
import numpy as np
import tinker
from tinker import types

TIMEOUT = 600.0  # seconds for one call: longer than the SDK's own retries, shorter than its wait for a paid bill
TTL = 3600
TOLERANCE = 0.05  # nats; a served model in bf16 is within this, a wrong token or scale is not
TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps."


@dataclass(frozen=True)
class Check:
    name: str
    status: Literal["ok", "differs", "failed", "skipped"]
    """differs: it works, but not as the local engine and our code assume."""
    detail: str
    seconds: float
    prefilled: int = 0
    """Prompt tokens billed, at most."""
    sampled: int = 0
    trained: int = 0


@dataclass
class _Facts:
    """What earlier checks found out."""

    base_url: str
    api_key: str
    model: str
    service: Any = None
    rest: Any = None
    prefilled: int = 0
    sampled: int = 0
    trained: int = 0
    saved: list[str] = field(default_factory=list)
    tokenizer: Any = None
    ids: list[int] = field(default_factory=list)
    training: Any = None
    sampler: Any = None
    sampler_path: str = ""

    def data(self, start: int = 0) -> list[types.Datum]:
        ids = self.ids[start:]
        inputs: Any = {
            "target_tokens": np.asarray(ids[1:], dtype=np.int64),
            "weights": np.ones(len(ids) - 1, dtype=np.float32),
        }
        return [types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=inputs)]

    async def forward(self, client: Any, data: list[types.Datum]) -> Any:
        return np.concatenate([out["logprobs"].to_numpy() for out in (await self.run(client, "forward", data)).loss_fn_outputs])

    async def run(self, client: Any, method: str, data: list[types.Datum]) -> Any:
        self.trained += sum(datum.model_input.length for datum in data)
        return await _wait(getattr(client, method)(data, "cross_entropy"))

    async def train(self, client: Any, *batches: list[types.Datum]) -> None:
        """One optimizer step after a call per batch."""
        for batch in batches:
            await self.run(client, "forward_backward", batch)
        await _wait(client.optim_step(types.AdamParams(learning_rate=1e-3, eps=1e-8)))

    async def sample(self, ids: list[int], **more: Any) -> Any:
        extra = {key: more.pop(key) for key in ("topk_sample_logprobs", "include_prompt_logprobs") if key in more}
        result = await _wait(
            self.sampler.sample(types.ModelInput.from_ints(ids), 1, types.SamplingParams(**more), **extra)
        )
        self.prefilled += len(ids)
        self.sampled += len(result.sequences[0].tokens)
        return result.sequences[0]

    async def score(self, ids: list[int], last_n: int | None = None) -> list[float | None]:
        self.prefilled += len(ids)
        self.sampled += 1
        scores: list[float | None] = await _wait(
            self.sampler.compute_logprobs(types.ModelInput.from_ints(ids), prompt_logprobs_last_n=last_n)
        )
        return scores


class _DiffersError(Exception):
    """The text is what differs."""


async def conformance(base_url: str, api_key: str, model: str) -> list[Check]:
    """Run all checks in order. Nothing is raised for what the server does wrong."""
    facts = _Facts(base_url, api_key, model)
    results: list[Check] = []
    try:
        for name, needs, check in _CHECKS:
            results.append(await _one(name, needs, check, facts, results))
    finally:
        results.append(await _one("clean up", ("connect",), _clean_up, facts, results))
    return results


async def _one(
    name: str, needs: tuple[str, ...], check: Callable[[_Facts], Awaitable[str]], facts: _Facts, before: list[Check]
) -> Check:
    usable = {earlier.name for earlier in before if earlier.status in ("ok", "differs")}
    if missing := [need for need in needs if need not in usable]:
        return Check(name, "skipped", f"needs {', '.join(missing)}", 0.0)
    facts.prefilled = facts.sampled = facts.trained = 0
    started = time.monotonic()
    status: Literal["ok", "differs", "failed"] = "ok"
    try:
        detail = await check(facts)
    except _DiffersError as e:
        status, detail = "differs", str(e)
    except Exception as e:  # noqa: BLE001 - whatever a server provokes is the finding
        status, detail = "failed", f"{type(e).__name__}: {e}"
    seconds = time.monotonic() - started
    return Check(name, status, detail, seconds, facts.prefilled, facts.sampled, facts.trained)


async def _wait(future: Any) -> Any:
    return await asyncio.wait_for(future, TIMEOUT)


async def _connect(facts: _Facts) -> str:
    def clients() -> tuple[tinker.RestClient, tinker.ServiceClient]:
        where: Any = {"base_url": facts.base_url, "api_key": facts.api_key}
        return tinker.RestClient(**where), tinker.ServiceClient(**where)

    facts.rest, facts.service = await asyncio.to_thread(clients)  # they ask the server for its flags
    return f"SDK {tinker.__version__}"


async def _capabilities(facts: _Facts) -> str:
    served = (await _wait(facts.rest.get_server_capabilities())).supported_models
    found = next((m for m in served if m.model_name == facts.model), None)
    if found is None:
        raise _DiffersError(f"{facts.model} is not among the {len(served)} models listed")
    if not found.trainable:
        raise _DiffersError(f"{facts.model} is listed as not trainable")
    return f"{len(served)} models; {facts.model} has {found.max_context_length} tokens of context"


async def _create(facts: _Facts) -> str:
    facts.training = await _wait(facts.service.create_lora_training_client(facts.model, rank=8, seed=1))
    return f"rank 8, model {facts.training.model_id}"


async def _tokenizer(facts: _Facts) -> str:
    facts.tokenizer = await asyncio.to_thread(facts.training.get_tokenizer)
    facts.ids = facts.tokenizer.encode(TEXT, add_special_tokens=False)
    text = facts.tokenizer.decode(facts.ids)
    if text != TEXT:
        raise _DiffersError(f"decode(encode(text)) is {text!r}")
    if not facts.tokenizer.chat_template:
        raise _DiffersError("there is no chat template")
    return f"{len(facts.tokenizer)} words, {len(facts.ids)} tokens of test text, chat template present"


async def _sums(facts: _Facts) -> str:
    one = await facts.run(facts.training, "forward", facts.data())
    two = await facts.run(facts.training, "forward", facts.data() * 2)
    logprobs = one.loss_fn_outputs[0]["logprobs"].to_numpy()
    if logprobs.shape != (len(facts.ids) - 1,):
        raise _DiffersError(f"logprobs have the shape {logprobs.shape} for {len(facts.ids) - 1} tokens")
    ratio, own = two.metrics["loss:sum"] / one.metrics["loss:sum"], one.metrics["loss:sum"] / -float(logprobs.sum())
    if abs(ratio - 2) > 0.01 or abs(own - 1) > 0.01:
        raise _DiffersError(f"loss:sum is {own:.3f} × the sum of −logprobs, and {ratio:.3f} × as large for the data twice")
    return "the loss is a sum over tokens and datums"


async def _accumulation(facts: _Facts) -> str:
    half = len(facts.ids) // 2
    first, second = facts.data(), facts.data(half)
    apart = await _wait(facts.service.create_lora_training_client(facts.model, rank=8, seed=2))
    together = await _wait(facts.service.create_lora_training_client(facts.model, rank=8, seed=2))
    before = await facts.forward(apart, first)
    await facts.train(apart, first, second)
    await facts.train(together, first + second)
    a, b = await facts.forward(apart, first), await facts.forward(together, first)
    moved, gap = float(np.abs(a - before).max()), float(np.abs(a - b).max())
    if gap > max(0.1 * moved, 1e-4):
        raise _DiffersError(f"two calls and one call with both data end {gap:.2g} apart; the step itself moved {moved:.2g}")
    return f"two calls equal one to {gap:.1e} (the step moved {moved:.2g})"


async def _save_and_sample(facts: _Facts) -> str:
    await facts.train(facts.training, facts.data())
    started = time.monotonic()
    saved = await _wait(facts.training.save_weights_for_sampler(f"doctor-{time.time_ns()}", ttl_seconds=TTL))
    facts.sampler_path = saved.path
    facts.saved.append(saved.path)
    facts.sampler = await _wait(facts.service.create_sampling_client(model_path=saved.path))
    await facts.sample(facts.ids, max_tokens=1)
    return f"{time.monotonic() - started:.2f} s from save to the first token"


async def _logprobs_agree(facts: _Facts) -> str:
    sequence = await facts.sample(facts.ids, max_tokens=8, temperature=1.0, seed=1)
    full = facts.ids + list(sequence.tokens)
    scored = await facts.score(full)
    if scored[0] is not None:
        raise _DiffersError(f"the first prompt logprob is {scored[0]}, not None")
    inputs: Any = {
        "target_tokens": np.asarray(full[1:], dtype=np.int64),
        "weights": np.zeros(len(full) - 1, dtype=np.float32),
    }
    datum = types.Datum(model_input=types.ModelInput.from_ints(full[:-1]), loss_fn_inputs=inputs)
    trained = await facts.forward(facts.training, [datum])
    count = len(sequence.tokens)
    own = np.asarray(sequence.logprobs)
    again = np.abs(own - np.asarray(scored[-count:], dtype=np.float64)).max()
    trainer = np.abs(own - trained[-count:]).max()
    if max(again, trainer) > TOLERANCE:
        raise _DiffersError(f"sampled logprobs differ by {again:.2g} from compute_logprobs, {trainer:.2g} from training")
    return f"sampled vs compute_logprobs {again:.1e}, vs training {trainer:.1e}"


async def _last_n(facts: _Facts) -> str:
    full, tail = await facts.score(facts.ids), await facts.score(facts.ids, 3)
    if any(score is not None for score in tail[:-3]):
        raise _DiffersError("prompt_logprobs_last_n scores more than asked")
    gap = max(abs(float(a or 0) - float(b or 0)) for a, b in zip(full[-3:], tail[-3:], strict=True))
    if gap > TOLERANCE:
        raise _DiffersError(f"the last logprobs change by {gap:.2g} when only they are asked for")
    return f"the same to {gap:.1e}"


async def _scaling(facts: _Facts) -> str:
    temperature = 0.7
    one = await facts.sample(facts.ids, max_tokens=1, temperature=1.0, topk_sample_logprobs=5)
    cooled = await facts.sample(facts.ids, max_tokens=1, temperature=temperature, topk_sample_logprobs=5)
    if one.topk_logprobs is None or cooled.topk_logprobs is None:
        raise _DiffersError("topk_sample_logprobs are not served, so the scale can't be told")
    first, second = dict(one.topk_logprobs[0]), dict(cooled.topk_logprobs[0])
    common = sorted(first.keys() & second.keys(), key=lambda token: -first[token])
    if len(common) < 2:
        raise _DiffersError("the likeliest tokens have nothing in common at two temperatures")
    best, last = common[0], common[-1]
    ratio = (second[best] - second[last]) / (first[best] - first[last])
    if abs(ratio - 1 / temperature) > 0.05:
        raise _DiffersError(f"logprobs at temperature 0.7 are scaled by {ratio:.3f}, expected {1 / temperature:.3f}")
    return f"logprobs are those of the temperature sampled at (scale {ratio:.3f} at 0.7)"


async def _stop_token(facts: _Facts) -> str:
    free = await facts.sample(facts.ids, max_tokens=6, temperature=0.0, stop=[])
    stop = int(free.tokens[min(2, len(free.tokens) - 1)])
    expected = list(free.tokens).index(stop)
    stopped = await facts.sample(facts.ids, max_tokens=6, temperature=0.0, stop=[stop])
    tokens = list(stopped.tokens)
    if tokens == list(free.tokens)[:expected]:
        raise _DiffersError("a stop token is left out of the result")
    if tokens != list(free.tokens)[: expected + 1] or stopped.stop_reason != "stop":
        raise _DiffersError(f"expected {expected + 1} tokens and 'stop', got {len(tokens)} and {stopped.stop_reason!r}")
    return "a stop token is part of the result"


async def _seed(facts: _Facts) -> str:
    first = await facts.sample(facts.ids, max_tokens=8, seed=7)
    second = await facts.sample(facts.ids, max_tokens=8, seed=7)
    if list(first.tokens) != list(second.tokens):
        raise _DiffersError("the same seed gives different tokens")
    return "the same seed gives the same tokens"


async def _segments(facts: _Facts) -> str:
    whole = await facts.sample(facts.ids, max_tokens=8, temperature=0.0, stop=[])
    first = await facts.sample(facts.ids, max_tokens=4, temperature=0.0, stop=[])
    second = await facts.sample(facts.ids + list(first.tokens), max_tokens=4, temperature=0.0, stop=[])
    joined = list(first.tokens) + list(second.tokens)
    if joined != list(whole.tokens):
        same = next((i for i, (a, b) in enumerate(zip(joined, whole.tokens, strict=False)) if a != b), len(joined))
        raise _DiffersError(f"two segments of 4 greedy tokens leave the 8 in one go at token {same}")
    gap = float(np.abs(np.asarray([*first.logprobs, *second.logprobs]) - np.asarray(whole.logprobs)).max())
    return f"segments continue exactly; logprobs to {gap:.1e}"


async def _resume(facts: _Facts) -> str:
    saved = await _wait(facts.training.save_state(f"doctor-{time.time_ns()}", ttl_seconds=TTL))
    facts.saved.append(saved.path)
    resumed = await _wait(facts.service.create_training_client_from_state_with_optimizer(saved.path))
    before = await facts.forward(facts.training, facts.data())
    await facts.train(facts.training, facts.data())
    await facts.train(resumed, facts.data())
    a, b = await facts.forward(facts.training, facts.data()), await facts.forward(resumed, facts.data())
    moved, gap = float(np.abs(a - before).max()), float(np.abs(a - b).max())
    if gap > max(0.1 * moved, 1e-4):
        raise _DiffersError(f"resumed training ends {gap:.2g} from uninterrupted; the step itself moved {moved:.2g}")
    return f"resumed equals uninterrupted to {gap:.1e} (the step moved {moved:.2g})"


async def _ttl(facts: _Facts) -> str:
    path = facts.sampler_path
    run = types.ParsedCheckpointTinkerPath.from_tinker_path(path).training_run_id
    expires = await _expiry(facts, run, path)
    if expires is None:
        raise _DiffersError("ttl_seconds given at the save is not shown as expires_at")
    left = (expires - datetime.now(UTC)).total_seconds()
    await _wait(facts.rest.set_checkpoint_ttl_from_tinker_path(path, None))
    if await _expiry(facts, run, path) is not None:
        raise _DiffersError("removing the time to live has no effect")
    await _wait(facts.rest.set_checkpoint_ttl_from_tinker_path(path, TTL))
    return f"expires in {left:.0f} s; can be changed and removed"


async def _expiry(facts: _Facts, run: str, path: str) -> datetime | None:
    listed = (await _wait(facts.rest.list_checkpoints(run))).checkpoints
    found: datetime | None = next(c for c in listed if c.tinker_path == path).expires_at
    return found


async def _unknown_path(facts: _Facts) -> str:
    path = facts.sampler_path + "-that-never-was"
    try:
        client = await _wait(facts.service.create_sampling_client(model_path=path))
        await _wait(client.sample(types.ModelInput.from_ints(facts.ids), 1, types.SamplingParams(max_tokens=1)))
    except (tinker.TinkerError, ValueError) as e:
        return f"{type(e).__name__}: {e}"
    raise _DiffersError("weights that don't exist can be sampled from")


async def _chat(facts: _Facts) -> str:
    body = {
        "model": facts.sampler_path,
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 4,
        "logprobs": True,
        "return_token_ids": True,
    }
    async with httpx.AsyncClient(timeout=120) as client:
        url = f"{facts.base_url.rstrip('/')}/oai/api/v1/chat/completions"
        response = await client.post(url, json=body, headers={"Authorization": f"Bearer {facts.api_key}"})
    if response.status_code != 200:
        raise _DiffersError(f"status {response.status_code}: {response.text[:200]}")
    answer = response.json()
    facts.prefilled += answer["usage"]["prompt_tokens"]
    facts.sampled += answer["usage"]["completion_tokens"]
    choice = answer["choices"][0]
    given = [name for name in ("logprobs", "token_ids", "prompt_token_ids") if choice.get(name)]
    return f"served; gives {', '.join(given) or 'neither logprobs nor token ids'}"


async def _clean_up(facts: _Facts) -> str:
    for path in facts.saved:
        await _wait(facts.rest.delete_checkpoint_from_tinker_path(path))
    await _wait(facts.service.close("success"))
    return f"{len(facts.saved)} checkpoints deleted"


_CHECKS: tuple[tuple[str, tuple[str, ...], Callable[[_Facts], Awaitable[str]]], ...] = (
    ("connect", (), _connect),
    ("capabilities", ("connect",), _capabilities),
    ("create", ("connect",), _create),
    ("tokenizer", ("create",), _tokenizer),
    ("loss is a sum", ("tokenizer",), _sums),
    ("gradients accumulate", ("tokenizer",), _accumulation),
    ("save and sample", ("tokenizer",), _save_and_sample),
    ("logprobs agree", ("save and sample",), _logprobs_agree),
    ("score a suffix", ("save and sample",), _last_n),
    ("logprob scale", ("save and sample",), _scaling),
    ("stop token", ("save and sample",), _stop_token),
    ("seed", ("save and sample",), _seed),
    ("segments", ("save and sample",), _segments),
    ("resume", ("tokenizer",), _resume),
    ("time to live", ("save and sample",), _ttl),
    ("unknown weights", ("save and sample",), _unknown_path),
    ("chat by path", ("save and sample",), _chat),
)
