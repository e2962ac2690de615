"""The caller's own key, and the bounds it is held to.

Design: keys arrive on the worker's stdin and live in this object only. Whoever wants to use one asks
`borrow` with a segment, and gets a key or the reason to wait:

- evolver only: `borrow` is called by nobody else, and the client it leads to asks for nothing else;
- plain API keys of trusted hosts only, checked again here;
- only to the origin and path where that key succeeded, and only for a session of the same principal
  that used that very path;
- at most 5 % of the tokens that the principal's own requests took in the last 24 hours;
- not for 15 minutes after a 401, a 429 or a 5xx on it, the caller's own included.

What our calls took is kept in the store, so a restart forgets neither the spending nor the pause. The
first use is announced once, in the log and as a notice.

Limits: where the provider reports no usage, the caller's tokens are a lower bound from the length of the
text. The 5 % are of what was recorded: traffic that bypasses the proxy doesn't count.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row, and_, func, insert, or_, select

from metaclaw_core.learn.runs import notice
from metaclaw_core.providers import is_api_key, is_trusted
from metaclaw_core.store.queries import load_chain
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import blobs, caller_spend, turns
from metaclaw_core.wire.jsonio import dumps

logger = logging.getLogger("metaclaw.worker")

SHARE = 0.05
DAY = 86_400.0
PAUSE = 900.0  # seconds
BYTES_PER_TOKEN = 4.5  # of a request; OpenClaw's, measured, have 4.3, prose somewhat more
_MAX_KEYS = 256
_MANY_TURNS = 300


@dataclass(frozen=True, slots=True)
class CallerKey:
    principal: str
    scheme: str
    host: str
    port: int
    path: str
    dialect: str
    header: str
    key: str = field(repr=False)

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Borrowed:
    """A key, for which model, and how many tokens the next call may take."""

    key: CallerKey
    model: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why nobody can be asked now: "credential", "paused", "budget" or "off", and the sentence to it."""

    reason: str
    text: str


