from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from metaclaw_core.learn.windows import closed
from metaclaw_core.settings import RL, parse_hours

DAY = datetime(2026, 11, 25)


def at(clock: str) -> datetime:
    hours, minutes = map(int, clock.split(":"))
    return DAY + timedelta(hours=hours, minutes=minutes)


@pytest.mark.parametrize(
    ("clock", "last", "may"),
    [
        ("00:59", "00:50", False), ("01:00", "00:50", True), ("06:59", "06:00", True), ("07:00", "06:50", False),
        ("12:00", "11:50", False), ("12:00", "11:45", True), ("12:00", None, True), ("03:00", "02:59", True), ("03:00", "03:00", False),
    ],
)  # fmt: skip
def test_windows_are_the_hours_of_sleep_and_the_idle_minutes(clock: str, last: str | None, may: bool):
    rl = RL(schedule="windows", sleep_hours="01:00-07:00", idle_minutes=15)
    assert (closed(rl, at(clock), None if last is None else at(last)) is None) is may


def test_hours_may_go_over_midnight():
    rl = RL(schedule="windows", sleep_hours="23:00-06:30", idle_minutes=0)
    opens = {clock: closed(rl, at(clock), None) is None for clock in ("22:59", "23:00", "00:00", "06:29", "06:30")}
    assert opens == {"22:59": False, "23:00": True, "00:00": True, "06:29": True, "06:30": False}
    assert closed(rl, at("12:00"), None) == "it trains in rl.sleep_hours only (23:00-06:30)"


def test_without_windows_it_always_may():
    assert closed(RL(), at("12:00"), at("12:00")) is None


@pytest.mark.parametrize("text", ["", "1-7", "01:00", "25:00-07:00", "01:00-07:61", "01:00 to 07:00"])
def test_what_is_no_pair_of_times_is_refused(text: str):
    with pytest.raises(ValueError):  # noqa: PT011 - its own words or datetime's
        parse_hours(text)
    with pytest.raises(ValueError, match="sleep_hours"):
        RL(sleep_hours=text)
