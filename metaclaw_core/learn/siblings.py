"""Fresh siblings of logged prompts (GRPO): several replies to one question, told apart by what the judge makes of each.

Design: a prompt is the exact ids that a logged answer was sampled from. All members of a group are sampled anew from the weights
that the step begins with, at T=1 with the logged limit and stop strings, so the sampler's logprobs are those of the behaviour and
the step is on policy; the logged reply is left out, since what came of it is known and a sibling's is not. Each is judged on the
reply alone (`ranking`), centred on its group, and goes through the same forward, guards and loss as a logged one. A group that tells
nothing apart is left out with its reason.

Prompts come from query sessions only, from turns that the judge has seen (so the gate keeps what live sessions earned); the
newest first of those whose value in the tracker is between .2 and .8, since a question that always or never succeeds teaches
little. Where there are too few, the others nearest to .5 fill the step, or a task that was once mastered could never be seen to
fail; they are scored, but not compared in pairs. Every score enters the tracker with the step.

What is claimed in the journal is the prompt's turn: none is used twice. Siblings live in memory until their step is written down,
so a kill costs their tokens and nothing else, and their text never becomes a turn of anybody. Where the judge answers nobody they
wait in memory for it, as long as the weights are the same: an outage must not cost a batch of replies with each new try.

Limits: nothing is executed. Inside a tool loop, and where calls were the reply, that makes a reply hard to judge: such prompts only
with `rl.grpo_tools`; subagents' never. When siblings are sampled is said by `rl.schedule`: with `windows`, in idle time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from sqlalchemy import select as select_
from sqlalchemy.engine import Row

from metaclaw_core.errors import ConfigError
from metaclaw_core.learn import journal
from metaclaw_core.learn.advantage import key_of
from metaclaw_core.learn.batch import LeftOut, Sample, why_unfit
from metaclaw_core.learn.candidates import Lookout
from metaclaw_core.learn.carried import clusters_of, tracker_of
from metaclaw_core.learn.groups import Group, Member, Prompt, Siblings
from metaclaw_core.learn.guards import Guards
from metaclaw_core.learn.journal import Version
from metaclaw_core.learn.llm import BudgetExhausted, LLMClient, LLMRefused, LLMUnavailable
from metaclaw_core.learn.money import book_training
from metaclaw_core.learn.nextstate import instruction_of, said_before
from metaclaw_core.learn.ranking import Asked, Reply, Worth, affordable, worth_of
from metaclaw_core.learn.replies import Readers
from metaclaw_core.learn.trainer import Sampled, ServerError, TrainingServer
from metaclaw_core.learn.transcript import name_of
from metaclaw_core.model import Role
from metaclaw_core.settings import Settings
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.samplefile import unpack_ids
from metaclaw_core.store.tables import samples, sessions, turns

_LOOKED_AT = 512  # prompts, the newest
_AT_ONCE = 8  # groups that are sampled or judged; one where a daily budget is set, so that no more than one call exceeds it
_WAIT_FOR = 10  # tries that siblings wait for a judge that is down; then they are sampled anew, in case it is for what they say
_SHORT = 60  # characters; "yes, do it" means nothing without what was asked before


class SiblingSource:
    """Chooses prompts, samples and judges. The judge's client is the caller's to close."""

    def __init__(
        self, store: Store, settings: Settings, server: TrainingServer, guards: Guards, judge: LLMClient, *, taught: bool, at: Callable[[str], None]
    ) -> None:
        """Raises ConfigError where no group fits into a step."""
        rl = settings.rl
        if rl.group_size > rl.batch_size:
            raise ConfigError(f"rl.group_size is {rl.group_size}, more than rl.batch_size ({rl.batch_size}): a step must hold a whole group.")
        self._store, self._settings, self._server, self._guards, self._judge = store, settings, server, guards, judge
        self._taught, self._at = taught, at
        self._lookout: Lookout[Prompt] = Lookout(
            store, what="prompts", wanted=rl.batch_size // rl.group_size, min_sessions=rl.min_sessions, scored=True, order=_most_promising
        )
        self._drawn: dict[tuple[int, int], list[Sampled]] = {}  # (version, turn) → siblings that wait for the judge
        self._tries = 0  # that they have waited for

    # --- prompts ------------------------------------------------------------------------------

    def choose(self, base: Version) -> tuple[tuple[Prompt, ...] | None, str, int]:
        """The prompts of the next step; None: there are not enough, with the reason; and how many turns were found that never
        can be used."""
        return self._lookout.choose(base.id, self._eligible)

    def _eligible(self) -> tuple[list[Prompt], int]:
        """What may be answered again, with its value, and how many turns never may."""
        found, never = self._prompts()
        if never:
            journal.set_aside(self._store, never)
        return self._valued(found), len(never)

    def _prompts(self) -> tuple[list[Prompt], dict[int, str]]:
        """What may be answered again, newest first, and the turns that never may, with the reason."""
        rl = self._settings.rl
        query = (
            select_(samples.c.klass, samples.c.prompt_ids, samples.c.sampling.label("sampled"), samples.c.redacted.label("secret"),
                    samples.c.created_at, turns, sessions.c.session_id)
            .join(turns, turns.c.flow_id == samples.c.flow_id)
            .join(sessions, sessions.c.id == turns.c.session)
            .where(turns.c.state == "scored", samples.c.base_model == self._server.base_model)
            .order_by(turns.c.started_at.desc(), turns.c.id.desc())
            .limit(_LOOKED_AT)
        )  # fmt: skip
        query = query.where(turns.c.kind.in_(("main", "tool"))) if rl.grpo_tools else query.where(turns.c.kind == "main", turns.c.tool_calls.is_(None))
        found: list[Prompt] = []
        never: dict[int, str] = {}
        with self._store.reading() as db:
            for row in db.execute(query).all():
                instruction = instruction_of(db, dict(row._mapping))
                if (reason := self._why_never(row, instruction)) is not None:
                    never[row.id] = str(reason)
                    continue
                earlier = said_before(db, dict(row._mapping)) if instruction is not None and len(instruction) <= _SHORT else None
                found.append(_prompt(row, Asked(instruction or "", earlier), self._settings.policy.max_tokens))
        return found, never

    def _why_never(self, row: Row[Any], instruction: str | None) -> LeftOut | None:
        share = self._settings.rl.support_share
        if (reason := why_unfit(row.klass, row.session_id, redacted=row.secret, support_share=share)) is not None:
            return reason
        if row.prompt_ids is None:
            return LeftOut.EMPTY
        return LeftOut.NO_QUESTION if not instruction else None

    def _valued(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """With what the tracker expects of each; a task that is new has the mean of all."""
        tracker, clusters = tracker_of(self._store), clusters_of(self._store)
        return [replace(p, value=tracker.value(key_of(clusters.place(p.text)[0], p.agent))) for p in prompts]

    # --- siblings -----------------------------------------------------------------------------

    async def work(self, base: Version, prompts: Sequence[Prompt]) -> Siblings | str:
        """Groups for the claimed prompts, sampled from `base` and judged; or why there are none now. Raises ServerError,
        StoreError."""
        clusters = clusters_of(self._store)
        placed = []
        for prompt in prompts:
            cluster, clusters = clusters.place(prompt.text)
            placed.append(replace(prompt, cluster=cluster))
        reader = Reader(await self._server.tokenizer())
        questions = self._gate(self._settings.llm.concurrency, (LLMUnavailable, BudgetExhausted))
        waited, self._drawn = self._drawn, {}
        try:
            await affordable(self._judge, self._settings.judge, self._settings.rl.group_size)  # before siblings are paid for in vain
            drawn = await self._each(placed, lambda p: self._sample(base, p, reader.stop_ids, waited))
            problems = [d if isinstance(d, str) else None for d in drawn]
            if None not in problems:
                await self._answers_at_all(base, placed[0])
            self._at("sampled")
            sampled = [[] if isinstance(d, str) else d for d in drawn]
            read = await asyncio.to_thread(lambda: [[reader.read(p, s) for s in some] for p, some in zip(placed, sampled, strict=True)])
            shown = await asyncio.to_thread(self._with_results, placed)
            try:
                judged = await self._each(list(zip(shown, read, strict=True)), lambda pair: self._judged(*pair, questions))
            except LLMUnavailable:
                self._let_wait(base, placed, sampled, answered=questions.passed)
                raise
            self._tries = 0
            if not questions.passed and len(judged) > 1 and (why := next((one.refused for one in judged if one.refused), None)) is not None:
                raise ServerError("judge", why)  # one prompt may be refused for what it says, all of them are not
            self._at("judged")
        except _Closed as e:
            return str(e)
        except BudgetExhausted as e:
            raise ServerError("judge_budget", str(e)) from e
        except LLMUnavailable as e:
            raise ServerError("judge_down", str(e)) from e
        except LLMRefused as e:
            raise ServerError("judge", str(e)) from e
        groups, before = [], 0
        for prompt, some, worth, problem in zip(placed, read, judged, problems, strict=True):
            groups.append(replace(_group(prompt, base, some, worth, before), problem=problem and f"it can't be answered: {problem}"))
            before += len(some)
        return Siblings(tuple(groups), clusters, self._taught)

    def _gate(self, at_once: int, fatal: tuple[type[BaseException], ...] = (BaseException,)) -> _Gate:
        """With a daily budget one call at a time, so that no more than one exceeds it."""
        return _Gate(self._guards, at_once if self._settings.rl.daily_budget_usd is None else 1, fatal)

    async def _each[P, T](self, items: Sequence[P], ask: Callable[[P], Coroutine[Any, Any, T]]) -> list[T]:
        """What `ask` brings for each, a few at once, the guards asked before each. After the first failure no more are begun;
        it is raised once those under way have ended."""
        gate = self._gate(_AT_ONCE)

        async def one(item: P) -> T:
            async with gate():
                return await ask(item)

        results = await asyncio.gather(*(one(item) for item in items), return_exceptions=True)
        errors = [r for r in results if isinstance(r, BaseException)]
        if errors:
            raise next((e for e in errors if not isinstance(e, _Closed)), errors[0])
        return [r for r in results if not isinstance(r, BaseException)]

    async def _sample(
        self, base: Version, prompt: Prompt, stop_ids: Sequence[int], waited: Mapping[tuple[int, int], list[Sampled]]
    ) -> list[Sampled] | str:
        """The siblings; or why the server refuses this prompt: its context may be shorter now."""
        if (before := waited.get((base.id, prompt.turn))) is not None:
            return before
        ids, n = prompt.ids.tolist(), self._settings.rl.group_size
        try:
            replies = await self._server.sample(base.sampler_path, ids, n=n, max_tokens=prompt.max_tokens, stop_ids=stop_ids)
        except ServerError as e:
            if e.kind != "refused":
                raise
            return str(e)
        # The prompt may be billed once; n times is the most it can cost.
        went_out = sum(len(r.tokens) for r in replies)
        await asyncio.to_thread(book_training, self._store, "sibling", self._server.base_model, n * len(ids), went_out)
        return replies

    async def _answers_at_all(self, base: Version, prompt: Prompt) -> None:
        """Where every prompt is refused it may not be for what they are. Raises ServerError where the server refuses anything."""
        [reply] = await self._server.sample(base.sampler_path, prompt.ids[:1].tolist(), n=1, max_tokens=1, stop_ids=())
        await asyncio.to_thread(book_training, self._store, "sibling", self._server.base_model, 1, len(reply.tokens))

    def _let_wait(self, base: Version, prompts: Sequence[Prompt], sampled: Sequence[list[Sampled]], *, answered: bool) -> None:
        """The judge is down. Where it answers others it may be for what one of these says, so new ones are sampled then."""
        self._tries += 1
        if answered or self._tries > _WAIT_FOR:
            self._tries = 0
        else:
            self._drawn = {(base.id, p.turn): some for p, some in zip(prompts, sampled, strict=True) if some}

    async def _judged(self, prompt: Prompt, replies: Sequence[tuple[Sampled, Reply]], questions: _Gate) -> Worth:
        return await worth_of(
            self._judge, self._settings.judge, prompt.asked, [reply for _, reply in replies],
            calls=self._settings.rl.grpo_tools, pairs=prompt.promising, permit=questions,
        )  # fmt: skip

    def _with_results(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """What tools had returned before each, so that a reply in a tool loop can be judged."""
        if not self._settings.rl.grpo_tools:
            return list(prompts)
        return [replace(p, asked=replace(p.asked, results=results_before(self._store, p.turn))) for p in prompts]


def results_before(store: Store, turn: int) -> tuple[tuple[str, str], ...]:
    """(tool, what it returned) of what the request of `turn` ends with, in its order; none: it answers a human."""
    with store.reading() as db:
        tip = db.scalar(select_(turns.c.prompt_tip).where(turns.c.id == turn))
    found: list[tuple[str | None, str | None, str]] = []
    for message in reversed(store.conversation(tip)):
        if message.role is Role.ASSISTANT:
            names = {call.id: call.name for call in message.tool_calls}
            return tuple((name_of(name or names.get(call) or "a tool"), text) for name, call, text in found)
        found = [(r.name, r.call_id, r.text) for r in message.tool_results] + found
    return ()


class _Closed(Exception):
    """Nothing more may be asked now."""


class _Gate:
    """Lets calls through, a few at once, the guards asked before each. After a failure, or once the guards say no, no more are
    begun."""

    def __init__(self, guards: Guards, at_once: int, fatal: tuple[type[BaseException], ...]) -> None:
        """`fatal`: the exceptions that are a failure of more than one call."""
        self._guards, self._free, self._fatal = guards, asyncio.Semaphore(at_once), fatal
        self._shut: str | None = None
        self.passed = False  # one call at least ended well

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[None]:
        """For one call. Raises _Closed."""
        async with self._free:
            if self._shut is None:
                waits = await asyncio.to_thread(self._guards.closed)
                self._shut = self._shut or waits
            if self._shut is not None:
                raise _Closed(self._shut)
            try:
                yield
            except self._fatal:
                self._shut = "another call failed"
                raise
            self.passed = True


class Reader(Readers):
    def read(self, prompt: Prompt, sampled: Sampled) -> tuple[Sampled, Reply]:
        """The tokens that count, up to a stop string of the client, and what they say."""
        thinking = str(self._tokenizer.decode(prompt.ids[-8:].tolist())).rstrip().endswith("<think>")
        reader = self.finished(sampled.tokens, stops=prompt.stops, calls=prompt.tools, thinking=thinking)
        ended = sampled.stopped or reader.stopped
        counts = Sampled(sampled.tokens[: reader.kept], sampled.logprobs[: reader.kept], ended)
        return counts, Reply(reader.message, cut=not ended, malformed=reader.malformed)


def _most_promising(prompt: Prompt) -> tuple[float, ...]:
    off = 0.0 if prompt.promising else abs(prompt.value - 0.5)
    return off, -prompt.created_at, -prompt.turn


def _prompt(row: Row[Any], asked: Asked, most: int) -> Prompt:
    """`most`: tokens of a reply where the logged one had no limit."""
    from metaclaw_core.policy.render import stops_in

    return Prompt(
        turn=row.id,
        session=row.session,
        split_by=row.session_id,
        created_at=row.created_at,
        ids=unpack_ids(row.prompt_ids).astype(np.int32),
        max_tokens=int(row.sampled.get("max_tokens", most)),
        stops=stops_in(row.sampling or {}),
        tools=row.tools is not None,
        asked=asked,
        text=row.user_text or "",
        agent=f"{row.agent or '?'}/{row.kind}",
    )


def _group(prompt: Prompt, base: Version, replies: Sequence[tuple[Sampled, Reply]], worth: Worth, before: int) -> Group:
    members = []
    for n, (sampled, reply) in enumerate(replies):
        sample = Sample(
            turn=-1 - before - n,
            session=prompt.session,
            split_by=prompt.split_by,
            human_turn=None,
            klass="A",
            prompt_ids=prompt.ids,
            tokens=np.asarray(sampled.tokens, dtype=np.int32),
            logprobs=sampled.logprobs,
            version=base.id,
            stop_reason="length" if reply.cut else "stop",
            reward=worth.worth[n],
            malformed=reply.malformed,
            redacted=False,
            created_at=time.time(),
            cluster=prompt.cluster,
            agent=prompt.agent,
        )
        members.append(Member(sample, worth.scores[n], reply.cut))
    return Group(prompt, tuple(members), worth.paired)
