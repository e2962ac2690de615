#!/usr/bin/env python
"""Does the store stay fast at a million turns? Query times, rate of ingest beside an empty store, size.

    scripts/bench_store.py                        # 1,000,000 turns: makes the store first, some minutes, 5 GB in TMPDIR
    scripts/bench_store.py --turns 100000 --keep /var/tmp/home     # keep the home and use it again

The turns are copies: one session of 40 exchanges of an agent is really taken in, then its rows are inserted again and again,
each time with another first message of the human, and so with hashes of their own all along the chain (`metaclaw store
verify` finds nothing wrong). So rows, indexes and pages have the shape and the order that real ones have: keys are hashes,
times follow each other.

Times are of two kinds. *in process* is what the query takes on an open store: the bars are for these. *command* is the
whole `metaclaw …` with the start of Python. Bars: a session's turns < 50 ms, what `status` reads of the store < 200 ms,
ingest ≥ 0.8 × an empty store's (rounds of both in turns). Exit status 1 where one is broken.

With 1,000,000 turns (5.1 GB; two cores that others used as well, load average 5.5) a session's turns take 3.4 ms, what
`status` reads 162 ms (83,000 of the turns are of today), a claim 1.0 ms; 643 exchanges a second, 619 into an empty store:
0.96. In the run that had just made the store, at load average 8: 17 ms, 647 ms, 7 ms; 506, 409: 0.90 (the median is of the
rounds' ratios). With 250,000 turns at load average 6: 1.5 ms, 112 ms; 1,030, 1,170: 0.89.

What grows with the store is the number of index pages that an exchange dirties somewhere in the file; each is written to the
log and then again by a checkpoint. While the ids of messages were nothing but hashes, an exchange dirtied 13.3 different pages
(6.5 of the index of messages, 1.2 and 1.4 of those of a turn's tips); since a conversation's ids stand together
(`store.chain`) it dirties 4.6. Both on the same file of a million turns, alternately, at load average 4: 0.78 and 0.93. What is
left are two keys that are hashes still, a turn's content key and its turn id, a page or more each. A larger cache and mmap
changed nothing.

Limits: no proxy runs here, so `status` is measured as the part that grows with the store. The file should lie in the page
cache, as that of a machine that works with it does: one of 250,000 turns that had dropped out of it gave 0.66 to 0.75, and
0.86 to 0.95 once it had been read.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from bench_homes import environment  # noqa: E402
from bench_ingest import session  # noqa: E402

from metaclaw_core.cli import status  # noqa: E402
from metaclaw_core.model import Exchange, Message, Role, Text  # noqa: E402
from metaclaw_core.store.chain import canonical_pieces, linked_id, pack_message, unpack_message  # noqa: E402
from metaclaw_core.store.db import open_store  # noqa: E402
from metaclaw_core.store.rollouts import Store  # noqa: E402
from metaclaw_core.store.types import pack, unpack  # noqa: E402

TURNS_A_SESSION = 40
SESSION_MS, STATUS_MS, INGEST_RATIO = 50.0, 200.0, 0.8
STATES = ("scored", "trained", "captured", "skipped")


def make(home: Path, turns: int) -> None:
    """A store of so many turns below `home`."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = home / "store.db"
    with open_store(path) as store:
        store.ingest(list(session(0, TURNS_A_SESSION)), redacted=True)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.row_factory = sqlite3.Row
        for pragma in ("synchronous=OFF", "cache_size=-1500000", "foreign_keys=OFF", "journal_size_limit=67108864"):
            db.execute(f"PRAGMA {pragma}")
        pattern = Pattern.of(db)
        now = time.time()
        copies = range(1, turns // TURNS_A_SESSION)
        for at in range(0, len(copies), 250):
            db.execute("BEGIN")
            made = [pattern.copy(copy, now - turns + copy * TURNS_A_SESSION) for copy in copies[at : at + 250]]
            for name in ("sessions", "messages", "turns"):
                insert(db, name, (row for copy in made for row in copy[name]))
            db.execute("COMMIT")
            print(f"\r{min(at + 251, len(copies) + 1) * TURNS_A_SESSION:,} turns", end="", file=sys.stderr, flush=True)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        print(file=sys.stderr)


def insert(db: sqlite3.Connection, table: str, rows: Iterator[dict[str, Any]]) -> None:
    first = next(rows)
    names = list(first)
    statement = f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
    db.execute(statement, tuple(first.values()))
    db.executemany(statement, (tuple(row.values()) for row in rows))


@dataclass(frozen=True)
class Pattern:
    """The rows of one session, to be inserted again under other names."""

    session: dict[str, Any]
    messages: list[dict[str, Any]]  # parents before children; the first is the system prompt, the second the human's
    hashed: list[list[bytes]]  # of each message, its `canonical_pieces`
    first: Message  # that of the human
    turns: list[dict[str, Any]]

    @classmethod
    def of(cls, db: sqlite3.Connection) -> Pattern:
        children: dict[str | None, list[dict[str, Any]]] = {}
        for row in db.execute("SELECT * FROM messages"):
            children.setdefault(row["parent"], []).append(dict(row))
        rows: list[dict[str, Any]] = []
        waiting: list[str | None] = [None]
        while waiting:
            below = children.get(waiting.pop(0), [])
            rows += below
            waiting += [row["id"] for row in below]
        said = [unpack_message(row["role"], unpack(row["content"])) for row in rows]
        made = cls(dict(db.execute("SELECT * FROM sessions").fetchone()), rows, [canonical_pieces(m) for m in said], said[1], [dict(r) for r in db.execute("SELECT * FROM turns ORDER BY id")])
        assert all(old == new for old, new in made.ids(made.hashed).items()), "the hashes are made otherwise now"
        return made

    def ids(self, hashed: list[list[bytes]]) -> dict[str | None, str | None]:
        """Old id → new id, where the messages are what `hashed` says."""
        new: dict[str | None, str | None] = {None: None}
        for row, pieces in zip(self.messages, hashed, strict=True):
            new[row["id"]] = linked_id(new[row["parent"]], Role(row["role"]), pieces)
        return new

    def copy(self, number: int, at: float) -> dict[str, list[dict[str, Any]]]:
        """The rows of another session that began at `at`."""

        def named(old: str, size: int = 64) -> str:
            return sha256(f"{number} {old}".encode()).hexdigest()[:size]

        first = replace(self.first, parts=(Text(f"{self.first.text} ({number})"),))
        new_id = self.ids([self.hashed[0], canonical_pieces(first), *self.hashed[2:]])
        messages = [{**row, "id": new_id[row["id"]], "parent": new_id[row["parent"]]} for row in self.messages[1:]]
        messages[0]["content"] = pack(pack_message(first))
        session = named(self.session["id"], 32)
        state = STATES[number % 4] if number % 10 else "captured"
        turns = []
        for n, row in enumerate(self.turns):
            scored = state in ("scored", "trained")
            turns.append(
                row
                | {name: named(row[name], 32) for name in ("turn_id", "trace_id")}
                | {name: new_id[row[name]] for name in ("prompt_tip", "response_tip", "system_tip")}
                | {"content_key": named(row["content_key"]), "flow_id": f"copy-{number}-{n}", "response_id": f"r-{number}-{n}", "session": session}
                | {"started_at": at + n, "state": state, "score": n % 3 - 1 if scored else None, "scored_at": at + n + 60 if scored else None}
            )
            del turns[-1]["id"]
        name = {"id": session, "session_id": f"session-{number}", "first_at": at, "last_at": at + TURNS_A_SESSION}
        return {"sessions": [self.session | name], "messages": messages, "turns": turns}


# --- times ----------------------------------------------------------------------------------------


def milliseconds(what: Callable[[], object], times: int = 15) -> float:
    """The median, after one run that is not counted."""
    taken = []
    for _ in range(times + 1):
        begun = time.perf_counter()
        what()
        taken.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(taken[1:])


def in_process(store: Store) -> dict[str, float]:
    """Of sessions all over the store, so that not one and the same is asked for again."""
    names = [row["session_id"] for row in sessions_of(store)]
    chance = random.Random(1)
    return {
        "turns --session": milliseconds(lambda: list(store.turns(session=chance.choice(names)))),
        "turns --session --limit 10": milliseconds(lambda: list(store.turns(session=chance.choice(names), limit=10))),
        "turns --limit 20": milliseconds(lambda: list(store.turns(limit=20))),
        "turns --state captured --limit 20": milliseconds(lambda: list(store.turns(state="captured", limit=20))),
        "turns --kind tool --limit 20": milliseconds(lambda: list(store.turns(kind="tool", limit=20))),
        "status, opening and all it reads": milliseconds(status._learning),
        "claim of 8 turns and giving them back": milliseconds(lambda: claim(store)),
    }


def sessions_of(store: Store) -> list[Any]:
    from sqlalchemy import select

    from metaclaw_core.store.tables import sessions

    with store.reading() as db:
        return [row._mapping for row in db.execute(select(sessions.c.session_id).order_by(sessions.c.id).limit(500))]


def claim(store: Store) -> None:
    rows = store.claim("captured", "bench", 8, 60)
    store.release([row["id"] for row in rows], "bench")


def commands(home: Path, name: str) -> dict[str, float]:
    tool = str(Path(sys.executable).with_name("metaclaw"))

    def run(*arguments: str) -> float:
        line = [tool, *arguments]
        return milliseconds(lambda: subprocess.run(line, env=environment(home), capture_output=True, check=False), 5)

    return {
        "metaclaw --version (the start alone)": run("--version"),
        f"metaclaw turns --session {name} --json": run("turns", "--session", name, "--json"),
        "metaclaw turns --limit 20": run("turns", "--limit", "20"),
        "metaclaw sessions --json": run("sessions", "--json"),
        "metaclaw status (no proxy runs)": run("status"),
    }


def ingest_rates(full: Store, folder: Path, rounds: int) -> tuple[list[float], list[float]]:
    """(exchanges a second into the full store, into a new one), a pair a round; what is taken in is new to both."""
    rates: dict[str, list[float]] = {"full": [], "empty": []}
    run = random.randrange(10**11)
    for number in range(rounds):
        made = fresh(list(session(run + number, TURNS_A_SESSION)))
        with open_store(folder / f"empty-{number}.db") as empty:
            empty.ingest(fresh(list(session(run - 1 - number, TURNS_A_SESSION))), redacted=True)  # statements and files are there
            for name, store in (("full", full), ("empty", empty)) if number % 2 else (("empty", empty), ("full", full)):
                begun = time.perf_counter()
                for at in range(0, len(made), 8):
                    report = store.ingest(made[at : at + 8], redacted=True)
                    assert report.stored == len(made[at : at + 8]), report
                rates[name].append(len(made) / (time.perf_counter() - begun))
    return rates["full"], rates["empty"]


def fresh(made: list[Exchange]) -> list[Exchange]:
    return [replace(exchange, started_at=time.time() + n) for n, exchange in enumerate(made)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=12, help="of ingest")
    parser.add_argument("--keep", type=Path, metavar="HOME", help="make the store there, or use the one that is there")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        home = args.keep or folder / "home"
        os.environ["METACLAW_HOME"] = str(home)
        begun = time.monotonic()
        if not (home / "store.db").exists():
            make(home, args.turns)
        made_s = time.monotonic() - begun
        size = (home / "store.db").stat().st_size
        with open_store(home / "store.db") as store:
            process = in_process(store)
            full, empty = ingest_rates(store, folder, args.rounds)
        whole = commands(home, "session-1")
    ratio = statistics.median(f / e for f, e in zip(full, empty, strict=True))
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{args.turns:,} turns, {size / 1e9:.2f} GB, {size / args.turns:.0f} bytes a turn; made in {made_s:.0f} s; load {os.getloadavg()[0]:.1f}")
    print("\n| in process | ms |\n|---|---|")
    print("\n".join(f"| {name} | {ms:.1f} |" for name, ms in process.items()))
    print("\n| command, with the start of Python | ms |\n|---|---|")
    print("\n".join(f"| {name} | {ms:.0f} |" for name, ms in whole.items()))
    print(f"\ningest: {statistics.median(full):.0f} exchanges/s, {statistics.median(empty):.0f} into an empty store: {ratio:.2f}; RSS {rss:.0f} MB")
    bars = {
        f"a session's turns {process['turns --session']:.1f} ms < {SESSION_MS:.0f}": process["turns --session"] < SESSION_MS,
        f"status {process['status, opening and all it reads']:.1f} ms < {STATUS_MS:.0f}": process["status, opening and all it reads"] < STATUS_MS,
        f"ingest {ratio:.2f} ≥ {INGEST_RATIO}": ratio >= INGEST_RATIO,
    }
    for bar, held in bars.items():
        print("ok  " if held else "FAIL", bar)
    if args.json:
        figures = {"turns": args.turns, "bytes": size, "ms": process, "command_ms": whole, "ingest": {"full": full, "empty": empty, "ratio": ratio}}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if all(bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
