"""Line charts as SVG text: for the page and for the report, without a script and without a file from elsewhere.

Design: figures in, markup out. A gap in a series (None) is a gap in the line, never a zero. Colours come from the style
sheet through classes, so that a chart follows light and dark. Labels are numbers and our own words; they are escaped anyway.

Limits: one y axis, linear; at most four series are told apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 460, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 26


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    points: Sequence[tuple[float, float | None]]  # (x, y), x ascending; y None: unknown there


def line_chart(title: str, series: Sequence[Series], *, marks: Sequence[tuple[float, str]] = (), limit: float | None = None) -> Markup:
    """One chart; `marks` are vertical lines with words (a new version), `limit` a horizontal one. Says so where nothing is known."""
    known = [(x, y) for one in series for x, y in one.points if y is not None and math.isfinite(y)]
    head = f'<figure class="chart"><figcaption>{escape(title)}{_legend(series)}</figcaption>'
    if not known:
        return Markup(f"{head}<p>No figures yet.</p></figure>")  # noqa: S704 - made of escaped parts
    xs = [x for x, _ in known] + [x for x, _ in marks]
    ys = [y for _, y in known] + ([limit] if limit is not None else [])
    left, right = min(xs), max(xs)
    ticks = _ticks(min(ys), max(ys))
    low, high = ticks[0], ticks[-1]

    def at_x(x: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ((x - left) / (right - left) if right > left else 0.5)

    def at_y(y: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * ((y - low) / (high - low))

    parts = [f'{head}<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in ticks:
        y = at_y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_label(tick)}</text>')
    for x, anchor in ((left, "start"), (right, "end")) if right > left else ((left, "middle"),):
        parts.append(f'<text class="tick" x="{at_x(x):.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{_label(x)}</text>')
    for x, words in marks:
        parts.append(f'<line class="mark" x1="{at_x(x):.1f}" x2="{at_x(x):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"><title>{escape(words)}</title></line>')
    if limit is not None:
        parts.append(f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at_y(limit):.1f}" y2="{at_y(limit):.1f}"/>')
    for number, one in enumerate(series):
        for run in _runs(one.points):
            if len(run) > 1:
                dots = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in run)
                parts.append(f'<polyline class="series s{number % 4}" points="{dots}"/>')
            else:
                (x, y), *_ = run
                parts.append(f'<circle class="dot s{number % 4}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="2.5"/>')
    return Markup("".join((*parts, "</svg></figure>")))  # noqa: S704 - made of escaped parts


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    return "".join(f' <span class="legend s{n % 4}">{escape(one.name)}</span>' for n, one in enumerate(series))


def _runs(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """The stretches without a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None or not math.isfinite(y):
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that hold both ends."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next((factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 4), 10)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [n * step for n in range(first, last + 1)]


def _label(value: float) -> str:
    return f"{value:.4g}"
