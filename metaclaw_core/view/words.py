"""How values read, in the terminal and on the page alike.

Design: None is unknown and reads "–", never 0. What people and models wrote is data: `clean` takes out what a terminal
would obey (escape sequences) and what reorders the text around it (bidirectional controls).
"""

from __future__ import annotations

import re
from datetime import datetime

UNKNOWN = "–"
# C0 and C1 controls but tab and newline, marks that turn text around, lone surrogates.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    """`text` without characters that do something; each leaves a mark."""
    return _OBEYED.sub("\ufffd", text.replace("\r\n", "\n"))


def one_line(text: str | None, limit: int = 200) -> str:
    """`text` on one line of at most `limit` characters."""
    if text is None:
        return UNKNOWN
    line = " ".join(clean(text[: 8 * limit]).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def when(seconds: float | None) -> str:
    """Local time of unix `seconds`."""
    return UNKNOWN if seconds is None else datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def number(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def milliseconds(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value / 1000:.1f} s" if value >= 1000 else f"{value:.0f} ms"


def score(value: float | None) -> str:
    """A vote (-1, 0, +1) or a mean of them."""
    if value is None:
        return UNKNOWN
    if isinstance(value, int):
        return f"{value:+d}" if value else "0"
    return f"{value:+.2f}"


def figure(value: float | None) -> str:
    """A measured number, to three digits."""
    return UNKNOWN if value is None else f"{value:.3g}"


def answer(row: dict[str, object]) -> str | None:
    """What a turn answered: its text, or the names of the tools it called. None: nothing is known of an answer."""
    if row["assistant_text"]:
        return str(row["assistant_text"])
    calls = row["tool_calls"]
    if not isinstance(calls, list):
        return None
    return "→ " + ", ".join(str(call.get("name") or "?") for call in calls) if calls else None
