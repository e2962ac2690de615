"""One optimiser step after the other: from scored answers to weights that serve.

Design: `Trainer.run_once` does at most one step and says what it did, or why it did nothing. What was cut off before is ended
first: the journal says where it stood. Then the guards (windows, budget, judge), then the step in the order of `journal`: claim,
forward, backward, save, write down, publish, check, route. Whatever fails before the weights are saved undoes the claim and drops
the client; whatever fails after it is taken up where it was at the next run. A batch that teaches nothing makes no step, and each
of its turns says why.

Everything the next step depends on (value trackers, task clusters) is written with the step that used it, so a step that
is done again after a kill is the same step.

Limits: callers hold the lease of the job "train". One step at a time, on one base model.
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
from metaclaw_core.learn.batch import LeftOut, Sample, build, lags_of, why_left_out, with_advantages
from metaclaw_core.learn.batch import select as select_batch
from metaclaw_core.learn.candidates import candidates
from metaclaw_core.learn.cluster import Clusters
from metaclaw_core.learn.fastchecks import PROMPTS, REPLY_TOKENS, Bounds, Checked, Reply, check
from metaclaw_core.learn.health import health_of
from metaclaw_core.learn.journal import StepState, Trained, Version
from metaclaw_core.learn.losses import Comparison, Limits, compare, prepare
from metaclaw_core.learn.money import book_training, over_budget
from metaclaw_core.learn.prices import Prices, load_prices
from metaclaw_core.learn.publish import publish
from metaclaw_core.learn.trainer import ServerError, TrainingServer
from metaclaw_core.learn.windows import closed
from metaclaw_core.model import Json
from metaclaw_core.settings import Settings
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import samples, steps, turns, versions

_FETCHED = 2_048  # candidates looked at, at most; more than this many wait for the next run
_FINAL = frozenset(LeftOut) - {LeftOut.NO_SIGNAL}  # reasons that no later step can mend

_BOUNDS, _LIMITS = Bounds(), Limits()

type At = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class StepReport:
    made: bool = False
    waits: str | None = None  # why no step was made; None: one was
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
    ) -> None:
        """`at` is told of each point between two effects (for tests that kill there)."""
        self._store, self._settings, self._home, self._server, self._prices = store, settings, home, server, prices
        self._at, self._bounds, self._limits = at, bounds, limits

    @property
    def learning_rate(self) -> float:
        rl = self._settings.rl
        return rl.learning_rate or 2e-5 * math.sqrt(min(rl.batch_size, 32) / 32)

    async def begin(self) -> Version:
        """The version training begins with, and its route; makes them where there are none. Raises ServerError, StoreError."""
        rl = self._settings.rl
        state = rl.resume_from_ckpt or None
        sampler = None
        current = journal.in_force(self._store)
        if state is not None and (current is None or not self._knows(state)):
            await self._server.open(state)
            sampler = await self._server.save_weights("resumed", self._ttl())
        version = journal.begin(self._store, rl.model, state, sampler)
        publish(self._store, self._settings, self._prices, self._home)
        return version

    async def run_once(self) -> StepReport:
        """At most one step. Raises StoreError where the store can't be used."""
        try:
            await self.begin()
            problems = await self._recover()
            if (waits := self._guard()) is not None:
                return StepReport(waits=waits, problems=problems)
            return await self._step(problems)
        except ServerError as e:
            self._server.drop()
            return StepReport(waits=str(e), problems=(str(e),))

    async def aclose(self) -> None:
        await self._server.aclose()

    # --- before a step ------------------------------------------------------------------------

    def _guard(self) -> str | None:
        """Why nothing may be trained now; None: it may."""
        rl = self._settings.rl
        if not rl.train:
            return "rl.train is off"
        if (spent := over_budget(self._store, self._settings, self._prices)) is not None:
            return spent
        judge = health_of(self._store)
        if judge is not None and not judge.ok:
            return f"the judge did not pass its examination: {judge.reason}"
        return self._window()

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
            if row["state"] == StepState.CLAIMED:
                journal.abandon(self._store, row["id"], "it was cut off")
                said.append(f"step {row['id']} was cut off and is undone")
            else:
                await self._finish(row["id"], row["version"])
                said.append(f"step {row['id']} was cut off and is carried on")
        return tuple(said)

    # --- a step -------------------------------------------------------------------------------

    async def _step(self, problems: tuple[str, ...]) -> StepReport:
        rl = self._settings.rl
        base = journal.latest_trained(self._store, rl.model)
        if base is None:
            raise StoreError(f"No version of {rl.model} is left to train on; `metaclaw route list` shows them.")
        found, clusters, skipped = await asyncio.to_thread(self._eligible, base)
        batch = select_batch(found, batch_size=rl.batch_size, min_sessions=rl.min_sessions)
        if batch is None:
            waits = f"{len(found)} of {rl.batch_size} turns are there, from {len({s.session for s in found})} sessions"
            return StepReport(waits=waits, skipped=skipped, problems=problems)
        self._at("before claim")
        step = journal.claim(self._store, [s.turn for s in batch], base_version=base.id, algorithm=rl.algorithm)
        self._at("claimed")
        try:
            made = await self._train(step, base, batch, clusters)
        except BaseException as e:
            self._server.drop()
            self._undo(step, str(e) or type(e).__name__)
            raise
        if made is None:
            return StepReport(waits="the batch held nothing to learn", step=step, skipped=skipped, problems=problems)
        await self._finish(step, made)
        return StepReport(made=True, step=step, version=made, skipped=skipped, problems=problems)

    def _undo(self, step: int, error: str) -> None:
        """Only a claim can be undone: what is saved is carried on."""
        if any(row["id"] == step and row["state"] == StepState.CLAIMED for row in journal.open_steps(self._store)):
            journal.abandon(self._store, step, error)

    def _eligible(self, base: Version) -> tuple[list[Sample], Clusters, int]:
        """What may be trained on now, and how many turns were found that never can be."""
        rl = self._settings.rl
        clusters = Clusters.from_json(journal.carried(self._store, "clusters") or [])
        found, clusters = candidates(self._store, clusters, scored=self._needs_scores, limit=_FETCHED)
        with self._store.reading() as db:
            parents: dict[int, int | None] = {row.id: row.parent for row in db.execute(select(versions.c.id, versions.c.parent))}
        lags = lags_of(parents, base.id)
        good, never = [], {}
        for sample in found:
            reason = why_left_out(
                sample, lags, max_staleness=rl.max_staleness, support_share=rl.support_share, scored=self._needs_scores
            )
            if reason is None:
                good.append(sample)
            elif reason in _FINAL:
                never[sample.turn] = str(reason)
        if never:
            journal.set_aside(self._store, never)
        return good, clusters, len(never)

    @property
    def _needs_scores(self) -> bool:
        return True

    async def _train(self, step: int, base: Version, batch: Sequence[Sample], clusters: Clusters) -> int | None:
        """The new version's number; None: nothing was to be learnt, and the turns say so."""
        rl, began = self._settings.rl, time.monotonic()
        await self._server.open(base.state_path)
        self._at("opened")
        datums = build(batch)
        present = await self._server.forward(datums)
        book_training(self._store, "forward", rl.model, sum(d.input_ids.size for d in datums))
        self._at("forward")
        compared = compare(datums, present)
        tracker = Tracker.from_json(kept) if (kept := journal.carried(self._store, "tracker")) else Tracker()
        good = [s for s in batch if _reason(compared, s.turn) is None]
        advantages, tracker = self._advantages(tracker, good, compared)
        staleness = self._staleness(base, batch)
        said = [_trained(s, compared, advantages, staleness) for s in batch]
        metrics = self._metrics(said, batch, compared, staleness) | {"loss": rl.loss, "datums": len(datums)}
        carried: dict[str, Json] = {"tracker": tracker.to_json(), "clusters": clusters.to_json()}
        problem = compared.metrics.problem(self._limits)
        taught = [with_advantages(d, advantages or {}) for d in datums]
        call = None if problem else prepare(taught, present, loss=rl.loss)
        if call is None:
            why = problem or str(LeftOut.NO_SIGNAL)
            journal.discarded(self._store, step, [_with_reason(one, why) for one in said], metrics, carried, why)
            return None
        if (waits := self._window()) is not None:  # the user came back: nothing has been changed yet
            raise ServerError("paused", waits)
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
        self._at("saved")
        return version

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

    def _staleness(self, base: Version, batch: Sequence[Sample]) -> dict[int, int]:
        with self._store.reading() as db:
            parents: dict[int, int | None] = {row.id: row.parent for row in db.execute(select(versions.c.id, versions.c.parent))}
        lags = lags_of(parents, base.id)
        return {s.turn: lags[s.version] for s in batch}

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

    async def _finish(self, step: int, number: int) -> None:
        """From saved weights to a route, from wherever it stands. Raises ServerError, StoreError."""
        version = journal.version(self._store, number)
        if version.sampler_path is None:
            await self._server.open(version.state_path)
            ttl = self._ttl()
            self._at("before publish")
            path = await self._server.save_weights(f"step-{step}", ttl)
            self._at("weights saved")
            journal.published(self._store, step, path, time.time() + ttl)
            self._at("published")
            version = journal.version(self._store, number)
        checked = await self._checked(version)
        self._at("checked")
        if checked.ok:
            journal.routed(self._store, step, checked.to_json(), f"step {step}")
        else:
            journal.rejected(self._store, step, checked.to_json(), checked.reason or "")
            self._server.drop()  # the next step begins at the version before
        self._at("decided")
        publish(self._store, self._settings, self._prices, self._home)
        self._at("route published")
        await self._renew(step)
        self._at("renewed")

    async def _checked(self, version: Version) -> Checked:
        """A few logged prompts, answered by the new and by the stable weights."""
        current = journal.in_force(self._store)
        stable = journal.version(self._store, current.stable) if current is not None else version
        prompts = await asyncio.to_thread(self._prompts)
        if not prompts:
            return check([], [], self._bounds)
        reader = Readers(await self._server.tokenizer())
        new, old = [], []
        for prompt in prompts:
            said = await self._server.sample(version.sampler_path, prompt, n=1, max_tokens=REPLY_TOKENS, stop_ids=reader.stop_ids)
            before = await self._server.sample(stable.sampler_path, prompt, n=1, max_tokens=REPLY_TOKENS, stop_ids=reader.stop_ids)
            ids = [*prompt, *said[0].tokens]
            theirs = await self._server.logprobs(stable.sampler_path, ids, len(said[0].tokens)) if said[0].tokens else None
            kl = None if theirs is None else float(np.mean(said[0].logprobs.astype(np.float64) - theirs))
            new.append(reader.reply(said[0].tokens, kl))
            old.append(reader.reply(before[0].tokens, None))
            book_training(self._store, "sibling", self._settings.rl.model, 3 * len(ids), len(said[0].tokens) + len(before[0].tokens))
        return check(new, old, self._bounds)

    def _prompts(self) -> list[list[int]]:
        """Of the newest answers, one a session."""
        query = (
            select(turns.c.session, samples.c.prompt_ids)
            .join(turns, turns.c.flow_id == samples.c.flow_id)
            .where(samples.c.klass == "A", samples.c.prompt_ids.is_not(None), samples.c.base_model == self._settings.rl.model)
            .order_by(samples.c.id.desc())
            .limit(20 * PROMPTS)
        )
        from metaclaw_core.store.samplefile import unpack_ids

        found: dict[str, list[int]] = {}
        with self._store.reading() as db:
            for session, packed in db.execute(query):
                if session not in found and len(found) < PROMPTS:
                    found[session] = unpack_ids(packed).tolist()
        return list(found.values())

    async def _renew(self, step: int) -> None:
        """What serves lives on; what is no longer needed ends by itself, but every `rl.checkpoint_every`-th state."""
        rl, current = self._settings.rl, journal.in_force(self._store)
        if current is None:
            return
        ttl = self._ttl()
        for number in sorted({current.working, current.stable}):
            version = journal.version(self._store, number)
            if version.sampler_path is not None:
                await self._server.keep(version.sampler_path, ttl)
                journal.expires(self._store, number, time.time() + ttl)
        with self._store.reading() as db:
            row = db.execute(select(steps.c.id, steps.c.base_version).where(steps.c.id == step)).one()
        before = journal.version(self._store, row.base_version)
        keeps = before.id in (current.working, current.stable) or step % rl.checkpoint_every == 1
        if before.state_path is not None and not keeps:
            await self._server.keep(before.state_path, ttl)

    def _ttl(self) -> int:
        return max(3600, round(self._settings.rl.checkpoint_ttl_hours * 3600))

    def _knows(self, state: str) -> bool:
        with self._store.reading() as db:
            return db.scalar(select(func.count()).select_from(versions).where(versions.c.state_path == state)) != 0


