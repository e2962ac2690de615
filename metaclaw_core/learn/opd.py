"""On-policy distillation: what a teacher would have said of the student's own tokens.

Design: the advantage of a token is -β · (log p_student - log p_teacher), clipped, for the exact ids that were sampled:
its expectation is -β times the reverse KL, whose gradient the usual loss then follows. The student's logprobs are
those of the present weights; how far the sampler's were off is the loss's business, as for any advantage. A judge's
score of 0 or none masks nothing here. What the teacher returns has exactly one value per id, the first of them
unknown, or the turn is dropped: one value too few, filled up, would reward the least likely tokens most.

Limits: teacher and student must share a tokenizer (`teacher` checks it). One token's log-ratio is a noisy estimate of
the KL at its place, and there is no credit for what a token leads to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaclaw_core.learn.batch import Datum, Float32

CLIP = 5.0


def aligned(values: Sequence[float | None], n: int) -> Float32 | None:
    """Teacher logprobs of the n + 1 ids of a datum as (n,), next-token aligned; None: they are not one finite number
    for each id but the first, whose value is not looked at."""
    if len(values) != n + 1 or any(value is None for value in values[1:]):
        return None
    array = np.asarray(values[1:], dtype=np.float32)
    return array if np.isfinite(array).all() else None


def opd_advantages(
    datum: Datum, student: NDArray[Any], teacher: NDArray[Any], *, beta: float, clip: float = CLIP
) -> dict[int, Float32]:
    """{turn: (T,)} for each turn of `datum`; `student` (the present weights') and `teacher`: (N,) logprobs.

    Raises ValueError where a length differs.
    """
    if student.shape != datum.targets.shape or teacher.shape != datum.targets.shape:
        raise ValueError(f"the datum is {datum.targets.shape}, student {student.shape}, teacher {teacher.shape}")
    difference = student.astype(np.float64) - teacher.astype(np.float64)
    values = np.clip(-beta * difference, -clip, clip).astype(np.float32)
    return {part.sample.turn: values[part.span] for part in datum.parts}


def reverse_kl(datum: Datum, student: NDArray[Any], teacher: NDArray[Any]) -> float:
    """The estimate of KL(student ‖ teacher), nats per token, over all turns of `datum`."""
    own = np.concatenate([student[p.span].astype(np.float64) - teacher[p.span] for p in datum.parts])
    return float(own.mean())


def combined(judged: Mapping[int, float], taught: Mapping[int, Float32]) -> dict[int, float | Float32]:
    """The sum of both by turn; a turn that only one of them speaks of has that one's."""
    both: dict[int, float | Float32] = dict(judged)
    for turn, values in taught.items():
        both[turn] = values + np.float32(judged.get(turn, 0.0))
    return both
