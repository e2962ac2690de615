"""The job that scores turns: captured → scored, each exactly once, however often it is interrupted.

Design: a few turns are claimed at a time, and a claim is renewed while its turn is worked on, so a
killed worker's turns are free again after `LEASE_SECONDS`. Score, votes and the move are one
transaction. A turn whose votes are not all in (the judge was down, the budget spent) keeps those it
has and comes again; it is never given a score for that. Only when the judge answers others and fails
on one turn `MAX_ATTEMPTS` times is that turn scored NULL, with the reason, so that it can't block the
queue. A judge that answers nobody ends the run.

A turn is ready when the session has gone on, since only then is it known what came of it, or after
`judge.patience`. Side turns (heartbeat, compaction, title …) are nobody's work and are skipped.

Limits: turns in flight are bounded by the client's concurrency, and so is what a killed worker can
have paid for in vain. A turn of a session that can't be told waits for `judge.patience`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import batched
from typing import Any

from sqlalchemy import ColumnElement, exists, or_, select, update

from metaclaw_core.errors import MetaClawError, StoreError
from metaclaw_core.learn.budget import Budget
from metaclaw_core.learn.endpoint import judge_endpoint
from metaclaw_core.learn.judge import (
    Score,
    Vote,
    majority,
    model_of,
    prompt_version,
    reward_of,
    turn_messages,
    vote_on_turn,
)
from metaclaw_core.learn.llm import BudgetExhausted, LLMClient, LLMRefused, LLMUnavailable
from metaclaw_core.learn.nextstate import SCORED_KINDS, follows, instruction_of, next_state, said_before
from metaclaw_core.learn.transcript import render, turn_sections
from metaclaw_core.settings import Settings
from metaclaw_core.store.queries import MANY, insert_new
from metaclaw_core.store.rollouts import State, Store
from metaclaw_core.store.tables import turns, votes
from metaclaw_core.store.types import plain

logger = logging.getLogger(__name__)

LEASE_SECONDS = 120.0
MAX_ATTEMPTS = 5
DOWN_AFTER = 3  # turns in a row that the judge did not answer
_PUT_OFF_SECONDS = 60.0  # doubled with each attempt
_LOOK_AGAIN_SECONDS = 300.0  # for what came of a turn
_SHORT_INSTRUCTION = 60  # characters; "yes, do it" means nothing without what was asked before
_PROMPT_SPECIFIC = frozenset({400, 413, 422})  # a refusal that may be about this turn and not about us


@dataclass(frozen=True, slots=True)
class ScoreReport:
    configured: bool = True  # False: no judge is named, and turns stay captured
    plus: int = 0
    zero: int = 0
    minus: int = 0
    abstained: int = 0  # scored NULL: no majority
    skipped: int = 0  # side turns
    put_off: int = 0  # claimed, and come again: their votes are not all in
    votes: int = 0  # answers of the judge
    problems: tuple[str, ...] = ()

    @property
    def scored(self) -> int:
        return self.plus + self.zero + self.minus + self.abstained


def judge_client(settings: Settings, budget: Budget) -> LLMClient | None:
    """The client of the judge that the settings name; None: they name none. Raises ConfigError."""
    endpoint = judge_endpoint(settings)
    if endpoint is None:
        return None
    return LLMClient(
        endpoint,
        budget,
        concurrency=settings.llm.concurrency,
        timeout_s=settings.judge.timeout_seconds,
        own_ports=(settings.proxy.port,),
    )


async def score(
    store: Store,
    settings: Settings,
    client: LLMClient | None,
    *,
    owner: str | None = None,
    lease_s: float = LEASE_SECONDS,
    clock: Callable[[], float] = time.time,
) -> ScoreReport:
    """Score every turn that is ready. `client` None: no judge is configured. Raises StoreError."""
    if client is None:
        return ScoreReport(configured=False)
    run = _Run(store, settings, client, owner or f"judge-{os.getpid()}-{uuid.uuid4().hex[:8]}", lease_s, clock)
    return await run.all()


@dataclass(slots=True)
class _View:
    """What is asked about a turn, made in a thread."""

    messages: list[dict[str, str]]
    had: Mapping[int, Score | None]  # votes of an earlier run, by number
    wait: float  # seconds until it is judged without knowing what came of it; above 0: not yet


@dataclass(slots=True)
class _Run:
    store: Store
    settings: Settings
    client: LLMClient
    owner: str
    lease_s: float
    clock: Callable[[], float]
    counts: Counter[str] = field(default_factory=Counter)  # of the report's fields
    problems: dict[str, None] = field(default_factory=dict)  # in order, each once
    in_flight: set[int] = field(default_factory=set)  # turns whose claims are ours
    failures: list[tuple[Mapping[str, Any], str]] = field(default_factory=list)  # decided at the end: is it the judge?
    unanswered: int = 0  # turns in a row without an answer
    stopped: bool = False

    async def all(self) -> ScoreReport:
        self.counts["skipped"] = await asyncio.to_thread(self._skip_side_turns)
        keeper = asyncio.ensure_future(self._keep_claims())
        tasks: set[asyncio.Future[None]] = set()
        ready: deque[Mapping[str, Any]] = deque()
        window = self.client.concurrency
        try:
            while True:
                if not ready and not self.stopped:
                    ready.extend(await asyncio.to_thread(self._claim, window))
                while ready and len(tasks) < window and not self.stopped:
                    tasks.add(asyncio.ensure_future(self._turn(ready.popleft())))
                if not tasks:
                    break
                done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            keeper.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(keeper, *tasks, return_exceptions=True)
            await asyncio.to_thread(self.store.release, list(self.in_flight), self.owner)
        await asyncio.to_thread(self._settle_failures)
        n = self.counts
        return ScoreReport(
            plus=n["plus"],
            zero=n["zero"],
            minus=n["minus"],
            abstained=n["abstained"],
            skipped=n["skipped"],
            put_off=n["put off"],
            votes=n["votes"],
            problems=tuple(self.problems),
        )

    # --- one turn -------------------------------------------------------------------------------

    async def _turn(self, row: Mapping[str, Any]) -> None:
        try:
            view = await asyncio.to_thread(self._look, row)
        except MetaClawError as e:  # a damaged conversation; a store that is gone fails at the next write, too
            self._fail(row, f"can't be read: {e}")
            return
        if view.wait > 0:
            await asyncio.to_thread(self._put_off, row["id"], row["attempts"], min(view.wait, _LOOK_AGAIN_SECONDS))
            self.in_flight.discard(row["id"])
            self.counts["put off"] += 1
            return
        judge, version = self.settings.judge, prompt_version("judge")
        missing = [n for n in range(judge.votes) if n not in view.had]
        answers = await asyncio.gather(
            *(vote_on_turn(self.client, judge, view.messages, model_of(self.client, judge, n)) for n in missing),
            return_exceptions=True,
        )
        new = {n: a for n, a in zip(missing, answers, strict=True) if isinstance(a, Vote)}
        errors = [a for a in answers if isinstance(a, BaseException)]
        if unexpected := [e for e in errors if not isinstance(e, (LLMUnavailable, LLMRefused, BudgetExhausted))]:
            raise unexpected[0]
        rows = [_vote_row(row["id"], n, vote, version) for n, vote in new.items()]
        self.counts["votes"] += len(new)
        if new:
            self.unanswered = 0
        values = [view.had[n] if n in view.had else new[n].value if n in new else None for n in range(judge.votes)]
        if not errors or majority(values) is not None:  # two of three that agree need no third
            await self._finish(row, majority(values), _no_majority(values), rows)
        else:
            await asyncio.to_thread(self._keep_votes, rows)
            self._weigh(row, errors)

    def _weigh(self, row: Mapping[str, Any], errors: Sequence[BaseException]) -> None:
        """What the errors of one turn mean for it and for the run."""
        error = next((e for e in errors if isinstance(e, (BudgetExhausted, LLMRefused))), errors[0])
        if isinstance(error, BudgetExhausted) or (
            isinstance(error, LLMRefused) and error.status not in _PROMPT_SPECIFIC
        ):
            self._stop(str(error))
            self.counts["put off"] += 1
            return
        self._fail(row, str(error))
        self.unanswered += 1
        if self.unanswered >= DOWN_AFTER:
            self._stop(f"The judge does not answer: {error}")

    def _fail(self, row: Mapping[str, Any], why: str) -> None:
        self.in_flight.discard(row["id"])  # the claim stays until `_settle_failures`, so that it isn't taken again
        self.failures.append((row, why))
        self.counts["put off"] += 1

    def _stop(self, problem: str) -> None:
        self.stopped = True
        self.problems[problem] = None

    async def _finish(
        self, row: Mapping[str, Any], value: Score | None, reason: str | None, vote_rows: Sequence[dict[str, Any]]
    ) -> None:
        try:
            await asyncio.to_thread(self._write_score, row["id"], value, reason, vote_rows)
        except StoreError as e:
            self.problems[f"Turn {row['id']} is scored by somebody else, or the store is gone: {e}"] = None
        else:
            self.counts[{1: "plus", 0: "zero", -1: "minus", None: "abstained"}[value]] += 1
        self.in_flight.discard(row["id"])

    # --- the store, in threads ------------------------------------------------------------------

    def _skip_side_turns(self) -> int:
        skipped = 0
        while True:
            with self.store.transaction() as connection:
                ids = connection.scalars(
                    select(turns.c.id)
                    .where(turns.c.state == State.CAPTURED.value, turns.c.kind.not_in(SCORED_KINDS), self._free())
                    .limit(MANY)
                    .with_for_update(skip_locked=True)
                ).all()
                self.store.move_in(connection, ids, State.CAPTURED, State.SKIPPED, "side turn")
            skipped += len(ids)
            if len(ids) < MANY:
                return skipped

    def _free(self) -> ColumnElement[bool]:
        return or_(turns.c.claimed_by.is_(None), turns.c.claim_expires_at < self.clock())

    def _claim(self, limit: int) -> list[Mapping[str, Any]]:
        """Turns that are ready, oldest first; ours until the lease ends."""
        now = self.clock()
        later = turns.alias()
        ready = or_(
            turns.c.started_at <= now - self.settings.judge.patience,
            exists().where(follows(later, turns)).correlate(turns),
        )
        with self.store.transaction() as connection:
            rows = connection.execute(
                select(turns)
                .where(turns.c.state == State.CAPTURED.value, turns.c.kind.in_(SCORED_KINDS), self._free(), ready)
                .order_by(turns.c.started_at, turns.c.id)
                .limit(limit)
                .with_for_update(of=turns, skip_locked=True)
            ).all()
            ids = [row.id for row in rows]
            connection.execute(
                update(turns)
                .where(turns.c.id.in_(ids))
                .values(claimed_by=self.owner, claim_expires_at=now + self.lease_s)
            )
        self.in_flight.update(ids)
        return [dict(row._mapping) for row in rows]

    def _look(self, row: Mapping[str, Any]) -> _View:
        answer = self.store.response(row)
        if answer is None:
            raise StoreError("it has no answer")
        with self.store.reading() as connection:
            after = next_state(connection, row, answer)
            given = connection.execute(select(votes.c.number, votes.c.score).where(votes.c.turn == row["id"])).all()
            had = {vote.number: vote.score for vote in given}
            instruction = instruction_of(connection, row)
            earlier = None
            if instruction is not None and len(instruction) <= _SHORT_INSTRUCTION:
                earlier = said_before(connection, row)
        transcript = render(turn_sections(instruction, answer, after, earlier=earlier))
        messages = turn_messages(transcript, next_known=after is not None)
        wait = 0.0
        if after is None:  # the session went on, but not with this: perhaps its tools still run
            wait = row["started_at"] + self.settings.judge.patience - self.clock()
        return _View(messages, had, wait)

    def _write_score(
        self, turn: int, value: Score | None, reason: str | None, vote_rows: Sequence[dict[str, Any]]
    ) -> None:
        with self.store.transaction() as connection:
            self.store.move_in(connection, [turn], State.CAPTURED, State.SCORED, reason, owner=self.owner)
            insert_new(connection, votes, vote_rows)
            connection.execute(
                update(turns)
                .where(turns.c.id == turn)
                .values(score=value, reward=reward_of(value), scored_at=self.clock())
            )

    def _keep_votes(self, vote_rows: Sequence[dict[str, Any]]) -> None:
        with self.store.transaction() as connection:
            insert_new(connection, votes, vote_rows)

    def _settle_failures(self) -> None:
        """Turns that could not be judged come again later. If others were answered, it counts against them."""
        alive = self.counts["votes"] > 0
        for row, why in self.failures:
            attempts = row["attempts"] + (1 if alive else 0)
            try:
                if attempts >= MAX_ATTEMPTS:
                    self._write_score(row["id"], None, f"not judged after {attempts} attempts: {why}", ())
                    self.counts["abstained"] += 1
                    self.counts["put off"] -= 1
                else:
                    wait = _PUT_OFF_SECONDS * 2.0 ** (attempts if alive else 0)
                    self._put_off(row["id"], attempts, wait)
            except StoreError as e:
                self.problems[str(e)] = None
        if self.failures and not self.stopped:
            self.problems[f"{len(self.failures)} turns could not be judged, the last: {self.failures[-1][1]}"] = None

    def _put_off(self, turn: int, attempts: int, wait: float) -> None:
        """Nobody's, but not to be claimed before the time: a claim without an owner to release it."""
        with self.store.transaction() as connection:
            connection.execute(
                update(turns)
                .where(turns.c.id == turn, turns.c.claimed_by == self.owner)
                .values(attempts=attempts, claimed_by="put off", claim_expires_at=self.clock() + wait)
            )

    async def _keep_claims(self) -> None:
        while True:
            await asyncio.sleep(self.lease_s / 3)
            held = self.in_flight | {row["id"] for row, _ in self.failures}
            try:
                await asyncio.to_thread(self._renew, held)
            except StoreError as e:  # a claim that ends meanwhile is noticed when its turn is moved
                self.problems[str(e)] = None

    def _renew(self, ids: Collection[int]) -> None:
        with self.store.transaction() as connection:
            for some in batched(ids, MANY):
                connection.execute(
                    update(turns)
                    .where(turns.c.id.in_(some), turns.c.claimed_by == self.owner)
                    .values(claim_expires_at=self.clock() + self.lease_s)
                )


def _no_majority(values: Sequence[Score | None]) -> str | None:
    """Why there is no score; None: there is one."""
    if majority(values) is not None:
        return None
    said = ", ".join("abstained" if v is None else f"{v:+d}" if v else "0" for v in values)
    return f"no majority: {said}"


def _vote_row(turn: int, number: int, vote: Vote[Score], version: str) -> dict[str, Any]:
    return {
        "turn": turn,
        "number": number,
        "score": vote.value,
        "problem": vote.problem,
        "reason": vote.reason,
        "model": plain(vote.model),
        "prompt": version,
        "started_at": vote.started_at,
        "latency_ms": vote.latency_ms,
    }
