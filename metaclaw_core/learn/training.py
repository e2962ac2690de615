"""One optimiser step after the other: from scored answers to weights that serve.

Design: `Trainer.run_once` does at most one step and says what it did, or why it did nothing. What was cut off before is ended
first: the journal says where it stood. Then the guards (`guards`: windows, budget, judge), then the step in the order of
`journal`: open, claim, sample and judge siblings where that is asked for (`siblings`), then what `optimise` does until the weights
are saved, then what `rounds` does until they serve. Whatever fails before the weights are saved undoes the claim and drops the
connection; whatever fails after it is taken up where it was at a later run. The guards are asked again before each call that costs
much, so a user who comes back, or a budget that is spent, waits for no more than the call in flight.

After a failure the next try waits, longer each time; where only a person can help (bill, key, weights that are gone), ten
minutes at once.

Limits: callers hold the lease of the job "train". One step at a time, on one base model. While the route is pinned by hand nothing
is trained: answers of the pinned version would soon be too many versions old to learn from.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from metaclaw_core.errors import ConfigError, StoreError
from metaclaw_core.learn import journal
from metaclaw_core.learn.batch import LeftOut, Sample, lags_of, why_left_out
from metaclaw_core.learn.budget import Budget
from metaclaw_core.learn.candidates import Lookout, candidates, placed
from metaclaw_core.learn.carried import clusters_of
from metaclaw_core.learn.endpoint import judge_endpoint
from metaclaw_core.learn.fastchecks import Bounds
from metaclaw_core.learn.groups import Prompt
from metaclaw_core.learn.guards import Guards
from metaclaw_core.learn.journal import StepState, Version
from metaclaw_core.learn.llm import LLMClient
from metaclaw_core.learn.losses import Limits
from metaclaw_core.learn.optimise import Optimiser, Replies, Work
from metaclaw_core.learn.prices import Prices, load_prices
from metaclaw_core.learn.publish import publish
from metaclaw_core.learn.rounds import At, Rounds
from metaclaw_core.learn.scoring import judge_client
from metaclaw_core.learn.siblings import SiblingSource
from metaclaw_core.learn.teaching import teaching_of
from metaclaw_core.learn.trainer import ServerError, TrainingServer
from metaclaw_core.settings import Settings
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import versions

_FETCHED = 2_048  # candidates looked at, at most; more than this many wait for the next run
_FINAL = frozenset(LeftOut) - {LeftOut.NO_SIGNAL}  # reasons that no later step can mend
_FOR_A_PERSON = frozenset({"auth", "billing", "missing", "lost", "teacher", "judge", "judge_budget"})  # failures that no waiting ends soon
_RETRY_SECONDS = 5.0  # before the first new try; twice as long after each, up to
_LONGEST = 120  # times that

_BOUNDS, _LIMITS = Bounds(), Limits()


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


@dataclass(frozen=True, slots=True)
class _Chosen:
    turns: Sequence[int]  # to be claimed
    work: Callable[[], Coroutine[Any, Any, Work | str]]  # what there is to learn from them, once they are; or why there is nothing now


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
        judge: LLMClient | None = None,
    ) -> None:
        """`at` is told of each point between two effects (for tests that kill there). `judge`: whom siblings are shown to; the
        caller closes it. None: whom the settings name. Raises ConfigError for a judge or a teacher that is set by halves, and for
        siblings without a judge."""
        self._store, self._settings, self._home, self._server, self._prices = store, settings, home, server, prices
        self._at, self._retry_s = at, retry_s
        self._teaching = teaching_of(store, settings)
        self._guards = Guards(store, settings, prices, judged=judge_endpoint(settings) is not None, taught=self._teaching is not None)
        self._optimiser = Optimiser(store, settings, server, self._guards, self._teaching, limits, at)
        self._rounds = Rounds(store, settings, home, server, prices, self._guards, bounds, at)
        self._judge: LLMClient | None = None  # of our own
        self._siblings: SiblingSource | None = None
        if settings.rl.algorithm == "grpo":
            if judge is None:
                judge = self._judge = judge_client(settings, Budget(store, settings.llm.daily_token_budget))
            if judge is None:
                raise ConfigError("rl.algorithm is grpo, which needs a judge: set rl.prm_url and rl.prm_model, or llm.*.")
            taught = self._teaching is not None
            self._siblings = SiblingSource(store, settings, server, self._guards, judge, taught=taught, at=at)
        self._failures, self._not_before = 0, 0.0
        rl = settings.rl
        self._lookout: Lookout[Sample] = Lookout(
            store, what="turns", wanted=rl.batch_size, min_sessions=rl.min_sessions, scored=not self._guards.unjudged
        )

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
            ttl = self._rounds.ttl
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
            await self._rounds.stay()
            if (waits := self._pinned() or self._guards.closed()) is not None:
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
        if self._judge is not None:
            await self._judge.aclose()
        await self._server.aclose()

    # --- before a step ------------------------------------------------------------------------

    def _pinned(self) -> str | None:
        current = journal.in_force(self._store)
        if current is None or not current.pinned:
            return None
        return f"the route is pinned to version {current.working}; `metaclaw route unpin` lets training go on"

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
                waits = await self._rounds.finish(number, row["version"])
            except ServerError as e:
                if e.kind != "lost":
                    raise
                journal.rejected(self._store, number, {}, str(e))
                said.append(f"step {number} was cut off and can't be carried on: {e}")
                continue
            if waits is None:
                said.append(f"step {number} was cut off and is carried on")
        return tuple(said)

    def _goes_on_from(self, state: str) -> bool:
        """Whether training of rl.model has begun at `state` before, and is still what is in force."""
        current, model = journal.in_force(self._store), self._settings.rl.model
        if current is None or journal.version(self._store, current.working).base_model != model:
            return False
        with self._store.reading() as db:
            known = select(func.count()).select_from(versions).where(versions.c.state_path == state, versions.c.base_model == model)
            return db.scalar(known) != 0

    # --- a step -------------------------------------------------------------------------------

    async def _step(self, problems: tuple[str, ...]) -> StepReport:
        rl = self._settings.rl
        base = journal.latest_trained(self._store, rl.model)
        if base is None:
            raise StoreError(f"No version of {rl.model} is left to train on; `metaclaw route list` shows them.")
        chosen, why, skipped = await asyncio.to_thread(self._chosen, base)
        if chosen is None:
            return StepReport(waits=why, skipped=skipped, problems=problems)
        await self._rounds.begin_at(base)
        self._at("opened")
        step = journal.claim(self._store, chosen.turns, base_version=base.id, algorithm=rl.algorithm, unjudged=self._guards.unjudged)
        self._at("claimed")
        try:
            made = await self._made(step, base, chosen)
        except BaseException as e:
            self._server.drop()
            self._undo(step, str(e) or type(e).__name__)
            raise
        if isinstance(made, str):
            return StepReport(waits=made, step=step, skipped=skipped, problems=problems)
        waits = await self._rounds.finish(step, made)
        return StepReport(made=True, waits=waits, step=step, version=made, skipped=skipped, problems=problems)

    def _chosen(self, base: Version) -> tuple[_Chosen | None, str, int]:
        """What the next step learns from; None: there is not enough, with the reason; and how many turns were found that
        never can be of use."""
        if (source := self._siblings) is not None:
            prompts, why, skipped = source.choose(base)
            if prompts is None:
                return None, why, skipped
            return _Chosen([p.turn for p in prompts], lambda: self._sampled(source, base, prompts)), why, skipped
        batch, why, skipped = self._lookout.choose(base.id, lambda: self._eligible(base))
        return None if batch is None else _Chosen([s.turn for s in batch], lambda: self._logged(batch)), why, skipped

    async def _logged(self, batch: Sequence[Sample]) -> Work:
        return Replies(*placed(self._store, batch, clusters_of(self._store)))

    async def _sampled(self, source: SiblingSource, base: Version, prompts: Sequence[Prompt]) -> Work | str:
        return await source.work(await self._rounds.living(base), prompts)

    async def _made(self, step: int, base: Version, chosen: _Chosen) -> int | str:
        """The new version's number; or why there is none."""
        work = await chosen.work()
        if isinstance(work, str):
            journal.abandon(self._store, step, work)
            return work
        made = await self._optimiser.make(step, base, work, self._lags(base))
        if isinstance(made, int):
            self._rounds.stays(made)
        return made

    def _undo(self, step: int, error: str) -> None:
        """Only a claim can be undone: what is saved is carried on."""
        if any(row["id"] == step and row["state"] == StepState.CLAIMED for row in journal.open_steps(self._store)):
            journal.abandon(self._store, step, error)

    def _eligible(self, base: Version) -> tuple[list[Sample], int]:
        """What may be trained on now, and how many turns were found that never can be."""
        rl = self._settings.rl
        lags = self._lags(base)
        good, never = [], {}
        for sample in candidates(self._store, scored=not self._guards.unjudged, limit=_FETCHED):
            reason = why_left_out(
                sample, lags, max_staleness=rl.max_staleness, support_share=rl.support_share, scored=self._needs_scores
            )
            if reason is None:
                good.append(sample)
            elif reason in _FINAL:
                never[sample.turn] = str(reason)
        if never:
            journal.set_aside(self._store, never, unjudged=self._guards.unjudged)
        return good, len(never)

    @property
    def _needs_scores(self) -> bool:
        """Whether a turn without a score teaches nothing."""
        return self._teaching is None

    def _lags(self, base: Version) -> dict[int, int]:
        """{version: steps from it to `base`}, of those that `base` descends from."""
        with self._store.reading() as db:
            parents: dict[int, int | None] = {row.id: row.parent for row in db.execute(select(versions.c.id, versions.c.parent))}
        return lags_of(parents, base.id)


def trainer_of(store: Store, settings: Settings, home: Path) -> Trainer:
    """What the settings name. Raises ConfigError."""
    rl = settings.rl
    if not rl.model:
        raise ConfigError("rl.model is not set: it names the base model to train.")
    server = TrainingServer(rl.model, base_url=rl.tinker_base_url or None, api_key=rl.tinker_api_key or None, lora_rank=rl.lora_rank)
    return Trainer(store, settings, home, server, load_prices(home))
