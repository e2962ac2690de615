"""From scored turns to what an optimiser step is made of: who may take part, which of them do, and their shapes.

Design: a `Sample` is one answer with the exact ids and logprobs it was sampled with. `why_left_out` names the one
reason why it may not train; only class A ever may, and `Datum` refuses to be built from anything else, so that no
later mistake brings in tokens that are not ours. Support sessions are told apart with the evolver's own hash, before
any score is looked at. `select` takes the oldest first: they are the next to go stale.

A turn whose prompt continues an earlier turn's prompt and answer token by token shares its datum, so that the common
prefix is computed once. Every array of a datum has the shape (N,) and is aligned with the next token: position k
holds what concerns the token full[k + 1]. Nothing is ever cut or padded to fit.

Limits: turns merge within a batch only, and where a client changes its history from request to request they rarely
do; each is a datum of its own then. Prompts are re-sent whole, whatever the server may have cached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from metaclaw_core.learn.evolve import is_support

type Int32 = NDArray[np.int32]
type Float32 = NDArray[np.float32]


class LeftOut(StrEnum):
    """Why a turn trains nothing; the words are kept in `step_turns.reason`."""

    NOT_A = "not class A"
    SUPPORT = "support session"
    REDACTED = "held a secret"
    EMPTY = "no tokens"
    LENGTHS = "ids and logprobs differ in length"
    NOT_FINITE = "a logprob is not finite"
    CUT = "cut before its end"
    OTHER_LINE = "sampled from weights that the present ones do not descend from"
    STALE = "sampled too many versions ago"
    NOT_SCORED = "not scored"
    VETO = "the present weights give one of its tokens hardly any chance"
    NO_SIGNAL = "no signal"
    NO_QUESTION = "what was asked is not known"


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sampled answer. Raises ValueError for arrays of another type or with more than one axis."""

    turn: int  # id in `turns`
    session: str  # id in `sessions`
    split_by: str  # the client's own session id, for a subagent that of the session it works for: it is hashed
    human_turn: str | None
    klass: str  # "A", "B" or "C"
    prompt_ids: Int32  # (P,); empty, like the next two, where `redacted`: they were not kept
    tokens: Int32  # (T,)
    logprobs: Float32  # (T,), of the sampler
    version: int  # that it was sampled from
    stop_reason: str  # "stop", "length", "context", "aborted"
    reward: float | None  # of the judge, 0 to 1; None: no score, or one that says nothing
    malformed: bool  # it began a tool call that can't be read
    redacted: bool
    created_at: float  # unix seconds
    cluster: str  # of tasks, see `cluster`
    agent: str

    def __post_init__(self) -> None:
        for name, dtype in (("prompt_ids", np.int32), ("tokens", np.int32), ("logprobs", np.float32)):
            _check(name, getattr(self, name), dtype)

    @property
    def earned(self) -> float | None:
        """The reward; a tool call that nobody can run is worth 0, whatever the judge made of it."""
        return 0.0 if self.malformed else self.reward


def why_unfit(klass: str, split_by: str, *, redacted: bool, support_share: float) -> LeftOut | None:
    """Why neither an answer nor its prompt may be learnt from, whatever else is known of them; None: they may."""
    if klass != "A":
        return LeftOut.NOT_A
    if is_support(split_by, support_share):
        return LeftOut.SUPPORT
    return LeftOut.REDACTED if redacted else None


def why_left_out(
    sample: Sample, lags: Mapping[int, int], *, max_staleness: int, support_share: float, scored: bool = True
) -> LeftOut | None:
    """Why `sample` may not train; None: it may.

    `lags` says for each version how many steps lie between it and the present weights; one that is not in it is of
    another line. `scored` False: it is trained without a reward (a teacher alone).
    """
    if (reason := why_unfit(sample.klass, sample.split_by, redacted=sample.redacted, support_share=support_share)) is not None:
        return reason
    if sample.prompt_ids.size == 0 or sample.tokens.size == 0:
        return LeftOut.EMPTY
    if sample.logprobs.size != sample.tokens.size:
        return LeftOut.LENGTHS
    if not np.isfinite(sample.logprobs).all():
        return LeftOut.NOT_FINITE
    if sample.stop_reason != "stop":
        return LeftOut.CUT
    if sample.version not in lags:
        return LeftOut.OTHER_LINE
    if lags[sample.version] > max_staleness:
        return LeftOut.STALE
    if scored and sample.earned is None:
        return LeftOut.NOT_SCORED
    return None


def lags_of(parents: Mapping[int, int | None], present: int) -> dict[int, int]:
    """{version: steps from it to `present`} for `present` and all it descends from. `parents`: version → parent."""
    lags: dict[int, int] = {}
    version: int | None = present
    while version is not None and version not in lags:
        lags[version] = len(lags)
        version = parents.get(version)
    return lags


class Logged(Protocol):
    """What may be selected: a turn of a session."""

    @property
    def turn(self) -> int: ...
    @property
    def session(self) -> str: ...
    @property
    def created_at(self) -> float: ...


def oldest(one: Logged) -> tuple[float, ...]:
    """The order in which turns were logged."""
    return one.created_at, one.turn


