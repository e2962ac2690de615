"""Homes for the measurements: a METACLAW_HOME with so many skills and its index built, and the settings of a run.

The skills beyond the built-in ones are made from a fixed vocabulary, so that a query meets many of them: as many terms a skill
as the built-in ones have, the same for everybody who measures.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

BUILT_IN = len(list((Path(__file__).resolve().parents[1] / "skills").glob("*/SKILL.md")))
# Nothing here may ask a real provider: neither with settings of the user nor with the key that the client sends.
QUIET = {"llm": {"use_caller_credentials": False}}
_VERBS = ["debug", "plot", "review", "rotate", "draft", "summarise", "parse", "deploy", "migrate", "profile", "encrypt", "schedule", "index", "merge", "translate", "validate"]
_THINGS = ["python", "function", "sql", "query", "cron", "job", "log", "file", "email", "team", "outage", "paper", "retrieval", "token", "csv", "chart", "sprint", "branch", "rebase", "docker", "image", "server", "cache", "queue", "lambda", "bucket", "certificate", "password", "spreadsheet", "invoice", "calendar", "meeting", "slide", "video", "audio", "sensor", "robot"]
_MORE = ["quickly", "safely", "again", "nightly", "by", "hand", "in", "production", "on", "failure", "with", "tests", "without", "downtime", "for", "customers", "under", "load", "in", "batches"]


def config(settings: dict[str, Any]) -> str:
    merged: dict[str, Any] = {**QUIET}
    for section, values in settings.items():
        merged[section] = {**merged.get(section, {}), **values} if isinstance(values, dict) else values
    return yaml.safe_dump(merged)


def environment(home: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("METACLAW_") and not k.lower().endswith("_proxy")}
    return kept | {"METACLAW_HOME": str(home), "HOME": str(home)}


def skills_home(folder: Path, count: int, *, name: str = "lean", home: Path | None = None) -> Path:
    """A home with `count` skills (0: switched off; `BUILT_IN` or less: the built-in ones), indexed. An existing `config.yaml` is kept."""
    home = home or folder / f"home-{name}-{count}"
    home.mkdir(mode=0o700, exist_ok=True)
    library = home / "skills"
    library.mkdir(mode=0o700, exist_ok=True)
    for number in range(count - BUILT_IN):
        write_skill(library, number)
    file = home / "config.yaml"
    if not file.exists():
        file.write_text(config({"skills": {"dir": str(library), "enabled": count > 0}}))
    build = [sys.executable, "-m", "metaclaw_core.skills.build"]
    subprocess.run(build, env=environment(home), check=True, capture_output=True, cwd=folder)
    return home


def write_skill(library: Path, number: int) -> None:
    rng = random.Random(number)
    verb, things = rng.choice(_VERBS), rng.sample(_THINGS, 3)
    name = f"{verb}-{things[0]}-{number}"
    what = f"How to {verb} a {things[0]} {things[1]} {' '.join(rng.sample(_MORE, 4))}."
    body = "\n".join(f"- {rng.choice(_VERBS)} the {' '.join(rng.sample(_THINGS, 3))} {' '.join(rng.sample(_MORE, 6))}" for _ in range(12))
    (library / name).mkdir()
    (library / name / "SKILL.md").write_text(f"---\nname: {name}\ndescription: {what}\n---\n\n{body}\n")
