"""The questions that the view asks the store: newest first, a page at a time, plain values out.

Design: each question touches the rows of one page and what hangs on them, so that a page of a large store costs what a
page of a small one does; only the counts of a state walk an index. Sums over unknown values are None.

Limits: pages are counted from the newest, so what arrives while somebody turns pages moves rows to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, case, func, select

from metaclaw_core.errors import StoreError
from metaclaw_core.learn.counters import Figures, count_uses, figures
from metaclaw_core.model import Json, Message
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import health, job_runs, notices, segments, sessions, skill_uses, spend, turns, votes

SESSIONS = 50  # rows of one page
TURNS = 200
_SINCE_ROWS = 2_000  # requests of a session looked back for where a skill came in
_SEGMENTS = 500  # looked through for what was decided on a skill
_SHOWN = (
    turns.c.id, turns.c.turn_id, turns.c.session, turns.c.kind, turns.c.model, turns.c.response_model, turns.c.user_text,
    turns.c.assistant_text, turns.c.tool_calls, turns.c.injected, turns.c.input_tokens, turns.c.cached_tokens,
    turns.c.output_tokens, turns.c.state, turns.c.reason, turns.c.error, turns.c.status_code, turns.c.started_at,
    turns.c.duration_ms, turns.c.score, turns.c.retry, turns.c.live,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Page:
    """Some of `total` rows, the newest first."""

    rows: tuple[dict[str, Any], ...]
    number: int  # from 1
    size: int
    total: int

    @property
    def last(self) -> int:
        return max(1, -(-self.total // self.size))


def sessions_page(store: Store, number: int, size: int = SESSIONS) -> Page:
    """Sessions with what happened in them, the last used first."""
    with store.reading() as db:
        total = int(db.scalar(select(func.count()).select_from(sessions)) or 0)
        found = db.execute(
            select(sessions).order_by(sessions.c.last_at.desc(), sessions.c.id).limit(size).offset((number - 1) * size)
        ).all()
        more = _of_sessions(db, [row.id for row in found])
    return Page(tuple({**row._mapping, **more[row.id]} for row in found), number, size, total)


def session(store: Store, key: str) -> dict[str, Any] | None:
    """One session as in `sessions_page`; None: there is none with that key."""
    with store.reading() as db:
        row = db.execute(select(sessions).where(sessions.c.id == key)).first()
        return None if row is None else {**row._mapping, **_of_sessions(db, [key])[key]}


def _of_sessions(db: Connection, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    more: dict[str, dict[str, Any]] = {
        key: {"requests": 0, "human_turns": 0, "kinds": {}, "skills": [], "opening": None, "good": 0, "bad": 0, "scored": 0,
              "input_tokens": None, "cached_tokens": None, "output_tokens": None}
        for key in keys
    }  # fmt: skip
    of_these = turns.c.session.in_(keys)
    counts = (
        func.count().label("requests"),
        func.sum(turns.c.input_tokens).label("input_tokens"),
        func.sum(turns.c.cached_tokens).label("cached_tokens"),
        func.sum(turns.c.output_tokens).label("output_tokens"),
        func.sum(case((turns.c.score > 0, 1), else_=0)).label("good"),
        func.sum(case((turns.c.score < 0, 1), else_=0)).label("bad"),
        func.count(turns.c.scored_at).label("scored"),
    )
    for row in db.execute(select(turns.c.session, *counts).where(of_these).group_by(turns.c.session)):
        more[row.session] |= {name: None if value is None else int(value) for name, value in row._mapping.items() if name != "session"}
    for row in db.execute(
        select(turns.c.session, turns.c.kind, func.count().label("n"), func.count(turns.c.turn_id.distinct()).label("human"))
        .where(of_these)
        .group_by(turns.c.session, turns.c.kind)
        .order_by(turns.c.kind)
    ):
        more[row.session]["kinds"][row.kind] = row.n
        if row.kind == "main":
            more[row.session]["human_turns"] = row.human
    for row in db.execute(
        select(turns.c.session, turns.c.injected).where(of_these, turns.c.injected.is_not(None)).distinct()
    ):
        known = more[row.session]["skills"]
        known += [name for name in row.injected if name not in known]
    first = select(func.min(turns.c.id)).where(of_these, turns.c.kind == "main", turns.c.user_text.is_not(None))
    for row in db.execute(select(turns.c.session, turns.c.user_text).where(turns.c.id.in_(first.group_by(turns.c.session)))):
        more[row.session]["opening"] = row.user_text
    return more


def turns_page(store: Store, session_key: str | None, number: int, size: int = TURNS) -> Page:
    """Requests of a session (None: of all), the newest first."""
    where = [turns.c.session == session_key] if session_key is not None else []
    with store.reading() as db:
        total = int(db.scalar(select(func.count()).select_from(turns).where(*where)) or 0)
        found = db.execute(
            select(*_SHOWN)
            .where(*where)
            .order_by(turns.c.started_at.desc(), turns.c.id.desc())
            .limit(size)
            .offset((number - 1) * size)
        ).all()
    return Page(tuple(dict(row._mapping) for row in found), number, size, total)


@dataclass(frozen=True, slots=True)
class HumanTurn:
    """The requests that one message of a human (or one side turn) led to."""

    steps: tuple[dict[str, Any], ...]  # oldest first, at least one
    user_text: str | None
    skills: tuple[str, ...]
    new_skills: tuple[str, ...]  # not in the turn before, as far as the page reaches

    @property
    def score(self) -> int | None:
        """The last one that was given."""
        return next((step["score"] for step in reversed(self.steps) if step["score"] is not None), None)


def grouped(rows: Sequence[dict[str, Any]]) -> tuple[HumanTurn, ...]:
    """Requests, newest first, gathered to the turns they belong to, newest first."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in reversed(rows):
        groups.setdefault(row["turn_id"] or row["id"], []).append(row)
    out: list[HumanTurn] = []
    before: set[str] = set()
    for steps in groups.values():
        text = next((step["user_text"] for step in steps if step["user_text"]), None)
        skills = tuple(dict.fromkeys(name for step in steps for name in step["injected"] or ()))
        out.append(HumanTurn(tuple(steps), text, skills, tuple(name for name in skills if name not in before)))
        if skills:
            before = set(skills)
    return tuple(reversed(out))


