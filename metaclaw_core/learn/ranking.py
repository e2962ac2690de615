"""What the replies of one group are worth, judged on the reply alone: what would come of them is not known to anybody.

Design: each reply is scored like a logged one whose next state is not known: `judge.votes` votes, more than half must agree. Such a
score has no order that could bias it. Where the scores of a group tell nothing apart (all the same, or none) its replies are
compared two by two, each pair in both orders, and a pair counts only where both orders name the same reply: a judge that follows
the order says nothing. A reply is then worth the share of its pairs that it wins, an undecided one counting half. Scores say what
a reply is worth in itself and go to the value tracker; pairs only say which sibling is better, and don't.

A reply with a call that can't be read is worth 0 and a reply that was cut is worth nothing known, both without a question to the
judge; so is a call where calls are not to be judged. Equal replies are never compared.

A refusal that may be about the words of one reply counts as no vote; `Worth.refused` tells where the judge refused them all.

Limits: a group of n that ties costs n (n - 1) further questions. The judge does not see what tools would have returned, so a call
is judged as a next step and not by its effect.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

from metaclaw_core.learn.advantage import grpo
from metaclaw_core.learn.judge import (
    PURPOSE,
    Choice,
    all_ended,
    majority,
    model_of,
    pair_messages,
    reward_of,
    turn_messages,
    vote_on_pair,
    vote_on_turn,
)
from metaclaw_core.learn.llm import LLMClient, LLMRefused
from metaclaw_core.learn.transcript import (
    LIMIT_TOKENS,
    Origin,
    Section,
    action_sections,
    candidate_sections,
    render,
    turn_sections,
)
from metaclaw_core.model import Message
from metaclaw_core.settings import Judge

type Permit = Callable[[], AbstractAsyncContextManager[None]]  # each question to the judge is asked within one

_ABOUT_THE_PROMPT = frozenset({400, 413, 422})  # a refusal that may be about these words and not about us


@dataclass(frozen=True, slots=True)
class Asked:
    """What a group answers to, as the judge is shown it."""

    instruction: str
    earlier: str | None = None  # what the human had said before, where the instruction means little by itself
    results: tuple[tuple[str, str], ...] = ()  # (tool, what it returned) since the last answer, inside a tool loop

    def sections(self) -> list[Section]:
        return [Section(f"what {name} had returned before the step", Origin.TOOL, text, 0.2) for name, text in self.results]


@dataclass(frozen=True, slots=True)
class Reply:
    message: Message
    cut: bool = False  # by max_tokens
    malformed: bool = False  # it began a call that can't be read

    @property
    def shown(self) -> tuple[object, ...]:
        """What a judge could tell two replies apart by."""
        return tuple((s.label, s.text) for s in action_sections(self.message))


@dataclass(frozen=True, slots=True)
class Worth:
    """Of the replies of one group, in their order; None: not known."""

    scores: tuple[float | None, ...]  # 0 to 1, each by itself
    worth: tuple[float | None, ...]  # 0 to 1, what the group is centred on
    paired: bool = False  # the worth is of pairs
    refused: str | None = None  # what the judge said, where it refused every reply that it was shown


async def affordable(client: LLMClient, settings: Judge, replies: int) -> None:
    """Raises BudgetExhausted where not even the scores of one group can be paid for today."""
    votes = replies * settings.votes
    await client.affords(PURPOSE, votes * LIMIT_TOKENS, votes * settings.max_tokens)


async def worth_of(
    client: LLMClient, settings: Judge, asked: Asked, replies: Sequence[Reply], *, calls: bool, pairs: bool, permit: Permit = nullcontext
) -> Worth:
    """`calls`: replies that call a tool are judged, too. `pairs`: compare where the scores tell nothing apart.

    Raises LLMUnavailable, LLMRefused (but for refusals of a single reply), BudgetExhausted, StoreError, and what `permit` raises.
    """
    judged = [not r.cut and not r.malformed and (calls or not r.message.tool_calls) for r in replies]
    given = await all_ended(_score(client, settings, asked, r, permit) for r, is_judged in zip(replies, judged, strict=True) if is_judged)
    refusals = [one for one in given if isinstance(one, str)]
    left = iter([None if isinstance(one, str) else one for one in given])
    scores = tuple(
        next(left) if is_judged else 0.0 if r.malformed and not r.cut else None for r, is_judged in zip(replies, judged, strict=True)
    )
    if refusals and len(refusals) == len(given):
        return Worth(scores, scores, refused=refusals[0])
    among = [n for n, is_judged in enumerate(judged) if is_judged]
    if grpo([scores])[0] is not None or not pairs or len({replies[n].shown for n in among}) < 2:
        return Worth(scores, scores)
    couples = [(a, b) for a, b in combinations(among, 2) if replies[a].shown != replies[b].shown]
    better = await all_ended(_better(client, settings, asked, replies[a], replies[b], n, permit) for n, (a, b) in enumerate(couples))
    shares = won(among, dict(zip(couples, better, strict=True)))
    worth = tuple(shares.get(n, score) for n, score in enumerate(scores))
    return Worth(scores, worth, paired=True)


def won(among: Sequence[int], better: Mapping[tuple[int, int], int]) -> dict[int, float]:
    """For each of `among` the share of its pairs that it wins. `better`: (a, b) → 1: a is better, -1: b, 0: undecided;
    pairs that are not in it are undecided."""
    points = dict.fromkeys(among, 0.5 * (len(among) - 1))
    for (a, b), which in better.items():
        points[a] += which / 2
        points[b] -= which / 2
    return {n: value / (len(among) - 1) for n, value in points.items()}


async def _score(client: LLMClient, settings: Judge, asked: Asked, reply: Reply, permit: Permit) -> float | str | None:
    """The score, None: no majority; or what the judge said that refused this reply."""
    shown, acts = turn_sections(asked.instruction, reply.message, None, earlier=asked.earlier), len(action_sections(reply.message))
    messages = turn_messages(render([*shown[:-acts], *asked.sections(), *shown[-acts:]]), next_known=False)
    try:
        asks = (partial(vote_on_turn, client, settings, messages, model_of(client, settings, n)) for n in range(settings.votes))
        votes = await all_ended(_within(permit, ask) for ask in asks)
    except LLMRefused as e:
        if e.status in _ABOUT_THE_PROMPT:
            return str(e)
        raise
    return reward_of(majority([vote.value for vote in votes]))


async def _better(client: LLMClient, settings: Judge, asked: Asked, one: Reply, other: Reply, number: int, permit: Permit) -> int:
    """1: the one, -1: the other, 0: undecided, or the orders disagree. Both orders are judged by the same model."""
    model = model_of(client, settings, number)
    orders = [pair_messages(render(_pair(asked, first, second))) for first, second in ((one, other), (other, one))]
    try:
        asks = (partial(vote_on_pair, client, settings, messages, model) for messages in orders)
        straight, swapped = await all_ended(_within(permit, ask) for ask in asks)
    except LLMRefused as e:
        if e.status in _ABOUT_THE_PROMPT:
            return 0
        raise
    return agreed(straight.value, swapped.value)


def agreed(straight: Choice | None, swapped: Choice | None) -> int:
    """1: the first is better in both orders, -1: the second; 0: undecided. `swapped` calls the second A."""
    return {("A", "B"): 1, ("B", "A"): -1}.get((straight or "", swapped or ""), 0)


def _pair(asked: Asked, first: Reply, second: Reply) -> list[Section]:
    sections = [Section("instruction", Origin.HUMAN, asked.instruction, 0.2)]
    if asked.earlier is not None:
        sections.insert(0, Section("earlier request", Origin.HUMAN, asked.earlier, 0.1))
    return [*sections, *asked.sections(), *candidate_sections(first.message, second.message)]


async def _within[T](permit: Permit, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
    async with permit():
        return await ask()
