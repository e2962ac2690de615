"""An answer is kept, and a sign of life given, while the store is locked and somebody's conversation is looked for in it."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from metaclaw_core.policy.memory import Memory
from metaclaw_core.store import samplefile
from metaclaw_core.store.db import open_store
from metaclaw_core.store.samplefile import Reply


async def test_a_locked_store_holds_up_no_answer_but_those_that_need_it(tmp_path: Path) -> None:
    home = tmp_path / "policy"
    home.mkdir(mode=0o700)
    with open_store(home / "store.db"):
        pass
    memory = Memory(home / "run" / samplefile.FILE, home / "store.db")
    with closing(sqlite3.connect(home / "store.db", isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        looking = asyncio.ensure_future(memory.past("p", "resp_of_somebody"))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await memory.keep("s", None, Reply("key", (1, 2)), None, secret=False)
        await memory.look_after(0.0, prune=False)
        assert time.monotonic() - began < 1.0
        assert not looking.done()
        db.execute("ROLLBACK")
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    await memory.close()
