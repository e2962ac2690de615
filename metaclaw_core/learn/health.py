"""Whether the judge may be believed at all: the golden set and the gate before RL.

Design: 60 pairs of our own, each with a step that is plainly better, are judged in both orders when the
worker starts and once a week. A judge that agrees too little (κ < .4) or follows the order instead of
the content (flips > 15 %) pauses RL: what it says would be trained on. The result is a row of the store,
bound to the judge it was made with; another model, address or prompt needs its own. Scoring goes on,
since scores are for reading, too.

Limits: passing says that the judge can tell plain cases apart, not that it is right on hard ones. A
judge that can't be reached leaves the last result as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files

from sqlalchemy import select

from metaclaw_core.learn.calibrate import Calibration, Pair, examine, read_items, summarise
from metaclaw_core.learn.endpoint import Endpoint, judge_endpoint
from metaclaw_core.learn.judge import prompt_version
from metaclaw_core.learn.llm import LLMClient
from metaclaw_core.model import Json
from metaclaw_core.settings import Judge, Settings
from metaclaw_core.store.queries import upsert
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import health

MIN_KAPPA = 0.4
MAX_FLIPS = 0.15
WEEK_SECONDS = 7 * 86_400.0
_START_SECONDS = 86_400.0  # a worker that restarts often does not examine the judge each time
_NAME = "judge"


@dataclass(frozen=True, slots=True)
class Health:
    ok: bool
    reason: str | None  # None: ok
    checked_at: float
    judge: Json  # which judge was examined
    result: Json  # a `Calibration` as JSON


def golden_pairs() -> list[Pair]:
    """The shipped set."""
    source = files("metaclaw_core.learn") / "golden" / "pairs.jsonl"
    items = read_items(source.read_text(encoding="utf-8").splitlines(), "golden/pairs.jsonl")
    return [item for item in items if isinstance(item, Pair)]


def health_of(store: Store) -> Health | None:
    """The last result; None: no judge was ever examined."""
    with store.reading() as connection:
        row = connection.execute(select(health).where(health.c.name == _NAME)).first()
    return None if row is None else Health(row.ok, row.reason, row.checked_at, row.detail["judge"], row.detail["result"])


def health_due(
    store: Store, settings: Settings, *, at_start: bool = False, clock: Callable[[], float] = time.time
) -> bool:
    """Whether the judge is to be examined now: never was, is another one, or long ago. False without a judge."""
    endpoint = judge_endpoint(settings)
    if endpoint is None:
        return False
    last = health_of(store)
    if last is None or last.judge != _identity(endpoint, settings.judge):
        return True
    return clock() - last.checked_at > (_START_SECONDS if at_start else WEEK_SECONDS)


def rl_pause_reason(store: Store, settings: Settings) -> str | None:
    """Why RL may not train on the judge's scores now; None: it may."""
    endpoint = judge_endpoint(settings)
    if endpoint is None:
        return "no judge is configured (rl.prm_url or llm.*)"
    last = health_of(store)
    if last is None:
        return "the judge has not been examined yet"
    if last.judge != _identity(endpoint, settings.judge):
        return "the judge was changed and has not been examined since"
    return last.reason


async def judge_health(
    store: Store,
    client: LLMClient,
    settings: Judge = Judge(),  # noqa: B008 - frozen
    *,
    clock: Callable[[], float] = time.time,
    on_item: Callable[[], None] = lambda: None,
) -> Health:
    """Examine the judge and keep the result. Raises LLMUnavailable, LLMRefused, BudgetExhausted, StoreError, and then
    the last result stands."""
    outcomes, unanswered = await examine(golden_pairs(), client, settings, on_item=on_item)
    result = summarise(outcomes, unanswered)
    reason = _reason(result)
    found = Health(reason is None, reason, clock(), _identity(client.endpoint, settings), asdict(result))
    row = {
        "name": _NAME,
        "ok": found.ok,
        "reason": reason,
        "checked_at": found.checked_at,
        "detail": {"judge": found.judge, "result": found.result},
    }
    with store.transaction() as connection:
        insert = upsert(connection.dialect.name, health)
        changes = {name: insert.excluded[name] for name in row if name != "name"}
        connection.execute(insert.on_conflict_do_update(index_elements=["name"], set_=changes), row)
    return found


@dataclass(frozen=True, slots=True)
class CheckReport:
    checked: bool  # False: not due, or nobody to examine
    problems: tuple[str, ...] = ()


async def check_judge(
    store: Store,
    settings: Settings,
    client: LLMClient | None,
    *,
    at_start: bool = False,
    clock: Callable[[], float] = time.time,
) -> CheckReport:
    """The worker's job: examine the judge if it is due. Raises like `judge_health`; it stays due then."""
    if client is None or not health_due(store, settings, at_start=at_start, clock=clock):
        return CheckReport(checked=False)
    found = await judge_health(store, client, settings.judge, clock=clock)
    return CheckReport(checked=True, problems=(f"RL is paused: {found.reason}.",) if found.reason else ())


def _reason(result: Calibration) -> str | None:
    kappa, flips = result.kappa, result.flips
    if kappa is None or kappa < MIN_KAPPA:
        said = "nothing" if kappa is None else f"{kappa:.2f}"
        return f"the judge agrees too little with the golden set: κ is {said}, it must be at least {MIN_KAPPA}"
    if flips is None or flips > MAX_FLIPS:
        said = "no pair was decided in both orders" if flips is None else f"{flips:.0%} of the pairs"
        return f"the judge follows the order of the candidates: {said}, at most {MAX_FLIPS:.0%} may"
    return None


def _identity(endpoint: Endpoint, settings: Judge) -> Json:
    return {
        "url": endpoint.url,
        "models": list(settings.models or (endpoint.model,)),
        "prompts": [prompt_version("judge"), prompt_version("pair")],
    }


