"""``metaclaw train status --json`` where turns were left out of a step: reasons and how many, as an object."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from e2e_tools import environment
from sqlalchemy import insert

from metaclaw_core.store.db import open_store
from metaclaw_core.store.tables import step_turns, steps, turns

TURN = {
    "principal": "p", "kind": "main", "dialect": "openai_chat", "scheme": "http", "host": "h", "port": 80, "path": "/",
    "redacted": False, "retry": False, "attempts": 0, "live": True, "state": "skipped", "started_at": 1.0,
}  # fmt: skip


def test_what_was_left_out_is_told_by_reason(tmp_path: Path):
    home = tmp_path / "metaclaw"
    home.mkdir()
    with open_store(home / "store.db") as store, store.transaction() as db:
        step = {"state": "discarded", "base_version": 1, "algorithm": "single", "started_at": 1.0, "updated_at": 1.0}
        number = db.execute(insert(steps).values(step).returning(steps.c.id)).scalar_one()
        for n in range(3):
            turn = db.execute(insert(turns).values(TURN | {"flow_id": f"f{n}", "content_key": f"k{n}"}).returning(turns.c.id)).scalar_one()
            db.execute(insert(step_turns).values(step=number, turn=turn, reason="no signal" if n else "support session"))
    words = [str(Path(sys.executable).with_name("metaclaw")), "train", "status", "--json"]
    done = subprocess.run(words, env=environment(home), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["skipped"] == {"no signal": 2, "support session": 1}
