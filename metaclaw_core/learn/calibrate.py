"""How far the judge can be believed: agreement, order flips and calibration against what is known.

Design: a file holds one JSON object a line. A *pair* has an instruction and two candidate steps of which
one is known to be better; the judge compares them in both orders. A *label* has an instruction, a step,
perhaps what came of it, and the score it should get; the judge scores it as it scores a turn.

    {"instruction": "…", "better": ACTION, "worse": ACTION}
    {"instruction": "…", "action": ACTION, "next": "the human's next message", "label": -1}
    ACTION: "text", or {"text": "…", "calls": [{"name": "…", "arguments": {…}}]}

Agreement is Cohen's κ, so that a judge that always says the same gets 0 however often it is right; an
abstention is an answer that agrees with nothing. A flip is a pair whose verdict changes with the order.
Calibration error compares how many votes a verdict had with how often such verdicts are right.

Limits: with a few dozen items κ has a standard error of about .1; calibration needs several votes.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import batched
from typing import Any

from metaclaw_core.errors import MetaClawError, WireError
from metaclaw_core.learn.judge import (
    Score,
    Vote,
    all_ended,
    majority,
    model_of,
    pair_messages,
    turn_messages,
    vote_on_pair,
    vote_on_turn,
)
from metaclaw_core.learn.llm import LLMClient, LLMUnavailable
from metaclaw_core.learn.nextstate import NextState
from metaclaw_core.learn.transcript import Origin, Rendered, Section, candidate_sections, render, turn_sections
from metaclaw_core.model import Json, Message, Part, Role, Text, ToolCall
from metaclaw_core.settings import Judge
from metaclaw_core.wire.jsonio import dumps, loads_object

_AT_ONCE = 64  # items; the client bounds the requests
_MAX_COMPLAINTS = 10
_BINS = 10


class CalibrationError(MetaClawError):
    """A file of pairs or labels can't be used; the message names the lines."""


@dataclass(frozen=True, slots=True)
class Pair:
    id: str
    instruction: str
    better: Message
    worse: Message


