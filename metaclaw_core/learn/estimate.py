"""What a model of one's own would cost, from what one's agent has really asked so far.

Design: the user's recorded turns give the shape of a human turn: how many requests it takes, how long their prompts and answers
are, as the providers counted. A model's price list makes USD of it: each request is prefilled and sampled once, and trained on
once, as a step makes one pass over prompt and answer. A price or a count that is unknown makes the cost unknown.

Limits: another tokenizer counts otherwise, by some tens of per cent; prompts that a cache serves are priced as if none did;
the judge comes on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select

from metaclaw_core.learn.prices import Prices
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import turns

_NEWEST = 5_000  # requests that are looked at
_ROOM = 1.2  # a prompt grows: the longest so far, and a fifth


@dataclass(frozen=True, slots=True)
class TurnShape:
    """A human turn, on average over those that were recorded."""

    turns: int  # human turns with token counts
    requests: float  # of one
    prompt_tokens: float  # all requests of one together
    answer_tokens: float
    longest: int  # prompt and answer of the largest request


@dataclass(frozen=True, slots=True)
class Offered:
    name: str
    max_context: int | None  # tokens; None: the server does not say


@dataclass(frozen=True, slots=True)
class Estimate:
    model: Offered
    fits: bool | None  # whether its context holds the longest request; None: not known
    usd: float | None  # of 100 human turns, sampled and trained on; None: not known


def shape_of(store: Store) -> TurnShape | None:
    """None: no request with token counts has been recorded yet."""
    columns = (turns.c.turn_id, turns.c.input_tokens, turns.c.output_tokens)
    served = turns.c.kind.in_(("main", "tool", "subagent"))
    known = (turns.c.turn_id.is_not(None), turns.c.input_tokens.is_not(None), turns.c.output_tokens.is_not(None), served)
    with store.reading() as db:
        rows = db.execute(select(*columns).where(*known).order_by(turns.c.started_at.desc()).limit(_NEWEST)).all()
    human = len({row.turn_id for row in rows})
    if not human:
        return None
    return TurnShape(
        human,
        len(rows) / human,
        sum(row.input_tokens for row in rows) / human,
        sum(row.output_tokens for row in rows) / human,
        max(row.input_tokens + row.output_tokens for row in rows),
    )


def estimate(model: Offered, shape: TurnShape | None, prices: Prices, biller: str = "tinker") -> Estimate:
    if shape is None:
        return Estimate(model, None, None)
    prompt, answer = round(100 * shape.prompt_tokens), round(100 * shape.answer_tokens)
    usd = prices.training_cost(model.name, prefill=prompt, sample=answer, train=prompt + answer, biller=biller)
    fits = None if model.max_context is None else model.max_context >= _ROOM * shape.longest
    return Estimate(model, fits, usd)


def proposed(estimates: Sequence[Estimate], preferred: str) -> str | None:
    """The one to suggest: `preferred` if it is offered and its context is not known to be too small, else the cheapest that
    fits, else the first that may. None: none of them will do."""
    able = [e for e in estimates if e.fits is not False]
    if any(e.model.name == preferred for e in able):
        return preferred
    priced = sorted((e.usd, e.model.name) for e in able if e.usd is not None)
    return priced[0][1] if priced else able[0].model.name if able else None
