"""When training may run: at once, or only while nobody waits for an answer.

Design: pure; asked before each step and again between its parts, so that a user who comes back waits for no more than the call
that is in flight. Requests themselves never wait: training and serving share no lock.

Limits: the clock is the machine's local time; an idle time is counted from the last request that reached the store.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from metaclaw_core.settings import RL, parse_hours


def closed(rl: RL, now: datetime, last_request: datetime | None) -> str | None:
    """Why training has to wait, as a sentence; None: it may run. `last_request` None: there was none."""
    if rl.schedule == "immediate":
        return None
    begin, end = parse_hours(rl.sleep_hours)
    at = now.time()
    asleep = begin <= at < end if begin <= end else at >= begin or at < end
    if asleep and last_request is not None and now - last_request < timedelta(minutes=1):
        return "a request came within the last minute (rl.schedule: windows)"
    if asleep:
        return None
    if rl.idle_minutes == 0:
        return f"it trains in rl.sleep_hours only ({rl.sleep_hours})"
    if last_request is not None and now - last_request < timedelta(minutes=rl.idle_minutes):
        return f"it trains in rl.sleep_hours ({rl.sleep_hours}), or after {rl.idle_minutes} minutes without a request (rl.idle_minutes)"
    return None
