"""The optimiser's part of a step: from claimed turns to weights that are saved, or to the reason why there are none.

Design: what is learnt from (`Work`) says which samples there are, what each is to learn and which claimed turn speaks for it; the
calls are the same whatever it is: forward, compare, teacher, backward, save, write down. The guards are asked again before each
call that costs much, and until the weights are saved the step can be undone by giving its claim back.

Everything the next step depends on (value trackers, task clusters) is written with the step that used it, and nothing else enters
it, so a step over the same samples that is done again after a kill is the same step. A batch that teaches nothing makes no step,
and each of its turns says why.

Limits: one step at a time, on the state that the server is at.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from metaclaw_core.learn import journal
from metaclaw_core.learn.advantage import Tracker, key_of, single
from metaclaw_core.learn.batch import Datum, Float32, LeftOut, Sample, build, with_advantages
from metaclaw_core.learn.carried import to_carry, tracker_of
from metaclaw_core.learn.cluster import Clusters
from metaclaw_core.learn.guards import Guards
from metaclaw_core.learn.journal import Trained, Version
from metaclaw_core.learn.llm import LLMRefused, LLMUnavailable
from metaclaw_core.learn.losses import Comparison, Limits, TurnRatio, compare, prepare
from metaclaw_core.learn.money import book_training
from metaclaw_core.learn.opd import combined
from metaclaw_core.learn.teacher import TeacherUnfit
from metaclaw_core.learn.teaching import Lesson, Teaching
from metaclaw_core.learn.trainer import ServerError, TrainingServer
from metaclaw_core.model import Json
from metaclaw_core.settings import Settings
from metaclaw_core.store.rollouts import Store


class Work(Protocol):
    """What a claimed step learns from."""

    @property
    def samples(self) -> Sequence[Sample]:
        """What the datums are made of; none: there is nothing to learn."""

    @property
    def clusters(self) -> Clusters:
        """With the tasks of this step."""

    def advantages(self, tracker: Tracker, good: Sequence[Sample]) -> tuple[Mapping[int, float], Tracker]:
        """What each of the `good` samples is to learn, by `Sample.turn`, and the tracker that has seen their rewards."""

    def told(self, said: Sequence[Trained]) -> list[Trained]:
        """One for each claimed turn, from one for each sample."""

    def metrics(self, said: Sequence[Trained]) -> dict[str, Json]:
        """That take the place of those of the samples. `said`: as for `told`."""


@dataclass(frozen=True, slots=True)
class Replies:
    """Logged replies, each against what was to be expected of it: a claimed turn is its own sample."""

    samples: Sequence[Sample]  # placed in clusters
    clusters: Clusters

    def advantages(self, tracker: Tracker, good: Sequence[Sample]) -> tuple[Mapping[int, float], Tracker]:
        rewarded = [(s, s.earned) for s in good if s.earned is not None]
        keys = [key_of(s.cluster, s.agent) for s, _ in rewarded]
        values, tracker = single(tracker, keys, [reward for _, reward in rewarded])
        if values is None:
            return {}, tracker
        return {s.turn: float(value) for (s, _), value in zip(rewarded, values, strict=True)}, tracker

    def told(self, said: Sequence[Trained]) -> list[Trained]:
        return list(said)

    def metrics(self, said: Sequence[Trained]) -> dict[str, Json]:
        return {}


class Optimiser:
    def __init__(
        self,
        store: Store,
        settings: Settings,
        server: TrainingServer,
        guards: Guards,
        teaching: Teaching | None,
        limits: Limits,
        at: Callable[[str], None],
    ) -> None:
        self._store, self._settings, self._server, self._guards = store, settings, server, guards
        self._teaching, self._limits, self._at = teaching, limits, at

    @property
    def learning_rate(self) -> float:
        rl = self._settings.rl
        return rl.learning_rate or 2e-5 * math.sqrt(min(rl.batch_size, 32) / 32)

    async def make(self, step: int, base: Version, work: Work, lags: Mapping[int, int]) -> int | str:
        """The new version's number; or why there is none. The turns say so, too, unless they may be taken again.

        `lags`: {version: steps from it to `base`}. Raises ServerError, StoreError.
        """
        rl, began, batch = self._settings.rl, time.monotonic(), work.samples
        tracker = tracker_of(self._store)
        if not batch:
            _, tracker = work.advantages(tracker, ())
            return self._discard(step, work, (), work.metrics(()), to_carry(tracker, work.clusters))
        datums = build(batch)
        present = await self._server.forward(datums)
        book_training(self._store, "forward", rl.model, sum(d.input_ids.size for d in datums))
        self._at("forward")
        compared = compare(datums, present)
        ratios = {one.turn: one for one in compared.turns}
        staleness = {s.turn: lags[s.version] for s in batch}
        if (problem := compared.metrics.problem(self._limits)) is not None:
            said = [_trained(s, ratios[s.turn], {}, staleness, Lesson()) for s in batch]
            metrics = _metrics(said, batch, compared, staleness) | {"loss": rl.loss, "datums": len(datums)} | work.metrics(said)
            return self._discard(step, work, said, metrics, {}, problem)
        if (waits := self._guards.closed()) is not None:  # nothing has been changed yet
            journal.abandon(self._store, step, waits)
            return waits
        lesson = await self._lesson(datums, present)
        self._at("taught")
        if compared.metrics.drift is not None:
            tracker = tracker.moved(compared.metrics.drift)
        good = [s for s in batch if ratios[s.turn].left_out is None and s.turn not in lesson.dropped]
        judged, tracker = work.advantages(tracker, good)
        advantages = combined(judged, {s.turn: lesson.advantages[s.turn] for s in good if s.turn in lesson.advantages})
        said = [_trained(s, ratios[s.turn], advantages, staleness, lesson) for s in batch]
        metrics = _metrics(said, batch, compared, staleness) | {"loss": rl.loss, "datums": len(datums), "teacher_kl": lesson.kl}
        metrics |= work.metrics(said)
        call = prepare([with_advantages(d, advantages) for d in datums], present, loss=rl.loss)
        if call is None:
            return self._discard(step, work, said, metrics, to_carry(tracker, work.clusters))
        if (waits := self._guards.closed()) is not None:
            journal.abandon(self._store, step, waits)
            return waits
        self._at("before step")
        served = await self._server.step(call, self.learning_rate)
        book_training(self._store, "train", rl.model, sum(d.input_ids.size for d in datums))
        self._at("stepped")
        path = await self._server.save_state(f"step-{step}")
        self._at("state saved")
        metrics |= {
            "tokens": call.tokens,
            "clipped": call.clipped,
            "learning_rate": self.learning_rate,
            "seconds": round(time.monotonic() - began, 3),
            "server": {name: value for name, value in served.items() if math.isfinite(value)},
        }
        version = journal.saved(self._store, step, path, work.told(said), metrics, to_carry(tracker, work.clusters))
        self._at("saved")
        return version

    def _discard(
        self,
        step: int,
        work: Work,
        said: Sequence[Trained],
        metrics: Mapping[str, Json],
        carried: Mapping[str, Json],
        problem: str | None = None,
    ) -> str:
        """No step is made, for a reason that lies in the turns; it. `problem` None: they hold no signal."""
        why = problem or str(LeftOut.NO_SIGNAL)
        journal.discarded(self._store, step, [_because(one, why) for one in work.told(said)], metrics, carried, why)
        return problem or "the batch held nothing to learn: no signal"

    async def _lesson(self, datums: Sequence[Datum], present: Sequence[Float32]) -> Lesson:
        """What the teacher says of the batch; without one, nothing. Raises ServerError."""
        if self._teaching is None:
            return Lesson()
        tokenizer = await self._server.tokenizer()
        try:
            await self._teaching.ready(tokenizer)
            return await self._teaching.teach(datums, present)
        except LLMUnavailable as e:
            raise ServerError("teacher_down", str(e)) from e
        except (TeacherUnfit, LLMRefused) as e:
            raise ServerError("teacher", str(e)) from e


def _metrics(
    said: Sequence[Trained], batch: Sequence[Sample], compared: Comparison, staleness: Mapping[int, int]
) -> dict[str, Json]:
    """By the names that `view.training` shows them under."""
    earned = [s.earned for s in batch if s.earned is not None]
    taught = [abs(one.advantage) for one in said if one.advantage is not None]
    found = compared.metrics
    return {
        "turns": len(batch),
        "skipped": sum(one.reason is not None for one in said),
        "vetoed": found.vetoed,
        "reward_mean": mean(earned),
        "advantage_abs_mean": mean(taught),
        "kl": found.kl_k1,
        "kl_v2": found.kl_k2,
        "ratio_mean": found.mean_ratio,
        "ess": found.ess,
        "staleness_mean": mean(list(staleness.values())),
        "sessions": len({s.session for s in batch}),
    }


def _trained(
    sample: Sample, ratio: TurnRatio, advantages: Mapping[int, Any], staleness: Mapping[int, int], lesson: Lesson
) -> Trained:
    given = advantages.get(sample.turn)
    reason = ratio.left_out or lesson.dropped.get(sample.turn) or (None if given is not None else LeftOut.NO_SIGNAL)
    return Trained(
        sample.turn,
        None if reason is None else str(reason),
        sample.earned,
        None if given is None else float(np.mean(given)),
        ratio.mean,
        staleness[sample.turn],
    )


def _because(one: Trained, why: str) -> Trained:
    """No step was made: why, unless the turn has a reason of its own."""
    return replace(one, reason=one.reason if one.reason not in (None, str(LeftOut.NO_SIGNAL)) else why)


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
