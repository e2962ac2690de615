"""Write the generated part of README.md: the list of commands as `metaclaw --help` prints it.

    .venv/bin/python scripts/readme.py            write it
    .venv/bin/python scripts/readme.py --check    exit status 1 if it is not up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

from click.testing import CliRunner

from metaclaw_core.cli.main import group

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- commands: written by scripts/readme.py -->\n", "<!-- end of commands -->\n"


def commands() -> str:
    shown = CliRunner().invoke(group, ["--help"], prog_name="metaclaw", terminal_width=120).output
    listed = shown.partition("Commands:\n")[2]
    return "```console\n$ metaclaw --help\n" + "".join(f"{line.strip()}\n" for line in listed.splitlines()) + "```\n"


def generated(text: str) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{README} lacks the lines {BEGIN.strip()} and {END.strip()}.")
    return before + begin + commands() + end + after


def main() -> None:
    text = README.read_text(encoding="utf-8")
    new = generated(text)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if new == text else "README.md is not up to date: .venv/bin/python scripts/readme.py")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