@dataclass(frozen=True, slots=True)
class Label:
    id: str
    instruction: str
    action: Message
    next: str | None
    label: Score


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the judge made of one item in one order."""

    id: str
    expected: str  # the right verdict: "A", "B", "1", "0", "-1"
    verdict: str | None  # None: no majority
    confidence: float | None  # share of all votes that the verdict had; None without a verdict
    reply: str | None = None  # pairs: "better", "worse" or "neither", whatever its place was


@dataclass(frozen=True, slots=True)
class Calibration:
    pairs: int
    labels: int
    unanswered: int  # items that the judge gave no answer to; they count nowhere else
    abstained: int  # of the verdicts asked for (two a pair)
    kappa: float | None  # None: nothing was answered, or only one verdict is possible
    agreement: float | None  # raw: share of verdicts that are right
    flips: float | None  # share of the pairs with a verdict in both orders; None: there is none
    first_place: float | None  # share of the verdicts for A or B that went to A; .5 without a bias
    calibration_error: float | None


# --- reading ------------------------------------------------------------------------------------


def read_items(lines: Iterable[str], source: str) -> list[Pair | Label]:
    """Raises CalibrationError with the first few lines that are wrong, each with its number."""
    items: list[Pair | Label] = []
    complaints: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            items.append(_item(loads_object(line, "the line"), f"line {number}"))
        except WireError as e:
            complaints.append(f"{source}:{number}: {e}.")
    if complaints:
        more = len(complaints) - _MAX_COMPLAINTS
        rest = [f"… and {more} more lines."] if more > 0 else []
        raise CalibrationError("\n".join(complaints[:_MAX_COMPLAINTS] + rest))
    if not items:
        raise CalibrationError(f"{source} holds no pair and no label.")
    return items


_PAIR_KEYS = frozenset({"id", "instruction", "better", "worse"})
_LABEL_KEYS = frozenset({"id", "instruction", "action", "next", "label"})


def _item(value: dict[str, Json], default_id: str) -> Pair | Label:
    is_pair = "better" in value or "worse" in value
    keys = _PAIR_KEYS if is_pair else _LABEL_KEYS
    wanted = ("instruction", "better", "worse") if is_pair else ("instruction", "action", "label")
    if missing := [key for key in wanted if key not in value]:
        raise WireError(f"{', '.join(missing)} is missing; a pair has better and worse, a label action and label")
    if unknown := sorted(set(value) - keys):
        raise WireError(f"{', '.join(unknown)} is not known; known are {', '.join(sorted(keys))}")
    name, instruction = value.get("id", default_id), value["instruction"]
    if not isinstance(name, str) or not isinstance(instruction, str) or not instruction.strip():
        raise WireError("id and instruction must be text")
    if is_pair:
        pair = Pair(name, instruction, _action(value["better"], "better"), _action(value["worse"], "worse"))
        if pair.better == pair.worse:
            raise WireError("better and worse are the same")
        return pair
    label, after = value["label"], value.get("next")
    if isinstance(label, bool) or label not in (1, 0, -1):
        raise WireError(f"label is {label!r}; it must be 1, 0 or -1")
    if after is not None and not isinstance(after, str):
        raise WireError("next must be text")
    return Label(name, instruction, _action(value["action"], "action"), after, int(label))  # type: ignore[arg-type]


def _action(value: Json, what: str) -> Message:
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict) or set(value) - {"text", "calls"}:
        raise WireError(f"{what} must be text, or an object with text and calls")
    text, calls = value.get("text", ""), value.get("calls", [])
    if not isinstance(text, str) or not isinstance(calls, list):
        raise WireError(f"{what}: text must be text and calls a list")
    parts: list[Part] = [Text(text)] if text.strip() else []
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise WireError(f"{what}: a call needs a name and arguments")
        arguments = call["arguments"]
        parts.append(ToolCall(call["name"], arguments if isinstance(arguments, str) else dumps(arguments)))
    if not parts:
        raise WireError(f"{what} is empty")
    return Message(Role.ASSISTANT, tuple(parts))


# --- asking -------------------------------------------------------------------------------------


async def examine(
    items: Sequence[Pair | Label],
    client: LLMClient,
    settings: Judge,
    *,
    votes: int = 1,
    on_item: Callable[[], None] = lambda: None,
) -> tuple[list[Outcome], int]:
    """The judge's verdicts (two a pair), and how many items it did not answer. `on_item` is told of each.

    Raises LLMUnavailable once more than one item in ten (and more than three) have no answer, LLMRefused, BudgetExhausted.
    """
    outcomes: list[Outcome] = []
    unanswered = 0
    bound = max(3, len(items) // 10)
    for some in batched(enumerate(items), _AT_ONCE):
        answers = await asyncio.gather(
            *(_told(_one(item, n, client, settings, votes), on_item) for n, item in some), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, LLMUnavailable):
                unanswered += 1
                if unanswered > bound:
                    raise answer
            elif isinstance(answer, BaseException):
                raise answer
            else:
                outcomes += answer
    return outcomes, unanswered


async def _told[T](work: Any, on_item: Callable[[], None]) -> T:
    try:
        result: T = await work
        return result
    finally:
        on_item()


async def _one(item: Pair | Label, number: int, client: LLMClient, settings: Judge, votes: int) -> list[Outcome]:
    if isinstance(item, Label):
        after = NextState((), item.next) if item.next is not None else None
        messages = turn_messages(render(turn_sections(item.instruction, item.action, after)), next_known=after is not None)
        asked = (vote_on_turn(client, settings, messages, model_of(client, settings, n)) for n in range(votes))
        return [_outcome(item.id, str(item.label), await all_ended(asked))]
    # A flip must be the order's doing, so a pair's two orders are judged by the same models.
    models = [model_of(client, settings, number + n) for n in range(votes)]
    orders = [pair_messages(_shown(item, order)) for order in ("straight", "swapped")]
    given = await all_ended(vote_on_pair(client, settings, messages, m) for messages in orders for m in models)
    return [_outcome(item.id, "A", given[:votes]), _outcome(item.id, "B", given[votes:])]


def _shown(pair: Pair, order: str) -> Rendered:
    first, second = (pair.better, pair.worse) if order == "straight" else (pair.worse, pair.better)
    return render([Section("instruction", Origin.HUMAN, pair.instruction, 0.2), *candidate_sections(first, second)])


def _outcome(name: str, expected: str, votes: Sequence[Vote[Any]]) -> Outcome:
    values: list[Any] = [vote.value for vote in votes]
    value = majority(values)
    if value is None:
        return Outcome(name, expected, None, None)
    verdict = str(value)
    reply = None
    if expected in ("A", "B"):
        reply = "neither" if verdict == "neither" else "better" if verdict == expected else "worse"
    return Outcome(name, expected, verdict, values.count(value) / len(values), reply)


# --- counting -----------------------------------------------------------------------------------


def summarise(outcomes: Sequence[Outcome], unanswered: int = 0) -> Calibration:
    """The numbers; each is None where there is nothing to count."""
    verdicts = [o.verdict for o in outcomes]
    decided = [o for o in outcomes if o.verdict is not None and o.confidence is not None]
    placed = Counter(v for v in verdicts if v in ("A", "B"))
    both = defaultdict(list)
    for o in outcomes:
        if o.expected in ("A", "B"):
            both[o.id].append(o.reply)
    replies = [found for found in both.values() if len(found) == 2 and None not in found]
    return Calibration(
        pairs=len(both),
        labels=sum(o.expected not in ("A", "B") for o in outcomes),
        unanswered=unanswered,
        abstained=len(outcomes) - len(decided),
        kappa=cohen_kappa([(o.expected, o.verdict) for o in outcomes]),
        agreement=_share(o.verdict == o.expected for o in outcomes),
        flips=_share(one != other for one, other in replies),
        first_place=placed["A"] / placed.total() if placed else None,
        calibration_error=expected_calibration_error(
            [(o.confidence, o.verdict == o.expected) for o in decided if o.confidence is not None]
        ),
    )


def cohen_kappa(pairs: Sequence[tuple[str, str | None]]) -> float | None:
    """Agreement beyond chance of (right, given) verdicts; a given None agrees with nothing."""
    if not pairs:
        return None
    n = len(pairs)
    right, given = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    observed = sum(a == b for a, b in pairs) / n
    chance = sum(right[v] * given[v] for v in right) / n**2
    return None if chance == 1 else (observed - chance) / (1 - chance)


def expected_calibration_error(verdicts: Sequence[tuple[float, bool]]) -> float | None:
    """Mean gap between confidence and being right, over ten bins of confidence weighted by their size."""
    bins: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for confidence, right in verdicts:
        bins[min(int(confidence * _BINS), _BINS - 1)].append((confidence, right))
    if not bins:
        return None
    return sum(abs(sum(c for c, _ in some) - sum(r for _, r in some)) for some in bins.values()) / len(verdicts)


def _share(which: Iterable[bool]) -> float | None:
    found = list(which)
    return sum(found) / len(found) if found else None
