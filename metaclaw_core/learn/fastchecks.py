"""What new weights are asked before they serve: do they still speak?

Design: pure. A few logged prompts are answered by the new weights and by the stable ones; the replies are compared as a whole:
whether any is empty, how many hold a tool call that can't be read, how long they are, and how surprised the stable weights are by
what the new ones say. These catch weights that are broken, within seconds; whether they are better or worse is for the gate, which
needs sessions.

Limits: eight replies can't show a small harm, and the bounds are wide on purpose, for a check that fails stops training. Of the
KL that is 4 nats per token: a line that learnt to earn .9 instead of .3 was seen at .7, weights taught to say quite other things at
2 to 5, babble at 8, and noise at 12 and more. Where the stable weights are nearly indifferent themselves (a model that was never
trained) even babble costs no more than the logarithm of the vocabulary, and this bound says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from metaclaw_core.model import Json

PROMPTS = 8
REPLY_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer to a logged prompt."""

    tokens: int
    empty: bool  # it ended without a word
    malformed: bool
    kl: float | None = None  # of the new weights' replies: mean of log p_new - log p_stable, nats per token; nan: no number came
    failed: str | None = None  # why nothing could be sampled; None: something was


@dataclass(frozen=True, slots=True)
class Bounds:
    empty: float = 0.5  # more empty replies than the stable weights give, as a share
    malformed: float = 0.25  # the same of malformed calls
    length: float = 8.0  # times as long, or as short, on average
    kl: float = 4.0  # nats per token


@dataclass(frozen=True, slots=True)
class Checked:
    ok: bool
    reason: str | None  # None: ok
    prompts: int
    empty: tuple[float, float]  # share of the new and of the stable replies
    malformed: tuple[float, float]
    length: tuple[float, float]  # tokens
    kl: float | None  # None: no reply holds a token, or its logprobs are no numbers

    def to_json(self) -> dict[str, Json]:
        return asdict(self)


def check(new: Sequence[Reply], stable: Sequence[Reply], bounds: Bounds = Bounds()) -> Checked:
    """Whether the new weights may serve. Without prompts they may: there is nothing to compare yet."""
    n = len(new)
    empty, malformed = _shares(new, stable, "empty"), _shares(new, stable, "malformed")
    length = _mean([r.tokens for r in new]), _mean([r.tokens for r in stable])
    known = [reply.kl for reply in new if reply.kl is not None]
    kl = _mean(known) if known and all(map(math.isfinite, known)) else None
    failed = [reply.failed for reply in new if reply.failed is not None]
    reason = None
    if failed:
        reason = f"nothing can be sampled from them: {failed[0]}"
    elif known and kl is None:
        reason = "a logprob of the replies is no number"
    elif empty[0] - empty[1] > bounds.empty:
        reason = f"{empty[0]:.0%} of the replies are empty, {empty[1]:.0%} of the stable weights'"
    elif malformed[0] - malformed[1] > bounds.malformed:
        reason = f"{malformed[0]:.0%} of the replies hold a malformed tool call, {malformed[1]:.0%} of the stable weights'"
    elif n and not 1 / bounds.length <= (length[0] + 1) / (length[1] + 1) <= bounds.length:
        reason = f"replies have {length[0]:.0f} tokens, the stable weights' {length[1]:.0f}"
    elif kl is not None and kl > bounds.kl:
        reason = f"the stable weights find the replies absurd: {kl:.1f} nats per token, at most {bounds.kl:g}"
    return Checked(reason is None, reason, n, empty, malformed, length, kl)


def _shares(new: Sequence[Reply], stable: Sequence[Reply], name: str) -> tuple[float, float]:
    return _mean([float(getattr(r, name)) for r in new]), _mean([float(getattr(r, name)) for r in stable])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
