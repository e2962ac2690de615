"""The evolver: from ended segments to skills.

Design: three steps, each of which can be cut off anywhere and is then done again without harm: segments
are written down (`segments`), the model is asked and what it proposes is decided (`admission`) and
committed, decisions are carried out (`ledger`). What has to wait (no key, no budget, the provider is down)
waits as a row that says why. A model that doesn't answer in the form asked for gets one chance to repair.

Which model: the one that the settings name, else the caller's own (`credentials`), which is asked for less
at a time, since its share is small.

Limits: one segment, one question (and one repair). Only segments of trusted hosts with words of a human
that were answered are asked about. In rl mode only support sessions are: the choice follows from a hash of
the session's id, before any score is known.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Protocol

from sqlalchemy import Row, func, select, update

from metaclaw_core.errors import WireError
from metaclaw_core.learn import edits as editing
from metaclaw_core.learn.admission import Decision, Ground, decide, is_said
from metaclaw_core.learn.budget import Budget, BudgetExhausted
from metaclaw_core.learn.caller import CallerClient
from metaclaw_core.learn.credentials import Callers, Waiting
from metaclaw_core.learn.endpoint import evolver_endpoint
from metaclaw_core.learn.ledger import Step, apply_proposed, propose, set_state
from metaclaw_core.learn.llm import Completion, LLMClient, LLMRefused, LLMUnavailable
from metaclaw_core.learn.question import FULL, SMALL, SMALL_ANSWER, SMALLEST, Size, prompt, prompt_tokens, question
from metaclaw_core.learn.runs import job_lease, recorded
from metaclaw_core.learn.segments import SegmentFinder
from metaclaw_core.learn.spans import Source, Told, tell
from metaclaw_core.model import Json
from metaclaw_core.providers import is_trusted
from metaclaw_core.settings import Settings, skills_settings
from metaclaw_core.skills.library import Library, Scan, open_library
from metaclaw_core.skills.skill import Provenance, Skill, Status
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import segments, sessions, turns

PURPOSE = "evolve"
JOB = "evolve"
_MIN_HUMAN_CHARS = 12  # all that a human said in a segment; less teaches nothing
_ATTEMPTS = 5
_RETRY_SECONDS = (60.0, 300.0, 1800.0, 7200.0, 21_600.0)
_WAIT_SECONDS = 30.0  # a segment that waits for a key or budget is looked at again so often
_SEGMENTS_AT_ONCE = 20


class Asker(Protocol):
    async def complete(
        self,
        messages: Sequence[dict[str, str]],
        *,
        purpose: str,
        max_tokens: int,
        temperature: float = 0.0,
        json_object: bool = False,
    ) -> Completion: ...


@dataclass(frozen=True, slots=True)
class EvolveReport:
    segments: int = 0  # found ended
    asked: int = 0
    waiting: dict[str, int] = field(default_factory=dict)  # reason → segments
    skipped: int = 0
    failed: int = 0
    active: tuple[str, ...] = ()  # names of skills
    review: tuple[str, ...] = ()
    quarantined: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()  # edits that came to nothing, and why
    problems: tuple[str, ...] = ()

    def says_something(self) -> bool:
        """Did more happen than waiting?"""
        return self != EvolveReport(segments=self.segments, waiting=self.waiting)


class Evolver:
    """One per worker or command. `llm` overrides what the settings name; close with `aclose`."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        *,
        budget: Budget | None = None,
        callers: Callers | None = None,
        llm: Asker | None = None,
        own_ports: Collection[int] = (),
        clock: Callable[[], float] = time.time,
        step: Step = lambda _: None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """`step` is told where the work is, for a display; `ssl_context` None: the public authorities."""
        self._store = store
        self._settings = settings
        self._library = open_library(skills_settings(settings))  # kept: it reads only what has changed
        self._budget = budget or Budget(store, settings.llm.daily_token_budget)
        self._callers = callers
        self._clock = clock
        self._step = step
        self._ssl = ssl_context
        self._finder = SegmentFinder(store, settings.skills.session_idle_minutes * 60.0)
        self._llm = llm
        self._client: LLMClient | None = None
        endpoint = evolver_endpoint(settings) if llm is None else None
        if endpoint is not None:
            self._client = LLMClient(
                endpoint,
                self._budget,
                concurrency=1,
                timeout_s=settings.llm.timeout_seconds,
                own_ports={settings.proxy.port, *own_ports},
                ssl_context=ssl_context,
            )
            self._llm = self._client

    @property
    def configured(self) -> bool:
        """Do the settings name a model, so that no caller's key is needed?"""
        return self._llm is not None

    async def aclose(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def end(self, asked: Collection[str], *, imported: bool = False) -> int:
        """Only take the open rests of these sessions as ended, for a worker to learn from; how many segments."""
        found = await asyncio.to_thread(self._finder.find, self._clock(), asked=asked, imported=imported)
        return len(found)

    async def run(self, *, asked: Collection[str] = (), imported: bool = False, wait_s: float = 0.0) -> EvolveReport:
        """Find, ask, apply. `asked`: keys of sessions to end now. Raises JobBusy, StoreError, SkillError."""
        found = await asyncio.to_thread(self._finder.find, self._clock(), asked=asked, imported=imported)
        if not found and not await asyncio.to_thread(_open_segments, self._store, self._clock()):
            return EvolveReport()
        self._step("found")
        async with job_lease(self._store, JOB, wait_s=wait_s):
            return await recorded(self._store, JOB, lambda: self._work(len(found)), worth=EvolveReport.says_something)

    async def _work(self, found: int) -> EvolveReport:
        library = self._library
        tally = Tally(found)
        tally.applied(await asyncio.to_thread(apply_proposed, self._store, library, self._step))  # what a crash left
        began = self._clock()  # what is put off during this run is due after it: each pass has fewer
        while rows := await asyncio.to_thread(_open_segments, self._store, began):
            for row in rows:
                await self._segment(row, library, tally)
                tally.applied(await asyncio.to_thread(apply_proposed, self._store, library, self._step))
        return tally.report()

    async def _segment(self, row: Row[Any], library: Library, tally: Tally) -> None:
        if row.state == "waiting" and (why := tally.put_off.get(self._asked_for(row))):
            await self._put_off(row, *why, tally)  # done, unless it has come since
            return
        why_not = await asyncio.to_thread(self._ineligible, row)
        if why_not is None and self._llm is None:
            waits = await asyncio.to_thread(self._waits, row)
            if waits is not None:
                await self._postpone(row, waits.reason, waits.text, tally, attempts=row.attempts)
                if waits.reason == "paused":
                    await self._put_off(row, waits.reason, waits.text, tally)
                return
        told = await asyncio.to_thread(tell, self._store, row) if why_not is None else None
        if told is not None:
            why_not = _nothing_said(told)
        if told is None or why_not is not None:
            tally.skipped += 1
            await asyncio.to_thread(set_state, self._store, row, state="skipped", detail=why_not)
            return
        scan = await asyncio.to_thread(library.scan)
        try:
            outcome = await self._ask(row, told, scan, tally)
        except (LLMUnavailable, BudgetExhausted) as e:
            waiting = "budget" if isinstance(e, BudgetExhausted) else "llm"
            await self._postpone(row, waiting, str(e), tally, attempts=row.attempts + (waiting == "llm"))
            if waiting == "llm":
                await self._put_off(row, waiting, str(e), tally)
            return
        except (LLMRefused, WireError) as e:
            if row.attempts + 1 >= _ATTEMPTS:
                tally.failed += 1
                await asyncio.to_thread(
                    set_state, self._store, row, state="failed", detail=str(e), attempts=row.attempts + 1
                )
            else:
                await self._postpone(row, "llm", str(e), tally, attempts=row.attempts + 1)
            return
        if isinstance(outcome, Waiting):
            await self._postpone(row, outcome.reason, outcome.text, tally, attempts=row.attempts)
            return
        proposal, model = outcome
        self._step("answered")
        ground = Ground(
            told,
            scan,
            self._settings.skills.admission == "immediate",
            Provenance((await asyncio.to_thread(self._session_id, row),), model, _iso(self._clock())),
            row.trust,
        )
        decisions = _decided(proposal.edits, ground, library)
        await asyncio.to_thread(propose, self._store, row.id, decisions, model)
        self._step("proposed")

    def _asked_for(self, row: Row[Any]) -> str | None:
        """Whose model is asked about a segment; None: the one that the settings name."""
        return None if self._llm is not None else str(row.principal)

    def _waits(self, row: Row[Any]) -> Waiting | None:
        """Why the caller's model can't be asked at all; None: it may be, if the share is enough."""
        if self._callers is None:
            return Waiting(
                "credential", "no LLM is configured, and only the worker of a running proxy sees the caller's key"
            )
        borrowed = self._callers.borrow(row, 0)
        return borrowed if isinstance(borrowed, Waiting) else None

    # --- asking ---------------------------------------------------------------------------------

    async def _ask(self, row: Row[Any], told: Told, scan: Scan, tally: Tally) -> tuple[editing.Proposal, str] | Waiting:
        """What the model proposes and which one it was. Raises what `Asker.complete` does, and WireError."""
        asker, size = self._llm, FULL
        if asker is None:
            if self._callers is None:
                return Waiting("credential", "no LLM is configured")
            size = SMALL
            least = prompt_tokens(told, scan, SMALL, SMALLEST) + SMALL_ANSWER
            borrowed = await asyncio.to_thread(self._callers.borrow, row, least)
            if isinstance(borrowed, Waiting):
                return borrowed
            room = borrowed.tokens - (least - SMALLEST)
            size = Size(
                min(size.transcript, max(SMALLEST, room)),
                size.answer,
                size.related,
                size.whole,
                size.edits,
                size.words,
            )
            asker = CallerClient(
                borrowed,
                self._callers,
                self._budget,
                timeout_s=self._settings.llm.timeout_seconds,
                ssl_context=self._ssl,
            )
        messages, known = question(told, scan, size)
        self._step("asking")
        tally.asked += 1
        answer = await asker.complete(messages, purpose=PURPOSE, max_tokens=size.answer, json_object=True)
        proposal, faults = _read(answer, known, told)
        if faults:
            repair = prompt("evolve_repair.j2", faults=faults)
            again = [
                *messages,
                {"role": "assistant", "content": answer.text or "{}"},
                {"role": "user", "content": repair},
            ]
            try:
                answer = await asker.complete(again, purpose=PURPOSE, max_tokens=size.answer, json_object=True)
                repaired, _ = _read(answer, known, told)
                proposal = repaired or proposal
            except (LLMUnavailable, LLMRefused, BudgetExhausted):
                if proposal is None:
                    raise  # nothing of the first answer can be used
        if proposal is None:
            raise WireError("The model did not answer in the form that was asked for, and could not repair it.")
        return proposal, answer.model

    # --- what may be learned from ---------------------------------------------------------------

    def _ineligible(self, row: Row[Any]) -> str | None:
        """Why a segment is no source of skills; None: it may be one."""
        with self._store.reading() as db:
            session = db.execute(select(sessions).where(sessions.c.id == row.session)).first()
            seen = db.execute(
                select(turns.c.host, turns.c.port)
                .where(turns.c.session == row.session, turns.c.started_at.between(row.started_at, row.ended_at))
                .distinct()
            ).all()
        if session is None or not seen:
            return "its turns are gone"
        for host, port in seen:
            if not is_trusted(host, port, self._settings.proxy.hosts):
                return f"{host}:{port} is neither a known provider nor in proxy.hosts"
        if self._settings.mode == "rl" and not is_support(session.session_id, self._settings.rl.support_share):
            return "it is not a support session (rl.support_share)"
        return None

    def _session_id(self, row: Row[Any]) -> str:
        with self._store.reading() as db:
            return str(db.scalar(select(sessions.c.session_id).where(sessions.c.id == row.session)) or row.session)

    async def _postpone(self, row: Row[Any], reason: str, text: str, tally: Tally, *, attempts: int) -> None:
        tally.waiting[reason] = tally.waiting.get(reason, 0) + 1
        if reason == "llm":
            tally.problems.append(text)
            pause = _RETRY_SECONDS[min(attempts, len(_RETRY_SECONDS)) - 1]
        else:
            pause = _WAIT_SECONDS
        await asyncio.to_thread(
            set_state,
            self._store,
            row,
            detail=f"waiting({reason}): {text}",
            attempts=attempts,
            next_try_at=self._clock() + pause,
        )

    async def _put_off(self, row: Row[Any], reason: str, text: str, tally: Tally) -> None:
        """All that the model of `row` would be asked about: there may be very many, and it is of no use now."""
        whose = self._asked_for(row)
        pause = _RETRY_SECONDS[0] if reason == "llm" else _WAIT_SECONDS
        now = self._clock()
        tally.put_off[whose] = (reason, text)
        tally.waiting[reason] += await asyncio.to_thread(
            _put_off_all, self._store, whose, now, f"waiting({reason}): {text}", now + pause
        )


def is_support(session_id: str, share: float) -> bool:
    """In rl mode: does this session write skills (True) or train the model?"""
    return (
        int.from_bytes(sha256(f"support\n{session_id}".encode("utf-8", "surrogatepass")).digest()[:8]) < share * 2**64
    )


class Tally:
    """An `EvolveReport` in the making."""

    def __init__(self, found: int) -> None:
        self.found = found
        self.asked = self.skipped = self.failed = 0
        self.waiting: dict[str, int] = {}
        self.problems: list[str] = []
        self.put_off: dict[str | None, tuple[str, str]] = {}  # whose model is of no use in this run → (reason, words)
        self._names: dict[str, list[str]] = {"active": [], "candidate": [], "quarantined": [], "archived": []}
        self._dropped: list[str] = []

    def applied(self, done: Sequence[tuple[str, Json]]) -> None:
        for _, edit in done:
            if edit["action"] == "nothing" or edit.get("result", "ok") != "ok":
                why = edit["reasons"] if edit["action"] == "nothing" else [edit["result"]]
                self._dropped.append(f"{edit['op']} {edit['name']}: {'; '.join(why)}")
            else:
                self._names[edit["status"]].append(edit["name"])

    def report(self) -> EvolveReport:
        names = {status: tuple(found) for status, found in self._names.items()}
        return EvolveReport(
            self.found,
            self.asked,
            self.waiting,
            self.skipped,
            self.failed,
            names["active"],
            names["candidate"],
            names["quarantined"],
            names["archived"],
            tuple(self._dropped),
            tuple(self.problems),
        )


# --- the answer ---------------------------------------------------------------------------------


def _read(answer: Completion, known: dict[str, str], told: Told) -> tuple[editing.Proposal | None, list[str]]:
    """What can be used of an answer, and what is to be repaired."""
    try:
        proposal = editing.parse_proposal(answer.text, known)
    except WireError as e:
        return None, [f"{e}{' (it was cut off: be shorter)' if answer.truncated else ''}"]
    return proposal, [*proposal.faults, *_made_up(proposal.edits, told)]


def _made_up(edits: Sequence[editing.Edit], told: Told) -> list[str]:
    return [
        f"edit {edit.name!r}: the quote {quote[:60]!r} is not in the conversation; copy the user's words exactly"
        for edit in edits
        for quote in edit.quotes
        if not is_said(quote, told.spans)
    ]


def _decided(edits: Sequence[editing.Edit], ground: Ground, library: Library) -> list[Decision]:
    """Each edit is decided on the library as the earlier ones leave it."""
    decisions: list[Decision] = []
    for edit in edits:
        decision = decide(edit, ground)
        decisions.append(decision)
        if decision.skill is not None:
            ground = _with(ground, decision.skill)
    return decisions


def _with(ground: Ground, skill: Skill) -> Ground:
    library = ground.library
    if skill.status is Status.CANDIDATE:
        return replace(ground, library=replace(library, candidates=(*library.candidates, skill)))
    others = tuple(s for s in library.skills if s.name != skill.name)
    return replace(ground, library=replace(library, skills=(*others, skill)))


def _nothing_said(told: Told) -> str | None:
    said = sum(len(span.text.encode()) for span in told.of(Source.HUMAN, Source.DOUBTED))
    if said < _MIN_HUMAN_CHARS:
        return "no human said anything of substance in it"
    return None if told.answered else "nothing in it was answered"


def _open_segments(store: Store, now: float) -> Sequence[Row[Any]]:
    """Those to be worked on now, oldest first; the proposed ones come first of all."""
    with store.reading() as db:
        return db.execute(
            select(segments)
            .where(segments.c.state.in_(("waiting", "proposed")), segments.c.next_try_at <= now)
            .order_by(segments.c.state, segments.c.ended_at)
            .limit(_SEGMENTS_AT_ONCE)
        ).all()


def _put_off_all(store: Store, principal: str | None, now: float, detail: str, until: float) -> int:
    """Those that wait to be worked on, of one principal or of all; how many."""
    waiting = [segments.c.state == "waiting", segments.c.next_try_at <= now]
    if principal is not None:
        waiting.append(segments.c.principal == principal)
    with store.transaction() as db:
        return db.execute(update(segments).where(*waiting).values(detail=detail, next_try_at=until, updated_at=now)).rowcount


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def segment_counts(store: Store) -> dict[str, int]:
    """State, or "waiting(reason)" → how many segments; for `status`."""
    counts: dict[str, int] = {}
    with store.reading() as db:
        for row in db.execute(
            select(segments.c.state, segments.c.detail, func.count().label("n")).group_by(
                segments.c.state, segments.c.detail
            )
        ):
            waits = row.state == "waiting" and row.detail is not None and row.detail.startswith("waiting(")
            name = row.detail.partition(":")[0] if waits else row.state
            counts[name] = counts.get(name, 0) + row.n
    return dict(sorted(counts.items()))