@dataclass(frozen=True, slots=True)
class Since:
    """Where a skill that is in a request's prompt came into the session's block."""

    skill: str
    turn: int  # row id of the request that had it first
    at: float
    said: str | None  # what the human said then: what the skills were searched with
    score: float | None  # the retriever's, then; None: not known


@dataclass(frozen=True, slots=True)
class TurnDetail:
    row: dict[str, Any]
    session: dict[str, Any] | None
    since: tuple[Since, ...]
    injection: Json  # the injected text; None: nothing was
    votes: tuple[dict[str, Any], ...]
    messages: tuple[Message, ...]
    response: Message | None
    problem: str | None  # why the conversation can't be shown
    before: int | None  # row ids of the session's requests around it
    after: int | None


def turn(store: Store, row_id: int) -> TurnDetail | None:
    """One request with all that hangs on it; None: there is none."""
    with store.reading() as db:
        found = db.execute(select(turns).where(turns.c.id == row_id)).first()
        if found is None:
            return None
        row = dict(found._mapping)
        said = db.execute(select(votes).where(votes.c.turn == row_id).order_by(votes.c.number)).all()
        since = _since(db, row)
        before, after = _neighbours(db, row)
    messages: tuple[Message, ...] = ()
    response = problem = None
    try:
        messages = store.conversation(row["prompt_tip"])
        response = store.response(row)
    except StoreError as e:  # a gap in one conversation; the rest of the page is of use
        problem = str(e)
    whose = session(store, row["session"]) if row["session"] else None
    injection = store.blob(row["injection"])
    gathered = tuple(dict(vote._mapping) for vote in said)
    return TurnDetail(row, whose, since, injection, gathered, messages, response, problem, before, after)


