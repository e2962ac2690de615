"""Write the generated parts of README.md: the list of commands as `metaclaw --help` prints it, and the figures of
`scripts/bench.py --readme` (docs/bench.json).

    .venv/bin/python scripts/readme.py            write it
    .venv/bin/python scripts/readme.py --check    exit status 1 if it is not up to date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from click.testing import CliRunner

from metaclaw_core.cli.main import group

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_table import table

README = Path(__file__).resolve().parents[1] / "README.md"
FIGURES = README.parent / "docs" / "bench.json"
FIGURES_BEGIN, FIGURES_END = "<!-- figures: written by scripts/bench.py -->\n", "<!-- end of figures -->\n"
BEGIN, END = "<!-- commands: written by scripts/readme.py -->\n", "<!-- end of commands -->\n"


def commands() -> str:
    shown = CliRunner().invoke(group, ["--help"], prog_name="metaclaw", terminal_width=120).output
    listed = shown.partition("Commands:\n")[2]
    return "```console\n$ metaclaw --help\n" + "".join(f"{line.strip()}\n" for line in listed.splitlines()) + "```\n"


def figures() -> str:
    """"" where nothing has been measured."""
    return table(json.loads(FIGURES.read_text(encoding="utf-8"))) + "\n" if FIGURES.exists() else ""


def generated(text: str) -> str:
    return _between(_between(text, BEGIN, END, commands()), FIGURES_BEGIN, FIGURES_END, figures())


def _between(text: str, begin: str, end: str, new: str) -> str:
    before, begun, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (begun and ended):
        raise SystemExit(f"{README} lacks the lines {begin.strip()} and {end.strip()}.")
    return before + begun + new + ended + after


def main() -> None:
    text = README.read_text(encoding="utf-8")
    new = generated(text)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if new == text else "README.md is not up to date: .venv/bin/python scripts/readme.py")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
