"""One frame of ``metaclaw top``: what is known now in, something rich can print out.

Design: `gather` asks, `frame` draws; the caller asks the proxies, since the view knows no proxy. Rows are cut to what the
terminal is high; the newest come first, so that what is cut is old. What people and models wrote is printed as text without
a terminal's control characters, never as markup.

Limits: the figures of skills are as of the last turn in the store.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from metaclaw_core.learn.counters import Figures
from metaclaw_core.learn.evolve import segment_counts
from metaclaw_core.learn.runs import all_notices, last_runs
from metaclaw_core.store.rollouts import Store
from metaclaw_core.view import reading, words

_WIDE = 120
_MOST = 40  # rows of one table, however high the terminal


@dataclass(frozen=True, slots=True)
class Seen:
    """What is in the store."""

    states: Mapping[str, int]
    segments: Mapping[str, int]
    sessions: tuple[dict[str, Any], ...]
    turns: tuple[dict[str, Any], ...]
    skills: tuple[tuple[str, Figures], ...]  # most used first
    runs: Sequence[dict[str, Any]]
    notices: Sequence[dict[str, Any]]


def gather(store: Store) -> Seen:
    used = sorted(reading.skill_figures(store).items(), key=lambda item: (-item[1].turns, item[0]))
    return Seen(
        states=reading.turn_states(store),
        segments=segment_counts(store),
        sessions=reading.sessions_page(store, 1, _MOST).rows,
        turns=reading.turns_page(store, None, 1, _MOST).rows,
        skills=tuple(used[:_MOST]),
        runs=last_runs(store),
        notices=all_notices(store),
    )


def frame(
    proxies: Sequence[Mapping[str, Any]], seen: Seen | None, problems: Sequence[str], *, width: int, height: int
) -> RenderableType:
    """`proxies` are answers to ``status``; `seen` is None where there is no store yet. About `height` lines; a terminal
    narrower than 120 columns leaves answers and scores out, so that what the user said can be read."""
    at = time.strftime("%H:%M:%S", time.localtime())
    parts: list[RenderableType] = [Rule(Text(f"metaclaw top  {at}"), align="left", style="dim"), _proxies(proxies)]
    parts += [Text(words.one_line(problem), style="red") for problem in problems]
    if seen is None:
        return Group(*parts, Text("Nothing has been recorded yet: `metaclaw run -- COMMAND` lets a command use the proxy."))
    queues = " · ".join(f"{n:,} {state}" for state, n in seen.states.items()) or "none"
    parts.append(_fact("requests", queues))
    if seen.segments:
        parts.append(_fact("segments", " · ".join(f"{n:,} {state}" for state, n in seen.segments.items())))
    parts += [_fact("notice", f"{words.when(notice['at'])} {words.one_line(notice['text'])}", "yellow") for notice in seen.notices]
    left = max(12, height - 2 * len(proxies) - len(parts) - 12)
    sessions, turns = max(2, left // 5), max(3, left // 2)
    others = max(2, left - sessions - turns)
    parts += [_sessions(seen.sessions[:sessions]), _turns(seen.turns[:turns], whole=width >= _WIDE)]
    parts.append(_beside(_skills(seen.skills[:others]), _runs(seen.runs[:others])))
    return Group(*parts)


def _fact(name: str, text: str, style: str = "") -> Text:
    return Text.assemble((f"{name:<10}", "bold"), (text, style), no_wrap=True, overflow="ellipsis")


def _proxies(proxies: Sequence[Mapping[str, Any]]) -> RenderableType:
    if not proxies:
        return _fact("proxy", "none is running: metaclaw start", "yellow")
    return Group(*(line for proxy in proxies for line in _proxy(proxy)))


def _proxy(answer: Mapping[str, Any]) -> list[Text]:
    if "error" in answer:
        return [_fact("proxy", f"pid {answer['pid']}: {words.one_line(str(answer['error']))}", "red")]
    counters, spool, skills = answer["counters"], answer["spool"], answer["skills"]
    hours, seconds = divmod(int(answer["uptime_s"]), 3600)
    bypassed = " · BYPASSED" if answer["bypass"] else ""
    lines = [
        _fact(
            "proxy",
            f"pid {answer['pid']} · {', '.join(answer['listen']) or 'not listening'} · {answer['mode']} · up {hours}h{seconds // 60:02}m"
            f" · {answer['sessions_active_10min']} sessions active · {answer['open_requests']} open{bypassed}",
            "yellow" if bypassed else "",
        ),
        _fact(
            "",
            f"{counters.get('exchanges', 0):,} exchanges, {counters.get('injected', 0):,} with skills"
            f" · {f'{skills["count"]} skills' if skills else 'no skill index yet'}"
            f" · spool {spool['queued']} queued" + (f", {spool['dropped']} LOST" if spool["dropped"] else "")
            + "".join(f" · {child['name']} {'runs' if child['pid'] else 'does not run'}" for child in answer["children"]),
            "red" if spool["dropped"] else "",
        ),
    ]
    if spool["last_error"]:
        lines.append(_fact("", words.one_line(spool["last_error"]), "red"))
    return lines


def _table(title: str, *columns: tuple[str, str]) -> Table:
    """Columns by heading and kind: "" as wide as needed, "right" for figures, "wide" for what gets the rest."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim", expand=True)
    for heading, kind in columns:
        table.add_column(
            heading,
            no_wrap=True,
            overflow="ellipsis",
            justify="right" if kind == "right" else "left",
            ratio=1 if kind == "wide" else None,
        )
    return table