def trainer_of(store: Store, settings: Settings, home: Path) -> Trainer:
    """What the settings name. Raises ConfigError."""
    rl = settings.rl
    if not rl.model:
        raise ConfigError("rl.model is not set: it names the base model to train.")
    server = TrainingServer(rl.model, base_url=rl.tinker_base_url or None, api_key=rl.tinker_api_key or None, lora_rank=rl.lora_rank)
    return Trainer(store, settings, home, server, load_prices(home))


class Readers:
    """How replies of one tokenizer are read, for the checks."""

    def __init__(self, tokenizer: Any) -> None:
        from metaclaw_core.policy.families import family_of, marks_of, stops_of

        self._tokenizer, self._family = tokenizer, family_of(tokenizer)
        self._marks = marks_of(self._family, tokenizer)
        self.stop_ids = stops_of(self._family, tokenizer)

    def reply(self, tokens: Sequence[int], kl: float | None) -> Reply:
        from metaclaw_core.policy.parse import ReplyReader

        hidden = {id for id in self._tokenizer.added_tokens_decoder if id not in self._marks}
        reader = ReplyReader(
            self._tokenizer, self._family, marks=self._marks, hidden=hidden, stop_ids=self.stop_ids, schemas={}, call_id=lambda _: None
        )
        reader.feed(tokens)
        reader.finish()
        return Reply(len(tokens), not reader.message.parts and not reader.malformed, reader.malformed, kl)


def _reason(compared: Comparison, turn: int) -> LeftOut | None:
    return next(one.left_out for one in compared.turns if one.turn == turn)


def _trained(sample: Sample, compared: Comparison, advantages: Mapping[int, Any] | None, staleness: Mapping[int, int]) -> Trained:
    ratio = next(one for one in compared.turns if one.turn == sample.turn)
    given = None if advantages is None else advantages.get(sample.turn)
    reason = ratio.left_out or (None if given is not None else LeftOut.NO_SIGNAL)
    return Trained(
        sample.turn,
        None if reason is None else str(reason),
        sample.earned,
        None if given is None else float(np.mean(given)),
        ratio.mean,
        staleness[sample.turn],
    )


def _with_reason(one: Trained, reason: str) -> Trained:
    return Trained(one.turn, one.reason or reason, one.reward, one.advantage, one.mean_ratio, one.staleness)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