def _since(db: Connection, row: dict[str, Any]) -> tuple[Since, ...]:
    """For each skill in the request's block the first request of the unbroken run that has it."""
    if not row["injected"] or row["session"] is None:
        return ()
    earlier = db.execute(
        select(turns.c.id, turns.c.injected, turns.c.started_at, turns.c.user_text)
        .where(turns.c.session == row["session"], turns.c.started_at <= row["started_at"], turns.c.injected.is_not(None))
        .order_by(turns.c.started_at.desc(), turns.c.id.desc())
        .limit(_SINCE_ROWS)
    ).all()
    first: dict[str, Since] = {}
    scores = dict(zip(row["injected"], row["injected_scores"] or (), strict=False))
    open_ = list(dict.fromkeys(row["injected"]))
    for step in earlier:
        open_ = [name for name in open_ if name in step.injected]
        if not open_:
            break
        first |= {name: Since(name, step.id, step.started_at, step.user_text, scores.get(name)) for name in open_}
    return tuple(first[name] for name in dict.fromkeys(row["injected"]) if name in first)


def _neighbours(db: Connection, row: dict[str, Any]) -> tuple[int | None, int | None]:
    if row["session"] is None:
        return None, None
    own, at = turns.c.session == row["session"], row["started_at"]
    earlier = (turns.c.started_at < at) | ((turns.c.started_at == at) & (turns.c.id < row["id"]))
    later = (turns.c.started_at > at) | ((turns.c.started_at == at) & (turns.c.id > row["id"]))
    before = select(turns.c.id).where(own, earlier).order_by(turns.c.started_at.desc(), turns.c.id.desc()).limit(1)
    after = select(turns.c.id).where(own, later).order_by(turns.c.started_at, turns.c.id).limit(1)
    return db.scalar(before), db.scalar(after)


def skill_figures(store: Store) -> dict[str, Figures]:
    """How every skill does that was ever injected, up to the newest turn."""
    count_uses(store)
    return figures(store)


def uses_of(store: Store, skill: str, limit: int = 20) -> tuple[dict[str, Any], ...]:
    """The newest human turns that had the skill in their prompt: their last request each."""
    used = select(skill_uses.c.turn_id).where(skill_uses.c.skill == skill).order_by(skill_uses.c.at.desc()).limit(limit)
    with store.reading() as db:
        last = select(func.max(turns.c.id)).where(turns.c.turn_id.in_(db.scalars(used).all())).group_by(turns.c.turn_id)
        rows = db.execute(select(*_SHOWN).where(turns.c.id.in_(last)).order_by(turns.c.started_at.desc())).all()
    return tuple(dict(row._mapping) for row in rows)


def decisions_on(store: Store, skill: str, limit: int = 10) -> tuple[dict[str, Any], ...]:
    """What the evolver decided about a skill of that name and why, newest first."""
    with store.reading() as db:
        rows = db.execute(
            select(segments.c.session, segments.c.updated_at, segments.c.edits)
            .where(segments.c.edits.is_not(None))
            .order_by(segments.c.updated_at.desc())
            .limit(_SEGMENTS)
        ).all()
    found = ({"session": row.session, "at": row.updated_at, **edit} for row in rows for edit in row.edits if edit["name"] == skill)
    return tuple(edit for edit, _ in zip(found, range(limit), strict=False))


@dataclass(frozen=True, slots=True)
class Learning:
    """What the worker did and waits for."""

    states: dict[str, int]  # of turns
    segments: tuple[dict[str, Any], ...]
    runs: tuple[dict[str, Any], ...]
    spend: tuple[dict[str, Any], ...]
    health: tuple[dict[str, Any], ...]
    notices: tuple[dict[str, Any], ...]


def learning(store: Store, limit: int = 50) -> Learning:
    with store.reading() as db:

        def rows(query: Any) -> tuple[dict[str, Any], ...]:
            return tuple(dict(row._mapping) for row in db.execute(query))

        return Learning(
            _states(db),
            rows(select(segments).order_by(segments.c.updated_at.desc()).limit(limit)),
            rows(select(job_runs).order_by(job_runs.c.id.desc()).limit(limit)),
            rows(select(spend).order_by(spend.c.day.desc(), spend.c.purpose).limit(limit)),
            rows(select(health).order_by(health.c.name)),
            rows(select(notices).order_by(notices.c.at.desc())),
        )


def turn_states(store: Store) -> dict[str, int]:
    """State → turns in it."""
    with store.reading() as db:
        return _states(db)


def _states(db: Connection) -> dict[str, int]:
    rows = db.execute(select(turns.c.state, func.count().label("n")).group_by(turns.c.state))
    return dict(sorted((row.state, row.n) for row in rows))
