"""New weights answer a few logged prompts before they serve, beside the stable ones: the calls that `fastchecks` judges.

Design: one prompt of each of the newest sessions, the exact ids that were sampled from; all are asked at once. What it took is
booked like siblings. Weights that the server can't sample from at all, while it answers from the stable ones, are broken weights;
any other failure is the server's, and the trial is made again. A prompt that it refuses with the stable weights as well (its
context may be shorter now) says nothing about either. Where that is so of all, the trial waits until new answers were logged: no
weights serve unseen.

Limits: replies are cut at `REPLY_TOKENS`, and at what the logged one might have had; where nothing was logged yet there is nothing
to ask.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np
from sqlalchemy import select

from metaclaw_core.learn.fastchecks import PROMPTS, REPLY_TOKENS, Bounds, Checked, Reply, check
from metaclaw_core.learn.journal import Version
from metaclaw_core.learn.money import book_training
from metaclaw_core.learn.replies import Readers
from metaclaw_core.learn.trainer import Sampled, ServerError, TrainingServer
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.samplefile import unpack_ids
from metaclaw_core.store.tables import samples, turns


async def trial(store: Store, server: TrainingServer, new: Version, stable: Version, bounds: Bounds) -> Checked:
    """Whether `new` may serve. Raises ServerError."""
    prompts = await asyncio.to_thread(_prompts, store, new.base_model)
    if not prompts:
        return check([], [], bounds)
    reader = Readers(await server.tokenizer())
    asked = await _together(*(_asked(store, server, reader, new, stable, *prompt) for prompt in prompts))
    pairs = [pair for pair in asked if not isinstance(pair, str)]
    if not pairs:
        raise ServerError("refused", f"New weights wait for prompts to be tried with: the server refuses the last {len(asked)}. {asked[0]}")
    failed = [said for said, _ in pairs if isinstance(said, ServerError)]
    if failed and len(failed) < len(pairs):
        raise failed[0]
    said = [Reply(0, empty=True, malformed=False, failed=str(one)) if isinstance(one, ServerError) else one for one, _ in pairs]
    return check(said, [before for _, before in pairs], bounds)


async def _asked(
    store: Store, server: TrainingServer, reader: Readers, new: Version, stable: Version, prompt: list[int], max_tokens: int
) -> tuple[Reply | ServerError, Reply] | str:
    """What the new and the stable weights said; or why the server refuses the prompt."""

    async def ask(version: Version) -> Sampled | ServerError:
        try:
            [reply] = await server.sample(version.sampler_path, prompt, n=1, max_tokens=max_tokens, stop_ids=reader.stop_ids)
        except ServerError as e:
            if e.kind not in ("server", "refused"):
                raise
            return e
        book_training(store, "sibling", new.base_model, len(prompt), len(reply.tokens))
        return reply

    said, before = await _together(ask(new), ask(stable))
    if isinstance(before, ServerError):
        if before.kind == "refused":
            return str(before)
        raise before
    if isinstance(said, ServerError):
        return said, _reply(reader, before.tokens, None)
    kl = None
    if said.tokens:
        theirs = await server.logprobs(stable.sampler_path, [*prompt, *said.tokens], len(said.tokens))
        book_training(store, "sibling", new.base_model, len(prompt) + len(said.tokens))
        kl = float(np.mean(said.logprobs.astype(np.float64) - theirs))
    return _reply(reader, said.tokens, kl), _reply(reader, before.tokens, None)


async def _together[T](*work: Coroutine[Any, Any, T]) -> list[T]:
    """All at once. The first that fails ends the others: nothing goes on asking behind the caller's back."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _prompts(store: Store, base_model: str) -> list[tuple[list[int], int]]:
    """(ids, tokens that a reply may have) of the newest answers, one a session."""
    query = (
        select(turns.c.session, samples.c.prompt_ids, samples.c.sampling)
        .join(turns, turns.c.flow_id == samples.c.flow_id)
        .where(samples.c.klass == "A", samples.c.prompt_ids.is_not(None), samples.c.base_model == base_model)
        .order_by(samples.c.id.desc())
        .limit(20 * PROMPTS)
    )
    found: dict[str, tuple[list[int], int]] = {}
    with store.reading() as db:
        for session, packed, sampled in db.execute(query):
            if session not in found and len(found) < PROMPTS:
                found[session] = unpack_ids(packed).tolist(), min(REPLY_TOKENS, int(sampled.get("max_tokens", REPLY_TOKENS)))
    return list(found.values())


def _reply(reader: Readers, tokens: Sequence[int], kl: float | None) -> Reply:
    """As if any tool might be called: a call that was never offered is no fault of the weights' grammar."""
    read = reader.finished(tokens)
    return Reply(len(tokens), not read.message.parts and not read.malformed, read.malformed, kl)
