"""Why nothing may be trained now: switched off, the day's budget, the judge, the user's hours.

Design: one question, asked before each call that costs much and before each of a step's irreversible parts. It reads the store
anew each time, so a budget that is spent, a judge that failed its examination or a user who came back is seen within one call.

Limits: what is in flight when the answer changes is finished. A route that was pinned by hand is not looked at here: it stops a
step from beginning, not one from ending.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import func, select

from metaclaw_core.learn.health import health_of, rl_pause_reason
from metaclaw_core.learn.money import over_budget
from metaclaw_core.learn.prices import Prices
from metaclaw_core.learn.windows import closed
from metaclaw_core.settings import Settings
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import turns


class Guards:
    def __init__(self, store: Store, settings: Settings, prices: Prices, *, judged: bool, taught: bool) -> None:
        """`judged`: the settings name a judge. `taught`: a teacher is asked."""
        self._store, self._settings, self._prices = store, settings, prices
        self._judged = judged
        self.unjudged = taught and not judged  # a teacher alone: no judge will ever score the turns

    def closed(self) -> str | None:
        """Why nothing may be trained now, as a sentence; None: it may."""
        if not self._settings.rl.train:
            return "rl.train is off"
        if (spent := over_budget(self._store, self._settings, self._prices)) is not None:
            return spent
        return self._judge_unfit() or self._window()

    def _judge_unfit(self) -> str | None:
        if self._judged:
            reason = rl_pause_reason(self._store, self._settings)
            return None if reason is None else f"nothing is trained on the judge's scores: {reason}"
        last = None if self.unjudged else health_of(self._store)
        return None if last is None or last.ok else f"the judge did not pass its examination: {last.reason}"

    def _window(self) -> str | None:
        if self._settings.rl.schedule == "immediate":
            return None
        with self._store.reading() as db:
            last = db.scalar(select(func.max(turns.c.started_at)).where(turns.c.live))
        return closed(self._settings.rl, datetime.now(), None if last is None else datetime.fromtimestamp(last))
