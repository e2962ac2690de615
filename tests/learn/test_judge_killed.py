"""The scoring job as a process of its own that is killed again and again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from judge_tools import many_turns
from sqlalchemy import func, select

from metaclaw_core.learn.budget import spent
from metaclaw_core.store.db import open_store
from metaclaw_core.store.tables import turns, votes
from metaclaw_core.testing import Received, Script, ScriptedLLM

# Forks a worker for each line it reads and tells its process id, then how it ended: importing takes longer than scoring.
WORKERS = """
import asyncio, os, sys
from metaclaw_core.learn.budget import Budget
from metaclaw_core.learn.endpoint import Endpoint
from metaclaw_core.learn.llm import LLMClient
from metaclaw_core.learn.scoring import score
from metaclaw_core.settings import Settings
from metaclaw_core.store.db import open_store

async def main():
    with open_store(sys.argv[1]) as store:
        async with LLMClient(Endpoint(sys.argv[2], "judge", ""), Budget(store, None), concurrency=4) as client:
            while sum(1 for _ in store.turns(state="captured")):
                await score(store, Settings(), client, lease_s=0.2)
                await asyncio.sleep(0.05)

for _ in sys.stdin:
    pid = os.fork()
    if pid == 0:
        asyncio.run(main())
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_killed_at_thirty_points_each_turn_is_scored_once_and_hardly_a_vote_is_paid_twice(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with open_store(path) as store:
        many_turns(store, 120)
    lock = threading.Lock()
    pid = left = 0

    def answer(_: Received) -> Script:
        """Kills the worker that asks once it has asked often enough."""
        nonlocal left
        with lock:
            left -= 1
            if left == 0:
                os.kill(pid, signal.SIGKILL)
        return Script(text="Score: 1", first_after=0.005)

    ends = []
    with ScriptedLLM(answer) as llm:
        command = [sys.executable, "-c", WORKERS, str(path), llm.url]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as workers:
            assert workers.stdin is not None
            assert workers.stdout is not None
            for point in range(31):
                with lock:  # from the very first request to well into the next turns'; the last one may finish
                    workers.stdin.write("\n")
                    workers.stdin.flush()
                    pid = int(workers.stdout.readline())
                    left = 1 + point % 10 if point < 30 else 0
                ends.append(int(workers.stdout.readline()))
            workers.stdin.close()
        asked = len(llm.received)
    assert ends == [-signal.SIGKILL] * 30 + [0]
    with open_store(path) as store, store.reading() as connection:
        states = connection.execute(select(turns.c.state, turns.c.score, func.count()).group_by(turns.c.state, turns.c.score)).all()
        assert [tuple(row) for row in states] == [("scored", 1, 120)]
        assert connection.scalar(select(func.count()).select_from(votes)) == 360
        assert connection.scalar(select(func.count(func.distinct(votes.c.turn)))) == 120
        assert asked <= 360 + 30 * (10 + 4)
        assert spent(store)[0]["requests"] <= asked
