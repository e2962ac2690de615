"""The Markdown table of `scripts/bench.py`'s figures, from its JSON: for the terminal and for README.md."""

from __future__ import annotations

from typing import Any

_NAMES = {"same": "bare again (noise)", "script": "`mitmdump -s`", "lean": "`metaclaw start`"}


def _x(row: dict[str, Any] | None, metric: str) -> str:
    value = (row or {}).get(metric)
    return "–" if value is None else f"{value:.2f}"


def table(report: dict[str, Any]) -> str:
    """Every part that was measured. Ratios are to bare mitmdump in the same rounds."""
    parts, lines = report["parts"], []
    about = report["about"]
    lines.append(
        f"Ratios to bare mitmdump {about['mitmproxy']} in the same interleaved rounds, medians; CPU / p50 (Python {about['python']}, "
        f"{about['cpus']} cores, load {about['load_before'][0]:.1f} before, {about['date']}). 1,000 skills, each request a new human turn."
    )
    for part, wanted in (("cost", "one request at a time"), ("crowd", "many at a time")):
        if part in parts:
            lines += ["", f"| {wanted} | " + " | ".join(_NAMES.values()) + " |", "|---|---|---|---|"]
            for name, cell in parts[part].items():
                second = "x_p50" if part == "cost" else "x_rps"
                lines.append(f"| {name} | " + " | ".join(f"{_x(cell.get(v), 'x_cpu')} / {_x(cell.get(v), second)}" for v in _NAMES) + " |")
    if "crowd" in parts:
        lines += ["", "(Many at a time: CPU / requests per second.)"]
    if "skills" in parts:
        for name, cell in parts["skills"].items():
            counts = [row.partition("-")[2] for row in cell if row != "bare"]
            lines += ["", f"| {name}, skills | " + " | ".join(f"{int(n):,}" for n in counts) + " |", "|---" * (len(counts) + 1) + "|"]
            lines.append("| `metaclaw start` | " + " | ".join(f"{_x(cell[f'lean-{n}'], 'x_cpu')} / {_x(cell[f'lean-{n}'], 'x_p50')}" for n in counts) + " |")
    if "stream" in parts:
        lines += ["", "| streamed, against direct | first token | a token's delay |", "|---|---|---|"]
        for name, cell in parts["stream"].items():
            for variant in ("bare", "script", "lean"):
                row, shown = cell[variant], {"bare": "bare, which buffers"}.get(variant) or _NAMES[variant]
                lines.append(f"| {name}: {shown} | {row['added_ttft_p50_ms']:+.1f} ms | {row['added_late_p50_ms']:+.1f} ms |")
    if "busy" in parts:
        lines += ["", "| while the worker is | p99, of idle | p50, of idle | idle again (noise, p99) | done meanwhile |", "|---|---|---|---|---|"]
        for name, cell in parts["busy"].items():
            busy, again = cell["busy"], cell["idle again"]
            lines.append(f"| {name} | {_x(busy, 'x_p99')} | {_x(busy, 'x_p50')} | {_x(again, 'x_p99')} | {busy['done']:,} |")
    return "\n".join(lines)
