"""The OpenAI-shaped side: chat and text completions by checkpoint path, as the cloud has them.

Design: ``model`` is the base model's name, a ``tinker://`` path, or ``base;path``. Prompts are rendered with the
model's own chat template. Beyond OpenAI's fields: token ids as a completion prompt, ``echo`` with ``logprobs`` and
``prompt_logprobs`` (which make this a teacher for on-policy distillation), ``top_k``, ``return_token_ids``,
``reasoning_content``, all as vLLM spells them. Reasoning and tool calls are read as the policy server reads them; a call
that does not parse is text. What is not served is refused by name, never ignored.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from metaclaw_core.engine import protocol
from metaclaw_core.engine.chat import delta_of, message_of, render_chat, reply_reader
from metaclaw_core.engine.errors import EngineError
from metaclaw_core.engine.lora import Adapter
from metaclaw_core.engine.sampling import Sampled, SampleRequest, Sequence_
from metaclaw_core.engine.service import Engine
from metaclaw_core.policy.parse import ReplyReader
from metaclaw_core.wire.answer import Call, Event, TextDelta

_REFUSED = ("logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_p", "functions", "audio")


@dataclass(frozen=True)
class Job:
    """One prompt of one HTTP request."""

    adapter: Adapter | None
    request: SampleRequest
    body: Mapping[str, Any]
    chat: bool


async def models(engine: Engine, request: Request) -> Response:
    names = [engine.base.name, *(c.place.path for c in engine.checkpoints.find() if c.place.kind == "sampler_weights")]
    return JSONResponse({"object": "list", "data": [{"id": n, "object": "model", "owned_by": "local"} for n in names]})


async def chat_completions(engine: Engine, request: Request) -> Response:
    body = await _body(request)
    prompt = render_chat(engine.base.tokenizer, body)
    wants = bool(body.get("logprobs"))
    job = await _job(engine, body, prompt, top=int(body.get("top_logprobs") or 0) if wants else 0, chat=True)
    if body.get("stream"):
        return _stream(engine, [job])
    sampled = await _run(engine, job)
    choices = []
    for sequence in sampled.sequences:
        message = message_of(_said(engine, job, sequence))
        finish = _finish(sequence, "tool_calls" in message)
        choice = {"index": sequence.index, "message": message, "finish_reason": finish}
        if wants:
            choice["logprobs"] = {"content": [_chat_logprob(engine, sequence, i) for i in range(len(sequence.tokens))]}
        choices.append(_with_ids(choice, job, sequence))
    return JSONResponse(_envelope(body, "chat.completion", choices, [sampled]))


async def completions(engine: Engine, request: Request) -> Response:
    body = await _body(request)
    wanted = body.get("logprobs")
    top = int(wanted) if wanted is not None else 0
    jobs = [await _job(engine, body, prompt, top=top, chat=False) for prompt in _prompts(engine, body)]
    if body.get("stream"):
        if body.get("echo"):
            raise EngineError("echo and stream don't go together.")
        return _stream(engine, jobs)
    results = await asyncio.gather(*(_run(engine, job) for job in jobs))
    choices = []
    for number, (job, sampled) in enumerate(zip(jobs, results, strict=True)):
        for sequence in sampled.sequences:
            choices.append(_text_choice(engine, job, sampled, sequence, number * len(sampled.sequences) + sequence.index))
    return JSONResponse(_envelope(body, "text_completion", choices, results))


def error_body(error: EngineError) -> dict[str, Any]:
    kind = "invalid_request_error" if error.category == "user" else "server_error"
    return {"error": {"message": str(error), "type": kind, "code": error.status}}


ROUTES = (
    ("GET", "/models", models),
    ("POST", "/chat/completions", chat_completions),
    ("POST", "/completions", completions),
)


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except ValueError as e:
        raise EngineError(f"The body is not JSON: {e}.") from e
    if not isinstance(body, dict):
        raise EngineError("The body must be a JSON object.")
    if refused := [name for name in _REFUSED if body.get(name)]:
        raise EngineError(f"The engine doesn't serve {', '.join(refused)}.")
    if (body.get("response_format") or {}).get("type", "text") != "text":
        raise EngineError("The engine doesn't serve response_format other than text.")
    if body.get("tool_choice") not in (None, "auto", "none"):
        raise EngineError("The engine doesn't serve a forced tool_choice.")
    return body


async def _job(engine: Engine, body: Mapping[str, Any], prompt: list[int], *, top: int, chat: bool) -> Job:
    name = body.get("model")
    if not isinstance(name, str):
        raise EngineError("model is missing.")
    base, _, path = name.rpartition(";")
    path = path if path.startswith("tinker://") else ""
    adapter = await engine.adapter_of(path or None, None if path and not base else base or name)
    # Pure scoring: one token is drawn, as everywhere, and not shown.
    most = body.get("max_completion_tokens", body.get("max_tokens", None if chat else 16)) or (None if chat else 1)
    scored = bool(body.get("echo")) and body.get("logprobs") is not None
    tops = int(body.get("prompt_logprobs") or 0)
    wire = protocol.parse(
        protocol.Sample,
        {
            "prompt": {"chunks": [{"tokens": prompt}]},
            "num_samples": body.get("n") or 1,
            "sampling_params": {
                "max_tokens": most,
                "seed": body.get("seed"),
                "stop": body.get("stop"),
                "temperature": 1.0 if body.get("temperature") is None else body["temperature"],
                "top_p": 1.0 if body.get("top_p") is None else body["top_p"],
                "top_k": -1 if body.get("top_k") is None else body["top_k"],
            },
            "prompt_logprobs": scored or body.get("prompt_logprobs") is not None,
            "topk_prompt_logprobs": max(top if scored else 0, tops),
            "topk_sample_logprobs": top,
        },
    )
    request = engine.sample_request(wire)
    # A model's own end of turn ends a reply whatever else the caller stops at.
    return Job(adapter, replace(request, stop_ids=request.stop_ids | engine.base.eos), body, chat)


def _prompts(engine: Engine, body: Mapping[str, Any]) -> list[list[int]]:
    prompt = body.get("prompt")
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise EngineError("prompt must be text, token ids, or a list of either.")
    special = bool(body.get("add_special_tokens", True))
    return [
        engine.base.tokenizer.encode(one, add_special_tokens=special) if isinstance(one, str) else one for one in prompt
    ]


async def _run(engine: Engine, job: Job) -> Sampled:
    async with aclosing(_events(engine, job, tokens=False)) as events:
        async for event in events:
            if isinstance(event, Sampled):
                return event
    raise EngineError("The engine is stopping.")


async def _events(engine: Engine, job: Job, *, tokens: bool) -> AsyncGenerator[tuple[int, int] | Sampled]:
    """(sample, token) as they are drawn if `tokens`, then the whole. Closing it cancels the work."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[int, int] | Sampled | Exception] = asyncio.Queue()

    def put(event: tuple[int, int] | Sampled | Exception) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, event)

    request = replace(job.request, on_token=lambda index, token, _: put((index, token))) if tokens else job.request
    engine.worker.sample(job.adapter, request, put)
    finished = False
    try:
        while True:
            event = await queue.get()
            finished = isinstance(event, Sampled | Exception)
            if isinstance(event, Exception):
                raise event
            yield event
            if finished:
                return
    finally:
        if not finished:
            engine.worker.cancel(put)


