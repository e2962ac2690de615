"""The evolver as a process that is killed at lines of its own code, chosen evenly over a whole run.

Each point starts from the same store and library: a session whose lesson adds a skill, refines one and retires one. A
run is counted first in lines of the modules that write; then a run is killed at the k-th line, what lies there is looked
at, and another run finishes the work.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from evolve_tools import BODY, Talk, add, edits
from sqlalchemy import select

from metaclaw_core.learn.ledger import mark
from metaclaw_core.skills.library import Library
from metaclaw_core.skills.skill import Provenance, Skill
from metaclaw_core.store.db import open_store
from metaclaw_core.store.tables import evolve_cursors, job_runs, segments

ROOT = Path(__file__).resolve().parents[2]
POINTS = 40

# Reads "HOME LINE", forks, and tells how the run ended and how many lines it had: importing takes longer than evolving.
RUNS = """
import asyncio, json, os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from evolve_tools import LATER, Model
from metaclaw_core.learn import evolve, ledger, runs, segments
from metaclaw_core.learn.evolve import Evolver
from metaclaw_core.settings import home, load_settings
from metaclaw_core.skills import files, library
from metaclaw_core.store.db import open_store

WATCHED = {{module.__file__ for module in (evolve, ledger, runs, segments, files, library)}}
count = 0

def line(code, number):
    global count
    if code.co_filename not in WATCHED:
        return sys.monitoring.DISABLE
    count += 1
    if count == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

async def main():
    with open_store(home() / "store.db") as store:
        evolver = Evolver(store, load_settings(), llm=Model(json.loads({answer!r})), clock=lambda: LATER)
        sys.monitoring.use_tool_id(3, "killer")
        sys.monitoring.register_callback(3, sys.monitoring.events.LINE, line)
        sys.monitoring.set_events(3, sys.monitoring.events.LINE)
        await evolver.run()
        sys.monitoring.set_events(3, 0)

for request in sys.stdin:
    folder, kill_at = request.split()
    kill_at = int(kill_at)
    pid = os.fork()
    if pid == 0:
        os.environ["METACLAW_HOME"] = folder
        asyncio.run(main())
        Path(folder, "lines").write_text(str(count))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

KEPT = "Answer in short sentences, and put the command that the reader must type on a line of its own. " * 3
REFINED = KEPT.strip() + "\n\nSay which version of the tool you mean."
GONE = "Run the scripts of the package file with yarn, since the lock file of this repository belongs to yarn alone. " * 3
SAID = (
    "No. In this repository use pnpm, not npm.",
    "And in your answers say which version of the tool you mean.",
    "Forget the rule that scripts run with yarn, it is gone.",
)


def answer() -> dict[str, Any]:
    refine = {
        "op": "refine",
        "name": "short-answers",
        "changes": [{"old": "", "new": "Say which version of the tool you mean."}],
        "evidence": [{"quote": "in your answers say which version of the tool you mean"}],
    }
    retire = {
        "op": "retire",
        "name": "scripts-with-yarn",
        "why": "the user said so",
        "evidence": [{"quote": "Forget the rule that scripts run with yarn"}],
    }
    return edits(add("use-pnpm", "In this repository use pnpm, not npm"), refine, retire)


def prepare(home: Path) -> Path:
    """A session that is over, and a library with two learned skills."""
    home.mkdir(mode=0o700)
    talk = Talk().say("Install left-pad in my repository.", "I ran npm install.")
    for text in SAID:
        talk.say(text, "Understood, I will do that from now on.")
    with open_store(home / "store.db") as store:
        talk.into(store)
    library = Library(home / "skills")
    for name, body in (("short-answers", KEPT), ("scripts-with-yarn", GONE)):
        skill = Skill(name, f"How the user wants it: {name.replace('-', ' ')}.", body.strip())
        origin = Provenance(("s-0",), "m-evolver", "2026-11-01T00:00:00+00:00", skill.content_hash)
        library.add(Skill(skill.name, skill.description, skill.body, provenance=origin))
    return home


def bodies(home: Path) -> dict[tuple[str, str], str]:
    """(name, status) → body of all that is in the library, which must be readable."""
    scan = Library(home / "skills").scan()
    assert scan.problems == ()
    return {(skill.name, skill.status.value): skill.body for skill in (*scan.skills, *scan.candidates)}


BEFORE = {("short-answers", "active"): KEPT.strip(), ("scripts-with-yarn", "active"): GONE.strip()}
AFTER = {("short-answers", "active"): REFINED, ("scripts-with-yarn", "archived"): GONE.strip(), ("use-pnpm", "active"): BODY}


def check_cut(home: Path) -> None:
    """What a killed run left: each skill as it was or as it will be, and the refined one never gone."""
    now = bodies(home)
    assert {place: body for place, body in now.items() if body not in (BEFORE.get(place), AFTER.get(place))} == {}
    assert ("short-answers", "active") in now
    assert ("scripts-with-yarn", "active") in now or ("scripts-with-yarn", "archived") in now


def check_done(home: Path) -> None:
    assert bodies(home) == AFTER
    with open_store(home / "store.db") as store, store.reading() as db:
        (row,) = db.execute(select(segments)).all()
        assert (row.state, row.turns, [edit["result"] for edit in row.edits]) == ("done", 4, ["ok"] * 3)
        assert len(db.execute(select(evolve_cursors)).all()) == 1
        assert len([run for run in db.execute(select(job_runs)) if run.ok]) <= 1
    notes = Counter(change.note.partition(":")[0] for change in Library(home / "skills").history())
    assert {place: notes[mark(row.id, place)] for place in range(3)} == {0: 1, 1: 1, 2: 1}
    left = [path for path in (home / "skills").rglob("*") if path.name.startswith(".new-") or path.suffix == ".tmp"]
    assert left == []


@pytest.mark.slow
def test_killed_at_forty_lines_no_skill_is_written_twice_or_by_halves(tmp_path: Path) -> None:
    template = prepare(tmp_path / "template")
    code = RUNS.format(tests=str(Path(__file__).parent), answer=json.dumps(answer()))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("METACLAW_")}
    command = [sys.executable, "-c", code]
    environment["PYTHONPATH"] = str(ROOT)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as runs:
        stdin, stdout = runs.stdin, runs.stdout
        assert stdin is not None
        assert stdout is not None

        def run(home: Path, kill_at: int) -> int:
            with open_store(home / "store.db") as store, store.transaction() as db:
                db.exec_driver_sql("DELETE FROM leases")  # that of a killed run lasts a minute
            print(home, kill_at, file=stdin, flush=True)
            return int(stdout.readline())

        def fresh(name: str) -> Path:
            return Path(shutil.copytree(template, tmp_path / name))

        whole = fresh("whole")
        assert run(whole, 0) == 0
        check_done(whole)
        lines = int((whole / "lines").read_text())
        assert lines > 10 * POINTS
        states: Counter[str | None] = Counter()
        for point in range(POINTS):
            home = fresh(f"at-{point}")
            assert run(home, 1 + point * (lines - 1) // (POINTS - 1)) == -signal.SIGKILL
            check_cut(home)
            with open_store(home / "store.db") as store, store.reading() as db:
                states[db.scalar(select(segments.c.state))] += 1
            assert run(home, 0) == 0
            check_done(home)
            shutil.rmtree(home)
        stdin.close()
    assert set(states) == {None, "waiting", "proposed", "done"}  # the points reach into every step