class Callers:
    """The keys of one worker. `hosts`: ``proxy.hosts``; `enabled`: ``llm.use_caller_credentials``."""

    def __init__(
        self, store: Store, hosts: Sequence[str], *, enabled: bool, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._hosts = tuple(hosts)
        self._enabled = enabled
        self._clock = clock
        self._keys: dict[tuple[str, str], CallerKey] = {}
        self._refused: dict[str, float] = {}  # principal → when

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"Callers({len(self._keys)} keys)"

    def take(self, message: Mapping[str, Any]) -> bool:
        """One line of the proxy. False: it was none of ours, or is not believed."""
        if not self._enabled:
            return False
        if message.get("type") == "caller_refused" and isinstance(message.get("principal"), str):
            self._refused[message["principal"]] = self._clock()
            return True
        if message.get("type") != "caller_key":
            return False
        try:
            fields = {name: message[name] for name in CallerKey.__dataclass_fields__}
        except KeyError:
            return False
        port = fields.pop("port")
        if not isinstance(port, int) or not all(isinstance(value, str) for value in fields.values()):
            return False
        key = CallerKey(port=port, **fields)
        if key.scheme not in ("https", "http") or not key.path.startswith("/"):
            return False
        if not is_trusted(key.host, key.port, self._hosts) or not is_api_key(key.host, key.header, key.key):
            return False
        if len(self._keys) >= _MAX_KEYS and (key.principal, key.path) not in self._keys:
            del self._keys[next(iter(self._keys))]
        self._keys[key.principal, key.path] = key
        return True

    def borrow(self, segment: Row[Any], least: int) -> Borrowed | Waiting:
        """A key for `segment`, if at least `least` tokens may be spent on it now. Raises StoreError."""
        if not self._enabled:
            return Waiting("off", "no LLM is configured and llm.use_caller_credentials is false")
        used = self._used(segment)
        found = next(((key, model) for path, model in used if (key := self._keys.get((segment.principal, path)))), None)
        if found is None or found[1] is None:
            return Waiting("credential", "no LLM is configured and the caller's key is not at hand")
        if (until := self.paused_until(segment.principal)) is not None:
            minutes = max(1, round((until - self._clock()) / 60))
            return Waiting("paused", f"the provider refused the caller's key; next try in {minutes} min")
        tokens = self.allowance(segment.principal, least)
        if tokens < least:
            return Waiting("budget", f"5 % of the caller's tokens of 24 h leave {max(tokens, 0)}, {least} are needed")
        return Borrowed(found[0], found[1], tokens)

    def record(self, key: CallerKey, tokens: int, status: int | None) -> None:
        """One call of ours was made."""
        row = {"principal": key.principal, "at": self._clock(), "tokens": tokens, "status": status}
        with self._store.transaction() as db:
            db.execute(insert(caller_spend), row)

    def announce(self, key: CallerKey) -> None:
        """Say once, ever, that a caller's key is used."""
        text = (
            f"Skills are written with your agent's own model and key at {key.origin} (at most {SHARE:.0%} of its tokens). "
            "Set llm.* to use another model, or llm.use_caller_credentials: false to stop it."
        )
        if notice(self._store, "caller credentials", text, self._clock()):
            logger.warning("%s", text)

    # --- bounds ---------------------------------------------------------------------------------

    def paused_until(self, principal: str) -> float | None:
        """Until when the principal's key is left alone; None: it may be used."""
        now = self._clock()
        since = now - PAUSE
        ended = turns.c.started_at + func.coalesce(turns.c.duration_ms, 0.0) / 1000
        theirs = select(func.max(ended)).where(
            turns.c.principal == principal, turns.c.started_at > since - DAY / 24, _refusal(turns.c.status_code)
        )
        ours = select(func.max(caller_spend.c.at)).where(
            caller_spend.c.principal == principal, caller_spend.c.at > since, _refusal(caller_spend.c.status)
        )
        with self._store.reading() as db:
            times = [db.scalar(theirs), db.scalar(ours), self._refused.get(principal)]
        last = max((at for at in times if at is not None), default=None)
        return last + PAUSE if last is not None and last + PAUSE > now else None

    def allowance(self, principal: str, enough: int) -> int:
        """How many tokens may still be spent, exact where it is less than four times `enough`."""
        since = self._clock() - DAY
        with self._store.reading() as db:
            spent = db.scalar(
                select(func.coalesce(func.sum(caller_spend.c.tokens), 0)).where(
                    caller_spend.c.principal == principal, caller_spend.c.at > since
                )
            )
            rows = db.execute(
                select(*_COUNTED)
                .where(turns.c.principal == principal, turns.c.started_at > since, turns.c.live.is_(True))
                .where(turns.c.response_tip.is_not(None))
                .order_by(turns.c.started_at.desc())
                .limit(_MANY_TURNS * 10)
            ).all()
            total = 0
            estimated = 0
            for row in rows:
                if total * SHARE > int(spent or 0) + 4 * enough:
                    break
                if row.input_tokens is not None:
                    total += row.input_tokens + (row.output_tokens or 0)
                elif estimated < _MANY_TURNS:
                    estimated += 1
                    total += _least_tokens(db, row)
        return int(total * SHARE) - int(spent or 0)

    def _used(self, segment: Row[Any]) -> list[tuple[str, str | None]]:
        """The paths and models of the segment's answered turns, newest first."""
        with self._store.reading() as db:
            rows = db.execute(
                select(turns.c.path, turns.c.model)
                .where(
                    turns.c.session == segment.session,
                    turns.c.principal == segment.principal,
                    turns.c.started_at.between(segment.started_at, segment.ended_at),
                    turns.c.live.is_(True),
                    turns.c.response_tip.is_not(None),
                )
                .order_by(turns.c.started_at.desc())
                .limit(_MANY_TURNS)
            )
            return list(dict.fromkeys((row.path, row.model) for row in rows))


_COUNTED = (turns.c.input_tokens, turns.c.output_tokens, turns.c.prompt_tip, turns.c.assistant_text, turns.c.tools)


def _refusal(status: Any) -> Any:
    return or_(status.in_((401, 429)), and_(status >= 500, status < 600))


def _least_tokens(db: Any, row: Any) -> int:
    """A lower bound where the provider said nothing."""
    size = len((row.assistant_text or "").encode("utf-8", "surrogatepass"))
    for message in load_chain(db, row.prompt_tip):
        for text in (message.text, *(c.arguments for c in message.tool_calls), *(r.text for r in message.tool_results)):
            size += len(text.encode("utf-8", "surrogatepass"))
    if row.tools is not None:
        size += len(dumps(db.scalar(select(blobs.c.content).where(blobs.c.id == row.tools))))
    return int(size / BYTES_PER_TOKEN)