def _stream(engine: Engine, jobs: Sequence[Job]) -> Response:
    if len(jobs) != 1:
        raise EngineError("Only one prompt can be streamed.")
    job = jobs[0]
    if job.body.get("logprobs"):
        raise EngineError("logprobs and stream don't go together here.")
    return StreamingResponse(_chunks(engine, job), media_type="text/event-stream")


async def _chunks(engine: Engine, job: Job) -> AsyncIterator[bytes]:
    kind = "chat.completion.chunk" if job.chat else "text_completion"
    frame = {"id": _id(job.body), "object": kind, "created": int(time.time()), "model": job.body["model"]}

    def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return f"data: {json.dumps({**frame, 'choices': choices, **more})}\n\n".encode()

    def piece(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        said = {"delta": delta} if job.chat else {"text": delta.get("content", "")}
        return {"index": index, **said, "finish_reason": finish}

    readers = [_reader(engine, job) for _ in range(job.request.samples)]
    calls = [0] * len(readers)

    def pieces(index: int, events: Iterable[Event]) -> Iterator[bytes]:
        for event in events:
            yield chunk([piece(index, delta_of(event, calls[index]))])
            calls[index] += isinstance(event, Call)

    if job.chat:
        yield chunk([{"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None} for i in range(len(readers))])
    try:
        async with aclosing(_events(engine, job, tokens=True)) as events:
            async for event in events:
                if isinstance(event, tuple):
                    index, token = event
                    for data in pieces(index, readers[index].feed([token])):
                        yield data
                    continue
                for sequence in event.sequences:
                    for data in pieces(sequence.index, readers[sequence.index].finish()):
                        yield data
                    finish = _finish(sequence, calls[sequence.index] > 0)
                    yield chunk([_with_ids(piece(sequence.index, {}, finish), job, sequence)])
                if (job.body.get("stream_options") or {}).get("include_usage"):
                    yield chunk([], usage=_usage([event]))
    except EngineError as e:
        yield f"data: {json.dumps(error_body(e))}\n\n".encode()
    yield b"data: [DONE]\n\n"


def _reader(engine: Engine, job: Job) -> ReplyReader:
    request = job.request
    return reply_reader(
        engine.base.tokenizer, job.body, request.prompt.tolist(), stop_ids=request.stop_ids, stops=request.stop_texts
    )


def _said(engine: Engine, job: Job, sequence: Sequence_) -> list[Event]:
    """What a reply says, without end marker and stop string."""
    reader = _reader(engine, job)
    return [*reader.feed(sequence.tokens), *reader.finish()]


def _text_choice(engine: Engine, job: Job, sampled: Sampled, sequence: Sequence_, index: int) -> dict[str, Any]:
    body, prompt = job.body, job.request.prompt.tolist()
    nothing = body.get("max_tokens") == 0
    said = [] if nothing else _said(engine, job, sequence)
    text = "".join(event.text for event in said if isinstance(event, TextDelta))
    if body.get("echo"):
        text = engine.base.tokenizer.decode(prompt, skip_special_tokens=False) + text
    finish = "length" if nothing else _finish(sequence, False)
    choice: dict[str, Any] = {"index": index, "text": text, "finish_reason": finish}
    if body.get("logprobs") is not None:
        entries = _prompt_entries(sampled, int(body["logprobs"])) if body.get("echo") else []
        if not nothing:
            drawn = enumerate(zip(sequence.tokens, sequence.logprobs, strict=True))
            entries += [(token, logprob, _top(sequence, i)) for i, (token, logprob) in drawn]
        choice["logprobs"] = _legacy_logprobs(engine, entries)
    if body.get("prompt_logprobs") is not None:
        ranked = _prompt_entries(sampled, int(body["prompt_logprobs"]))
        choice["prompt_logprobs"] = [
            None if logprob is None else _named(engine, {**dict(top or ()), token: logprob}) for token, logprob, top in ranked
        ]
    return _with_ids(choice, job, sequence, nothing=nothing)


def _named(engine: Engine, logprobs: Mapping[int, float]) -> dict[str, Any]:
    return {str(t): {"logprob": v, "decoded_token": engine.base.tokenizer.decode([t])} for t, v in logprobs.items()}


type Entry = tuple[int, float | None, list[tuple[int, float]] | None]


def _prompt_entries(sampled: Sampled, k: int) -> list[Entry]:
    """(token, logprob or None, the k likeliest) for each prompt token."""
    prompt = sampled.request.prompt.tolist()
    if sampled.prompt_logprobs is None:  # a prompt of one token has nothing to score
        return [(token, None, None) for token in prompt]
    entries: list[Entry] = []
    for i, (token, logprob) in enumerate(zip(prompt, sampled.prompt_logprobs.tolist(), strict=True)):
        top = None
        if sampled.prompt_top and i:
            ids, values = sampled.prompt_top
            top = list(zip(ids[i - 1, :k].tolist(), values[i - 1, :k].tolist(), strict=True))
        entries.append((token, None if np.isnan(logprob) else logprob, top))
    return entries


def _top(sequence: Sequence_, i: int) -> list[tuple[int, float]] | None:
    if not sequence.top:
        return None
    ids, values = sequence.top[i]
    return list(zip(ids.tolist(), values.tolist(), strict=True))


def _legacy_logprobs(engine: Engine, entries: Sequence[Entry]) -> dict[str, Any]:
    words = [engine.base.tokenizer.decode([token]) for token, _, _ in entries]
    return {
        "tokens": words,
        "token_logprobs": [logprob for _, logprob, _ in entries],
        "top_logprobs": [
            None if top is None else {engine.base.tokenizer.decode([t]): v for t, v in top} for _, _, top in entries
        ],
        "text_offset": np.cumsum([0, *map(len, words)])[:-1].tolist(),
    }


def _chat_logprob(engine: Engine, sequence: Sequence_, i: int) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        word = engine.base.tokenizer.decode([token])
        return {"token": word, "logprob": logprob, "bytes": list(word.encode())}

    top = [entry(t, v) for t, v in _top(sequence, i) or ()]
    return {**entry(sequence.tokens[i], sequence.logprobs[i]), "top_logprobs": top}


def _with_ids(choice: dict[str, Any], job: Job, sequence: Sequence_, *, nothing: bool = False) -> dict[str, Any]:
    if job.body.get("return_token_ids"):
        choice["prompt_token_ids"] = job.request.prompt.tolist()
        choice["token_ids"] = [] if nothing else sequence.tokens
    return choice


def _finish(sequence: Sequence_, called: bool) -> str:
    return "tool_calls" if called else str(sequence.stop_reason)


def _usage(results: Sequence[Sampled]) -> dict[str, Any]:
    prompt = sum(r.request.prompt.size for r in results)
    completion = sum(len(s.tokens) for r in results for s in r.sequences)
    cached = {"cached_tokens": sum(r.reused for r in results)}
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total, "prompt_tokens_details": cached}


def _envelope(body: Mapping[str, Any], kind: str, choices: list[Any], results: Sequence[Sampled]) -> dict[str, Any]:
    head = {"id": _id(body), "object": kind, "created": int(time.time()), "model": body["model"]}
    return {**head, "choices": choices, "usage": _usage(results)}


def _id(body: Mapping[str, Any]) -> str:
    return f"{'chatcmpl' if 'messages' in body else 'cmpl'}-{uuid.uuid4().hex}"