def _sessions(rows: Sequence[dict[str, Any]]) -> Table:
    table = _table("Sessions", ("last", ""), ("agent", ""), ("turns", "right"), ("req", "right"), ("in", "right"), ("cached", "right"),
                   ("out", "right"), ("begins with", "wide"))  # fmt: skip
    for row in rows:
        figures = (row["human_turns"], row["requests"], row["input_tokens"], row["cached_tokens"], row["output_tokens"])
        opening = Text(words.one_line(row["opening"]))
        table.add_row(_clock(row["last_at"]), Text(words.one_line(row["agent"], 12)), *map(words.number, figures), opening)
    return table


def _turns(rows: Sequence[dict[str, Any]], *, whole: bool) -> Table:
    columns = [("at", ""), ("kind", ""), ("user", "wide"), ("answer", "wide"), ("skills", ""), ("in", "right"),
               ("cached", "right"), ("out", "right"), ("score", "right"), ("state", "")]  # fmt: skip
    shown = [whole or heading not in ("answer", "score") for heading, _ in columns]
    table = _table("Requests", *compress(columns, shown))
    for row in rows:
        failed = row["error"] is not None
        cells: tuple[RenderableType, ...] = (
            _clock(row["started_at"]),
            Text(row["kind"]),
            Text(words.one_line(row["user_text"])),
            Text(words.one_line(row["error"] if failed else words.answer(row)), style="red" if failed else ""),
            Text(words.one_line(", ".join(row["injected"]) if row["injected"] else None, 32 if whole else 16), style="green"),
            words.number(row["input_tokens"]),
            words.number(row["cached_tokens"]),
            words.number(row["output_tokens"]),
            words.score(row["score"]),
            Text(row["state"], style="red" if row["state"] == "failed" else ""),
        )
        table.add_row(*compress(cells, shown))
    return table


def _skills(used: Sequence[tuple[str, Figures]]) -> Table:
    table = _table("Skills by use", ("skill", "wide"), ("turns", "right"), ("sessions", "right"), ("with", "right"), ("without", "right"))
    for name, found in used:
        scores = (words.score(found.score_with), words.score(found.score_without))
        table.add_row(Text(words.one_line(name, 64)), words.number(found.turns), words.number(found.sessions), *scores)
    if not used:
        table.add_row(Text("none so far", style="dim"), "", "", "", "")
    return table


def _runs(runs: Sequence[dict[str, Any]]) -> Table:
    table = _table("Worker's last runs", ("job", ""), ("began", ""), ("outcome", "wide"))
    for run in runs:
        failed = run["ok"] is False
        outcome = {True: "ok", False: words.one_line(run["error"]), None: "running, or cut off"}[run["ok"]]
        table.add_row(Text(run["name"]), _clock(run["started_at"]), Text(outcome, style="red" if failed else ""))
    if not runs:
        table.add_row(Text("none", style="dim"), "", "")
    return table


def _beside(left: Table, right: Table) -> Table:
    grid = Table.grid(expand=True, padding=(0, 2))
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(left, right)
    return grid


def _clock(seconds: float) -> str:
    """Month and day only where it was not today."""
    text = words.when(seconds)
    return text[11:] if text[:10] == words.when(time.time())[:10] else text[5:16]
