"""The teacher's part of a step (on-policy distillation): what it says of a batch, and whether it may say anything.

Design: the teacher is put to the test of its tokenizer once per process; what came of it is a row of `health`, so that
``metaclaw train status`` shows the sentence. While the teacher is unfit no step is made: a user who asked for a teacher is not
silently given less. Each datum is scored as a whole, and where the answer does not fit its ids all of its turns are dropped,
each with the reason. What the teacher read is booked as "teacher".

Limits: a teacher that can't be reached stops a step before it changed anything; the batch waits with it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from metaclaw_core.errors import ConfigError
from metaclaw_core.learn.batch import Datum, Float32
from metaclaw_core.learn.endpoint import Endpoint
from metaclaw_core.learn.money import book_readings
from metaclaw_core.learn.opd import aligned, opd_advantages, reverse_kl
from metaclaw_core.learn.teacher import Teacher, TeacherUnfit, Tokenizer
from metaclaw_core.settings import Settings
from metaclaw_core.store.queries import upsert
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import health

NAME = "teacher"  # in `health`


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a teacher said of a batch."""

    advantages: Mapping[int, Float32] = field(default_factory=dict)  # by turn, (T,)
    dropped: Mapping[int, str] = field(default_factory=dict)  # turn → why nothing is known of it
    kl: float | None = None  # estimate of KL(student ‖ teacher), nats per token; None: of no turn


class Teaching:
    """One teacher for one student. Close it with `aclose`."""

    def __init__(self, store: Store, settings: Settings, teacher: Teacher) -> None:
        self._store, self._beta, self._teacher = store, settings.opd.kl_penalty_coef, teacher
        self._fit = False

    async def ready(self, tokenizer: Tokenizer) -> None:
        """Raises TeacherUnfit, LLMUnavailable, LLMRefused."""
        if self._fit:
            return
        try:
            await self._teacher.check(tokenizer)
        except TeacherUnfit as e:
            _keep(self._store, str(e))
            raise
        _keep(self._store, None)
        self._fit = True

    async def teach(self, datums: Sequence[Datum], student: Sequence[Float32]) -> Lesson:
        """`student`: (N,) logprobs of the present weights, one array per datum. Raises LLMUnavailable, LLMRefused."""
        answers = await asyncio.gather(*(self._teacher.score(d.full.tolist()) for d in datums))
        book_readings(self._store, "teacher", self._teacher.endpoint.model, [d.full.size for d in datums])
        advantages: dict[int, Float32] = {}
        dropped: dict[int, str] = {}
        kls: list[tuple[float, int]] = []
        for datum, logprobs, taught in zip(datums, student, answers, strict=True):
            values = None if taught.logprobs is None else aligned(taught.logprobs, datum.targets.size)
            if values is None:
                why = taught.problem or "its logprobs are not one finite number for each id"
                dropped |= {part.sample.turn: f"the teacher says nothing of it: {why}" for part in datum.parts}
                continue
            advantages |= opd_advantages(datum, logprobs, values, beta=self._beta)
            kls.append((reverse_kl(datum, logprobs, values), sum(part.stop - part.start for part in datum.parts)))
        kl = float(np.average([k for k, _ in kls], weights=[n for _, n in kls])) if kls else None
        return Lesson(advantages, dropped, kl)

    async def aclose(self) -> None:
        await self._teacher.aclose()


def teaching_of(store: Store, settings: Settings) -> Teaching | None:
    """What ``opd.*`` names; None: nothing is distilled. Raises ConfigError."""
    opd = settings.opd
    if not opd.enabled:
        return None
    if not opd.teacher_url or not opd.teacher_model:
        raise ConfigError("opd.enabled needs opd.teacher_url (such as http://HOST:8000/v1) and opd.teacher_model.")
    return Teaching(store, settings, Teacher(Endpoint(opd.teacher_url, opd.teacher_model, opd.teacher_api_key.strip())))


def _keep(store: Store, reason: str | None) -> None:
    row = {"name": NAME, "ok": reason is None, "reason": reason, "checked_at": time.time(), "detail": {}}
    with store.transaction() as db:
        insert = upsert(db.dialect.name, health)
        db.execute(insert.on_conflict_do_update(index_elements=["name"], set_={n: insert.excluded[n] for n in row if n != "name"}), row)
