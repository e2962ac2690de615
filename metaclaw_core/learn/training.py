"""One optimiser step after the other: from scored answers to weights that serve.

Design: `Trainer.run_once` does at most one step and says what it did, or why it did nothing. What was cut off before is ended
first: the journal says where it stood. Then the guards (windows, budget, judge), then the step in the order of `journal`: open,
claim, forward, teacher, backward, save, write down, publish, check, route. Whatever fails before the weights are saved undoes the
claim and drops the connection; whatever fails after it is taken up where it was at a later run. The guards are asked again before
each call that costs much, so a user who comes back, or a budget that is spent, waits for no more than the call in flight. A batch
that teaches nothing makes no step, and each of its turns says why.

Everything the next step depends on (value trackers, task clusters) is written with the step that used it, and nothing else enters
it, so a step that is done again after a kill is the same step.

After a failure the next try waits, longer each time; where only a person can help (bill, key, weights that are gone), ten
minutes at once.

Limits: callers hold the lease of the job "train". One step at a time, on one base model. While the route is pinned by hand nothing
is trained: answers of the pinned version would soon be too many versions old to learn from.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import func, select

from metaclaw_core.errors import ConfigError, StoreError
from metaclaw_core.learn import journal
from metaclaw_core.learn.advantage import Tracker, key_of, single
from metaclaw_core.learn.batch import Datum, Float32, LeftOut, Sample, build, lags_of, why_left_out, with_advantages
from metaclaw_core.learn.batch import select as select_batch
from metaclaw_core.learn.candidates import candidates, placed, waiting
from metaclaw_core.learn.cluster import Clusters
from metaclaw_core.learn.endpoint import judge_endpoint
from metaclaw_core.learn.fastchecks import Bounds
from metaclaw_core.learn.health import health_of, rl_pause_reason
from metaclaw_core.learn.journal import StepState, Trained, Version
from metaclaw_core.learn.llm import LLMRefused, LLMUnavailable
from metaclaw_core.learn.losses import Comparison, Limits, compare, prepare
from metaclaw_core.learn.money import book_training, over_budget
from metaclaw_core.learn.opd import combined
from metaclaw_core.learn.prices import Prices, load_prices
from metaclaw_core.learn.publish import publish
from metaclaw_core.learn.teacher import TeacherUnfit
from metaclaw_core.learn.teaching import Lesson, teaching_of
from metaclaw_core.learn.trainer import ServerError, TrainingServer
from metaclaw_core.learn.trial import trial
from metaclaw_core.learn.windows import closed
from metaclaw_core.model import Json
from metaclaw_core.settings import Settings
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import steps, turns, versions

_FETCHED = 2_048  # candidates looked at, at most; more than this many wait for the next run
_FINAL = frozenset(LeftOut) - {LeftOut.NO_SIGNAL}  # reasons that no later step can mend
_FOR_A_PERSON = frozenset({"auth", "billing", "missing", "lost", "teacher"})  # failures that no waiting ends
_RETRY_SECONDS = 5.0  # before the first new try; twice as long after each, up to
_LONGEST = 120  # times that

_BOUNDS, _LIMITS = Bounds(), Limits()

type At = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class StepReport:
    made: bool = False
    waits: str | None = None  # why no step was made, or why what was made does not serve yet; None: one was, and it was decided on
    step: int | None = None
    version: int | None = None
    skipped: int = 0  # turns that will never be trained on
    problems: tuple[str, ...] = ()

    def says_something(self) -> bool:
        return self.made or bool(self.problems) or self.skipped > 0


class Trainer:
    def __init__(
        self,
        store: Store,
        settings: Settings,
        home: Path,
        server: TrainingServer,
        prices: Prices,
        *,
        at: At = lambda _: None,
        bounds: Bounds = _BOUNDS,
        limits: Limits = _LIMITS,
        retry_s: float = _RETRY_SECONDS,
    ) -> None:
        """`at` is told of each point between two effects (for tests that kill there). Raises ConfigError for a judge or a
        teacher that is set by halves."""
        self._store, self._settings, self._home, self._server, self._prices = store, settings, home, server, prices
        self._at, self._bounds, self._limits, self._retry_s = at, bounds, limits, retry_s
        self._teaching = teaching_of(store, settings)
        self._judge = judge_endpoint(settings)
        self._failures, self._not_before = 0, 0.0
        self._looked: tuple[tuple[int, int, int], str] | None = None  # what was there at the last look, and why it was not enough
        self._kept: set[int] = set()  # versions whose state was told to stay, by this process

    @property
    def learning_rate(self) -> float:
        rl = self._settings.rl
        return rl.learning_rate or 2e-5 * math.sqrt(min(rl.batch_size, 32) / 32)

    async def begin(self) -> Version:
        """The version training begins with, and its route; makes them where there are none. Raises ServerError, StoreError."""
        rl = self._settings.rl
        state = rl.resume_from_ckpt or None
        sampler = expires = None
        if state is not None and not self._goes_on_from(state):
            try:
                await self._server.open(state)
            except ServerError as e:
                if e.kind != "missing":
                    raise
                raise ServerError("lost", f"rl.resume_from_ckpt names {state}, which the training server does not have.") from e
            ttl = self._ttl()
            sampler, expires = await self._server.save_weights("resumed", ttl), time.time() + ttl
            self._at("resumed")
        version = journal.begin(self._store, rl.model, state, sampler, expires)
        publish(self._store, self._settings, self._prices, self._home)
        return version

    async def run_once(self) -> StepReport:
        """At most one step. Raises StoreError where the store can't be used."""
        if (left := self._not_before - time.monotonic()) > 0:
            return StepReport(waits=f"the last try failed; the next one is in {left:.0f} s")
        try:
            await self.begin()
            problems = await self._recover()
            await self._stay()
            if (waits := self._pinned() or self._guard()) is not None:
                return StepReport(waits=waits, problems=problems)
            report = await self._step(problems)
        except ServerError as e:
            await self._server.aclose()  # its session may be gone as well
            times = _LONGEST if e.kind in _FOR_A_PERSON else min(_LONGEST, 2**self._failures)
            self._failures += 1
            self._not_before = time.monotonic() + times * self._retry_s
            return StepReport(waits=str(e), problems=(str(e),))
        self._failures = 0
        return report

    async def aclose(self) -> None:
        if self._teaching is not None:
            await self._teaching.aclose()
        await self._server.aclose()

    # --- before a step ------------------------------------------------------------------------

    def _guard(self) -> str | None:
        """Why nothing may be trained now; None: it may."""
        if not self._settings.rl.train:
            return "rl.train is off"
        if (spent := over_budget(self._store, self._settings, self._prices)) is not None:
            return spent
        return self._judge_unfit() or self._window()

    def _judge_unfit(self) -> str | None:
        if self._judge is not None:
            reason = rl_pause_reason(self._store, self._settings)
            return None if reason is None else f"nothing is trained on the judge's scores: {reason}"
        last = None if self._unjudged else health_of(self._store)
        return None if last is None or last.ok else f"the judge did not pass its examination: {last.reason}"

    def _pinned(self) -> str | None:
        current = journal.in_force(self._store)
        if current is None or not current.pinned:
            return None
        return f"the route is pinned to version {current.working}; `metaclaw route unpin` lets training go on"

    @property
    def _unjudged(self) -> bool:
        """A teacher alone: no judge will ever score the turns."""
        return self._teaching is not None and self._judge is None

    def _window(self) -> str | None:
        if self._settings.rl.schedule == "immediate":
            return None
        with self._store.reading() as db:
            last = db.scalar(select(func.max(turns.c.started_at)).where(turns.c.live))
        return closed(self._settings.rl, datetime.now(), None if last is None else datetime.fromtimestamp(last))

    async def _recover(self) -> tuple[str, ...]:
        """End what was cut off."""
        said = []
        for row in journal.open_steps(self._store):
            number = row["id"]
            if row["state"] == StepState.CLAIMED:
                journal.abandon(self._store, number, "it was cut off")
                said.append(f"step {number} was cut off and is undone")
                continue
            try:
                waits = await self._finish(number, row["version"])
            except ServerError as e:
                if e.kind != "lost":
                    raise
                journal.rejected(self._store, number, {}, str(e))
                said.append(f"step {number} was cut off and can't be carried on: {e}")
                continue
            if waits is None:
                said.append(f"step {number} was cut off and is carried on")
        return tuple(said)

    async def _stay(self) -> None:
        """What serves must not expire while nothing is trained."""
        current = journal.in_force(self._store)
        if current is None:
            return
        soon = time.time() + self._ttl() / 2
        for number in sorted({current.working, current.stable}):
            version = journal.version(self._store, number)
            if version.expires_at is not None and version.expires_at < soon:
                await self._living(version)

    # --- a step -------------------------------------------------------------------------------

    async def _step(self, problems: tuple[str, ...]) -> StepReport:
        rl = self._settings.rl
        base = journal.latest_trained(self._store, rl.model)
        if base is None:
            raise StoreError(f"No version of {rl.model} is left to train on; `metaclaw route list` shows them.")
        batch, why, skipped = await asyncio.to_thread(self._batch, base)
        if batch is None:
            return StepReport(waits=why, skipped=skipped, problems=problems)
        await self._open(base)
        if base.state_path is not None and base.id not in self._kept:
            await self._server.keep(base.state_path, None)
            self._kept.add(base.id)
        self._at("opened")
        turns_ = [s.turn for s in batch]
        step = journal.claim(self._store, turns_, base_version=base.id, algorithm=rl.algorithm, unjudged=self._unjudged)
        self._at("claimed")
        try:
            made = await self._train(step, base, batch)
        except BaseException as e:
            self._server.drop()
            self._undo(step, str(e) or type(e).__name__)
            raise
        if isinstance(made, str):
            return StepReport(waits=made, step=step, skipped=skipped, problems=problems)
        waits = await self._finish(step, made)
        return StepReport(made=True, waits=waits, step=step, version=made, skipped=skipped, problems=problems)

    def _undo(self, step: int, error: str) -> None:
        """Only a claim can be undone: what is saved is carried on."""
        if any(row["id"] == step and row["state"] == StepState.CLAIMED for row in journal.open_steps(self._store)):
            journal.abandon(self._store, step, error)

    def _batch(self, base: Version) -> tuple[tuple[Sample, ...] | None, str, int]:
        """The turns of the next step; None: there are not enough, with the reason; and how many were found that never can
        be trained on."""
        rl, judged = self._settings.rl, not self._unjudged
        there = (*waiting(self._store, scored=judged), base.id)
        if there[0] < rl.batch_size:
            return None, f"{there[0]} of {rl.batch_size} turns are there", 0
        if self._looked is not None and self._looked[0] == there:
            return None, self._looked[1], 0
        good, skipped = self._eligible(base)
        batch = select_batch(good, batch_size=rl.batch_size, min_sessions=rl.min_sessions)
        why = f"{len(good)} of {rl.batch_size} turns are there, from {len({s.session for s in good})} sessions"
        if batch is None:
            self._looked = (*waiting(self._store, scored=judged), base.id), why
        return batch, why, skipped

    def _eligible(self, base: Version) -> tuple[list[Sample], int]:
        """What may be trained on now, and how many turns were found that never can be."""
        rl = self._settings.rl
        lags = self._lags(base)
        good, never = [], {}
        for sample in candidates(self._store, scored=not self._unjudged, limit=_FETCHED):
            reason = why_left_out(
                sample, lags, max_staleness=rl.max_staleness, support_share=rl.support_share, scored=self._needs_scores
            )
            if reason is None:
                good.append(sample)
            elif reason in _FINAL:
                never[sample.turn] = str(reason)
        if never:
            journal.set_aside(self._store, never, unjudged=self._unjudged)
        return good, len(never)

    @property
    def _needs_scores(self) -> bool:
        """Whether a turn without a score teaches nothing."""
        return self._teaching is None

    async def _train(self, step: int, base: Version, claimed: Sequence[Sample]) -> int | str:
        """The new version's number; or why there is none. The turns say so, too, unless they may be taken again."""
        rl, began = self._settings.rl, time.monotonic()
        batch, clusters = placed(self._store, claimed, Clusters.from_json(journal.carried(self._store, "clusters") or []))
        datums = build(batch)
        present = await self._server.forward(datums)
        book_training(self._store, "forward", rl.model, sum(d.input_ids.size for d in datums))
        self._at("forward")
        compared = compare(datums, present)
        lags = self._lags(base)
        staleness = {s.turn: lags[s.version] for s in batch}
        if (problem := compared.metrics.problem(self._limits)) is not None:
            said = [_trained(s, compared, {}, staleness, Lesson()) for s in batch]
            metrics = self._metrics(said, batch, compared, staleness) | {"loss": rl.loss, "datums": len(datums)}
            journal.discarded(self._store, step, [_because(one, problem) for one in said], metrics, {}, problem)
            return problem
        if (waits := self._guard()) is not None:  # nothing has been changed yet
            journal.abandon(self._store, step, waits)
            return waits
        lesson = await self._lesson(datums, present)
        self._at("taught")
        tracker = Tracker.from_json(kept) if (kept := journal.carried(self._store, "tracker")) else Tracker()
        good = [s for s in batch if _reason(compared, s.turn) is None and s.turn not in lesson.dropped]
        judged, tracker = self._advantages(tracker, good, compared)
        advantages = combined(judged or {}, {s.turn: lesson.advantages[s.turn] for s in good if s.turn in lesson.advantages})
        said = [_trained(s, compared, advantages, staleness, lesson) for s in batch]
        metrics = self._metrics(said, batch, compared, staleness) | {"loss": rl.loss, "datums": len(datums), "teacher_kl": lesson.kl}
        carried: dict[str, Json] = {"tracker": tracker.to_json(), "clusters": clusters.to_json()}
        call = prepare([with_advantages(d, advantages) for d in datums], present, loss=rl.loss)
        if call is None:
            why = str(LeftOut.NO_SIGNAL)
            journal.discarded(self._store, step, [_because(one, why) for one in said], metrics, carried, why)
            return "the batch held nothing to learn: no signal"
        if (waits := self._guard()) is not None:
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
        version = journal.saved(self._store, step, path, said, metrics, carried)
        self._kept.add(version)
        self._at("saved")
        return version

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

    def _advantages(
        self, tracker: Tracker, good: Sequence[Sample], compared: Comparison
    ) -> tuple[Mapping[int, Any] | None, Tracker]:
        """What each turn is to learn, by its id; None: nothing."""
        if compared.metrics.drift is not None:
            tracker = tracker.moved(compared.metrics.drift)
        rewarded = [(s, s.earned) for s in good if s.earned is not None]
        keys = [key_of(s.cluster, s.agent) for s, _ in rewarded]
        values, tracker = single(tracker, keys, [reward for _, reward in rewarded])
        if values is None:
            return None, tracker
        return {s.turn: float(value) for (s, _), value in zip(rewarded, values, strict=True)}, tracker

    def _lags(self, base: Version) -> dict[int, int]:
        """{version: steps from it to `base`}, of those that `base` descends from."""
        with self._store.reading() as db:
            parents: dict[int, int | None] = {row.id: row.parent for row in db.execute(select(versions.c.id, versions.c.parent))}
        return lags_of(parents, base.id)

    def _metrics(
        self, said: Sequence[Trained], batch: Sequence[Sample], compared: Comparison, staleness: Mapping[int, int]
    ) -> dict[str, Json]:
        """By the names that `view.training` shows them under."""
        earned = [s.earned for s in batch if s.earned is not None]
        taught = [abs(one.advantage) for one in said if one.advantage is not None]
        found = compared.metrics
        return {
            "turns": len(batch),
            "skipped": sum(one.reason is not None for one in said),
            "vetoed": found.vetoed,
            "reward_mean": _mean(earned),
            "advantage_abs_mean": _mean(taught),
            "kl": found.kl_k1,
            "kl_v2": found.kl_k2,
            "ratio_mean": found.mean_ratio,
            "ess": found.ess,
            "staleness_mean": _mean(list(staleness.values())),
            "sessions": len({s.session for s in batch}),
        }

    # --- after a step ---------------------------------------------------------------------------

    async def _finish(self, step: int, number: int) -> str | None:
        """From saved weights to a decision, from wherever it stands; why there is none yet, else None. Raises ServerError,
        StoreError."""
        version = journal.version(self._store, number)
        if version.base_model != self._settings.rl.model:
            journal.rejected(self._store, step, {}, f"rl.model is {self._settings.rl.model} now")
            return None
        if version.sampler_path is None:
            await self._open(version)
            ttl = self._ttl()
            self._at("before publish")
            path = await self._server.save_weights(f"step-{step}", ttl)
            self._at("weights saved")
            journal.published(self._store, step, path, time.time() + ttl)
            self._at("published")
            version = journal.version(self._store, number)
        if (waits := self._guard()) is not None:
            return waits
        version = await self._living(version)
        current = journal.in_force(self._store)
        stable = version if current is None else await self._living(journal.version(self._store, current.stable))
        self._at("before checks")
        checked = await trial(self._store, self._server, version, stable, self._bounds)
        self._at("checked")
        if checked.ok:
            journal.routed(self._store, step, checked.to_json(), f"step {step}")
        else:
            journal.rejected(self._store, step, checked.to_json(), checked.reason or "")
        self._at("decided")
        publish(self._store, self._settings, self._prices, self._home)
        self._at("route published")
        await self._let_go(step, number)
        self._at("done")
        return None

    async def _open(self, version: Version) -> None:
        """Be at a version's state. Raises ServerError, "lost" where the server has it no more."""
        try:
            await self._server.open(version.state_path)
        except ServerError as e:
            if e.kind != "missing" or version.state_path is None:
                raise
            raise ServerError(
                "lost",
                f"The training server no longer has the weights of version {version.id} ({version.state_path}). Give it back its "
                "checkpoints, or go back to a version that it has: `metaclaw route rollback`, or rl.resume_from_ckpt.",
            ) from e

    async def _living(self, version: Version) -> Version:
        """The version, its weights to sample from good for another while. Where the server lost them they are saved once more
        from its state. Raises ServerError, "lost" where that is gone, too."""
        if version.sampler_path is None:
            return version
        ttl, path = self._ttl(), version.sampler_path
        try:
            await self._server.keep(path, ttl)
        except ServerError as e:
            if e.kind != "missing":
                raise
            await self._open(version)
            path = await self._server.save_weights(f"version-{version.id}", ttl)
        journal.expires(self._store, version.id, path, time.time() + ttl)
        return journal.version(self._store, version.id)

    async def _let_go(self, step: int, number: int) -> None:
        """A state that training has left behind ends by itself, but every `rl.checkpoint_every`-th."""
        rl, current = self._settings.rl, journal.in_force(self._store)
        with self._store.reading() as db:
            row = db.execute(select(steps.c.base_version, steps.c.state).where(steps.c.id == step)).one()
        left = journal.version(self._store, number if row.state == StepState.REJECTED else row.base_version)
        serves = current is not None and left.id in (current.working, current.stable)
        if left.state_path is None or serves or (step - 1) % rl.checkpoint_every == 0:
            return
        self._kept.discard(left.id)
        try:
            await self._server.keep(left.state_path, self._ttl())
        except ServerError as e:
            if e.kind != "missing":  # then it is gone already
                raise

    def _ttl(self) -> int:
        return max(3600, round(self._settings.rl.checkpoint_ttl_hours * 3600))

    def _goes_on_from(self, state: str) -> bool:
        """Whether training of rl.model has begun at `state` before, and is still what is in force."""
        current, model = journal.in_force(self._store), self._settings.rl.model
        if current is None or journal.version(self._store, current.working).base_model != model:
            return False
        with self._store.reading() as db:
            known = select(func.count()).select_from(versions).where(versions.c.state_path == state, versions.c.base_model == model)
            return db.scalar(known) != 0


def trainer_of(store: Store, settings: Settings, home: Path) -> Trainer:
    """What the settings name. Raises ConfigError."""
    rl = settings.rl
    if not rl.model:
        raise ConfigError("rl.model is not set: it names the base model to train.")
    server = TrainingServer(rl.model, base_url=rl.tinker_base_url or None, api_key=rl.tinker_api_key or None, lora_rank=rl.lora_rank)
    return Trainer(store, settings, home, server, load_prices(home))


def _reason(compared: Comparison, turn: int) -> LeftOut | None:
    return next(one.left_out for one in compared.turns if one.turn == turn)


def _trained(
    sample: Sample, compared: Comparison, advantages: Mapping[int, Any], staleness: Mapping[int, int], lesson: Lesson
) -> Trained:
    ratio = next(one for one in compared.turns if one.turn == sample.turn)
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
    reason = one.reason if one.reason not in (None, str(LeftOut.NO_SIGNAL)) else why
    return Trained(one.turn, reason, one.reward, one.advantage, one.mean_ratio, one.staleness)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