def select[L: Logged](
    samples: Iterable[L], *, batch_size: int, min_sessions: int, order: Callable[[L], tuple[float, ...]] = oldest
) -> tuple[L, ...] | None:
    """The turns of the next step, in `order` (oldest first, unless another is given); None: there are not enough yet.

    Exactly `batch_size`, from at least `min_sessions` sessions, at most half from one; where one session is enough
    it may fill the batch. All `samples` must be eligible.
    """
    wanted_sessions = min(min_sessions, batch_size)
    most = batch_size if wanted_sessions == 1 else max(1, batch_size // 2)
    taken: list[L] = []
    per_session: Counter[str] = Counter()
    for sample in sorted(samples, key=order):
        free = batch_size - len(taken)
        reserved = wanted_sessions - len(per_session)  # places that only further sessions may take
        had = per_session[sample.session]
        if free == 0:
            break
        if had == 0 or (had < most and free > reserved):
            taken.append(sample)
            per_session[sample.session] += 1
    return tuple(taken) if len(taken) == batch_size else None


@dataclass(frozen=True, slots=True)
class Part:
    """Where in a datum the tokens of one turn are: positions start to stop, T of them."""

    sample: Sample
    start: int
    stop: int

    @property
    def span(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True, slots=True, eq=False)
class Datum:
    """One sequence for the trainer; all arrays (N,), next-token aligned, 0 wherever no turn's own token is the target.

    Raises ValueError for anything else, and for a part that is not class A.
    """

    input_ids: Int32  # full[:-1]
    targets: NDArray[np.int64]  # full[1:]
    logprobs: Float32  # of the sampler
    advantages: Float32
    mask: Float32  # 1: trained on
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        n = self.input_ids.size
        for name, dtype in _DATUM_TYPES.items():
            _check(name, getattr(self, name), dtype)
            if getattr(self, name).size != n:
                raise ValueError(f"{name} has {getattr(self, name).size} places, the input {n}")
        own = np.zeros(n, dtype=bool)
        for part in self.parts:
            if part.sample.klass != "A":
                raise ValueError(f"turn {part.sample.turn} is class {part.sample.klass}, which is never trained on")
            if not 0 <= part.start < part.stop <= n or part.stop - part.start != part.sample.tokens.size:
                raise ValueError(f"turn {part.sample.turn} has {part.sample.tokens.size} tokens, not {part.span}")
            if not np.array_equal(self.targets[part.span], part.sample.tokens):
                raise ValueError(f"the targets at {part.span} are not the tokens of turn {part.sample.turn}")
            own[part.span] = True
        for name in ("logprobs", "advantages", "mask"):
            if getattr(self, name)[~own].any():
                raise ValueError(f"{name} is not 0 at every position of a prompt")

    @property
    def full(self) -> Int32:
        """(N + 1,): the whole sequence."""
        return np.append(self.input_ids, self.targets[-1:].astype(np.int32))


_DATUM_TYPES: Mapping[str, Any] = {
    "input_ids": np.int32,
    "targets": np.int64,
    "logprobs": np.float32,
    "advantages": np.float32,
    "mask": np.float32,
}


def build(samples: Sequence[Sample]) -> tuple[Datum, ...]:
    """The datums of eligible samples; every turn is in exactly one of them. Advantages are 0 until they are given."""
    chains: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: (s.session, s.prompt_ids.size, s.created_at, s.turn)):
        longest = max(
            (chain for chain in chains if _extends(sample, chain[-1])),
            key=lambda chain: chain[-1].prompt_ids.size + chain[-1].tokens.size,
            default=None,
        )
        if longest is None:
            chains.append([sample])
        else:
            longest.append(sample)
    return tuple(_datum(chain) for chain in chains)


def with_advantages(datum: Datum, advantages: Mapping[int, float | NDArray[Any]]) -> Datum:
    """`datum` with what its turns are to learn, by turn id: one value for all tokens, or (T,). Turns without one are
    masked. Raises ValueError where a length differs."""
    values = np.zeros_like(datum.advantages)
    mask = np.zeros_like(datum.mask)
    for part in datum.parts:
        given = advantages.get(part.sample.turn)
        if given is None:
            continue
        array = np.asarray(given, dtype=np.float32)
        if array.shape not in ((), (part.stop - part.start,)):
            raise ValueError(
                f"turn {part.sample.turn} has {part.stop - part.start} tokens and advantages of shape {array.shape}"
            )
        values[part.span] = array
        mask[part.span] = 1.0
    return replace(datum, advantages=values, mask=mask)


def _extends(sample: Sample, before: Sample) -> bool:
    """Is the prompt of `sample` the prompt and answer of `before`, and more?"""
    prompt, head = sample.prompt_ids, before.prompt_ids.size
    end = head + before.tokens.size
    return (
        sample.session == before.session
        and prompt.size >= end
        and np.array_equal(prompt[:head], before.prompt_ids)
        and np.array_equal(prompt[head:end], before.tokens)
    )


def _datum(chain: Sequence[Sample]) -> Datum:
    last = chain[-1]
    full = np.concatenate((last.prompt_ids, last.tokens))
    logprobs = np.zeros(full.size - 1, dtype=np.float32)
    mask = np.zeros_like(logprobs)
    parts = []
    for sample in chain:
        start = sample.prompt_ids.size - 1  # where the first sampled token is the target
        part = Part(sample, start, start + sample.tokens.size)
        logprobs[part.span] = sample.logprobs
        mask[part.span] = 1.0
        parts.append(part)
    return Datum(
        input_ids=full[:-1],
        targets=full[1:].astype(np.int64),
        logprobs=logprobs,
        advantages=np.zeros_like(logprobs),
        mask=mask,
        parts=tuple(parts),
    )


def _check(name: str, array: NDArray[Any], dtype: Any) -> None:
    if array.ndim != 1 or array.dtype != dtype:
        raise ValueError(f"{name} must be {np.dtype(dtype)} with one axis, not {array.dtype} of shape {array.shape}")
