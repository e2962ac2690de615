#!/usr/bin/env python
"""Was anything lost, doubled or answered otherwise than without us? Reads what a soak left: its journal and the store.

    .venv/bin/python scripts/check_invariants.py FOLDER [--margin SECONDS] [--json FILE]

FOLDER holds ``journal.jsonl`` (every request and every kill, as the clients saw them), ``llm.log`` (every id that reached
the LLM), ``soak.json`` (how often what was done) and ``home``. The store is read as a file of SQLite, without the code that
wrote it; only the hashes of the messages are derived by that code (`metaclaw store verify`).

lost         the answer was complete, the proxy lived on for at least the margin (or was stopped in order), and the exchange is
             not in the store
duplicated   an id is in the store twice, or reached the LLM twice
wrong        an answer that is not what the LLM gives without us, or none, while no proxy was killed and descriptors were there
In mode rl an answer may be the policy server's; then the store must say so and hold its exact tokens, and it must not have reached
the LLM. Where the policy server failed, the second attempt is held to all of this. No turn may be trained on twice.
Exit status 1 if there is any of these, or the store is not whole, or mode rl did not recover in the end.
"""

from __future__ import annotations

import argparse
import json
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_homes import environment

ID = re.compile(r"[?&]id=([a-z0-9-]+)")
GIVEN_UP = "TimeoutError"


def lines(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:
        return [json.loads(line) for line in file]


def stored_ids(home: Path) -> Counter[str]:
    with closing(sqlite3.connect(f"file:{home / 'store.db'}?mode=ro", uri=True)) as db:
        return Counter(found[1] for (path,) in db.execute("SELECT path FROM turns WHERE path LIKE '%id=%'") if (found := ID.search(path)))


def routed_ids(home: Path) -> tuple[set[str], set[str]]:
    """The ids that the policy server answered by the store, and those of which the exact tokens are there."""
    query = "SELECT t.path, s.id IS NOT NULL FROM turns t LEFT JOIN samples s ON s.flow_id = t.flow_id WHERE t.version IS NOT NULL AND t.path LIKE '%id=%'"
    with closing(sqlite3.connect(f"file:{home / 'store.db'}?mode=ro", uri=True)) as db:
        rows = [(found[1], sampled) for path, sampled in db.execute(query) if (found := ID.search(path))]
    return {name for name, _ in rows}, {name for name, sampled in rows if sampled}


def failures_of(home: Path) -> dict[str, int]:
    """Why the policy server could not answer, and how often."""
    with closing(sqlite3.connect(f"file:{home / 'store.db'}?mode=ro", uri=True)) as db:
        rows = db.execute("SELECT error, count(*) FROM turns WHERE error LIKE '\"policy: %' GROUP BY 1 ORDER BY 2 DESC")
        return {json.loads(error).removeprefix("policy: "): int(n) for error, n in rows}


def problems_of(home: Path) -> list[str]:
    """What is wrong with the store itself."""
    found: list[str] = []
    with closing(sqlite3.connect(f"file:{home / 'store.db'}?mode=ro", uri=True)) as db:
        check = db.execute("PRAGMA quick_check").fetchone()[0]
        found += [] if check == "ok" else [f"the file: {check}"]
        found += [f"a row of {table} refers to a {parent} that is not there" for table, _, parent, _ in db.execute("PRAGMA foreign_key_check").fetchmany(10)]
        wrong = "SELECT id FROM turns WHERE (state = 'scored') AND scored_at IS NULL OR (state = 'captured') AND scored_at IS NOT NULL"
        found += [f"turn {row}: its state does not fit its score" for (row,) in db.execute(wrong).fetchmany(10)]
        votes = "SELECT turn FROM votes GROUP BY turn HAVING count(*) > 3"
        found += [f"turn {row}: more votes than were asked for" for (row,) in db.execute(votes).fetchmany(10)]
        twice = (
            "SELECT a.id, b.id FROM segments a JOIN segments b ON a.session = b.session AND a.id < b.id "
            "AND a.started_at < b.ended_at AND b.started_at < a.ended_at"
        )
        found += [f"segments {a} and {b} hold the same turns" for a, b in db.execute(twice).fetchmany(10)]
        again = (
            "SELECT turn FROM step_turns JOIN steps ON steps.id = step WHERE steps.state <> 'abandoned' AND step_turns.reason IS NULL "
            "GROUP BY turn HAVING count(*) > 1"
        )
        found += [f"turn {row}: trained on twice" for (row,) in db.execute(again).fetchmany(10)]
        made = "SELECT version FROM steps WHERE version IS NOT NULL GROUP BY version HAVING count(*) > 1"
        found += [f"version {row}: made by two steps" for (row,) in db.execute(made).fetchmany(10)]
    tool = str(Path(sys.executable).with_name("metaclaw"))
    verified = subprocess.run([tool, "store", "verify"], env=environment(home), capture_output=True, text=True, check=False)
    if verified.returncode:
        found.append(f"metaclaw store verify: {(verified.stderr or verified.stdout).strip()[:500]}")
    left = [file.name for file in (home / "spool").glob("*.db")]
    found += [f"spool {name} was not taken in to the end" for name in left]
    return found


def check(folder: Path, margin: float) -> dict[str, Any]:
    journal, told = lines(folder / "journal.jsonl"), json.loads((folder / "soak.json").read_text())
    kills = sorted((line["killed"], line["dead"]) for line in journal if "killed" in line)
    short_from = [line["descriptors_from"] for line in journal if "descriptors_from" in line]
    short_to = [line["descriptors_to"] for line in journal if "descriptors_to" in line]
    short = list(zip(short_from, short_to, strict=False))
    stood = [(line["stopped_from"], line["stopped_to"]) for line in journal if "stopped_from" in line]
    full = [(line["disk_from"], line["disk_to"]) for line in journal if "disk_from" in line]
    stored = stored_ids(folder / "home")
    reached = Counter((folder / "llm.log").read_text().split())
    reached.pop("direct", None)
    routed, sampled = routed_ids(folder / "home")
    requests = [line for line in journal if "request" in line]
    asked = {line["request"] for line in requests}
    lost, wrong, excused = [], [], Counter[str]()
    for line in requests:
        name, by_policy = line["request"], line.get("by") == "policy"
        if not line["same"] and not by_policy:
            if any(line["opened"] <= dead and killed <= line["answered"] for killed, dead in kills):
                excused["the proxy at the other end of its connection was killed"] += 1
            elif line["problem"] == "ConnectionRefusedError" and kills:
                excused["its proxy was not back yet"] += 1
            elif any(start <= line["answered"] and line["sent"] <= end for start, end in short):
                excused["no file descriptors"] += 1
            elif line["kind"] == "stuck" and line["problem"] == GIVEN_UP:
                excused["the LLM hung, the client gave up"] += 1
            elif line["problem"] == GIVEN_UP and any(start <= line["answered"] and line["sent"] <= end for start, end in stood):
                excused["the policy server stood still, the client gave up"] += 1
            elif line.get("again") and f"{name}-again" in asked:
                excused["the policy server failed, the client asked again"] += 1
            else:
                wrong.append(line)
        elif by_policy and reached[name]:
            wrong.append(line | {"problem": "answered by the policy server, and the LLM was asked, too"})
        elif not stored[name] or (by_policy and name not in sampled):
            if any(killed - margin <= line["answered"] <= dead for killed, dead in kills):
                excused["answered a moment before the kill"] += 1
            elif stored[name] and any(start <= line["answered"] and line["sent"] <= end for start, end in full):
                excused["the disk was full: the policy server's answer trains nothing"] += 1
            else:
                lost.append(name if not stored[name] else f"{name} (its tokens)")
        elif by_policy != (name in routed):
            wrong.append(line | {"problem": f"answered by {'the policy server' if by_policy else 'the LLM'}, and the store says otherwise"})
    twice = {name: n for name, n in stored.items() if n > 1} | {name: n for name, n in reached.items() if n > 1}
    served = sum(line["same"] is True or line.get("by") == "policy" for line in requests)
    return {
        "faults": told["faults"] | {"requests that hung": sum(1 for r in requests if r["kind"] == "stuck"), "answers slow, cut or an error": sum(1 for r in requests if r["kind"] in ("slow", "cut", "e500", "e429"))},
        "seconds": told["seconds"],
        "sessions": told["sessions"],
        "requests": len(requests),
        "served": served,
        "stored": sum(stored.values()),
        "excused": dict(excused),
        "lost": lost,
        "duplicated": twice,
        "wrong": wrong[:20],
        "wrong_count": len(wrong),
        "dropped": told["dropped"],
        "routed": sum(line.get("by") == "policy" for line in requests),
        "policy_failures": failures_of(folder / "home"),
        "rl": told.get("rl"),
        "store": problems_of(folder / "home"),
    }


def table(found: dict[str, Any]) -> str:
    rows = [f"| {name} | {count:,} |" for name, count in found["faults"].items()]
    totals = (
        f"\n{found['seconds']} s, {found['sessions']:,} sessions: {sum(found['faults'].values()):,} faults injected, {found['requests']:,} requests, "
        f"{found['served']:,} served as without us, **{len(found['lost'])} lost, {len(found['duplicated'])} duplicated, {found['wrong_count']} answered otherwise**."
    )
    excused = "; ".join(f"{count:,} {why}" for why, count in found["excused"].items())
    if found["rl"] is not None:
        failures = ", ".join(f"{count:,} {why}" for why, count in found["policy_failures"].items())
        totals += (
            f"\n{found['routed']:,} were answered by the policy server, {found['rl']['steps']:,} steps were made. It failed: {failures or 'never'}. "
            f"In the end it {'serves' if found['rl']['serves'] else '**does not serve**'} and {'trains' if found['rl']['trains'] else '**does not train**'}."
        )
    return "\n".join(["| fault | times |", "|---|---|", *rows, totals, f"Not held against it: {excused or 'nothing'}."])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--margin", type=float, default=0.25)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    found = check(args.folder, args.margin)
    print(table(found))
    for what in ("lost", "duplicated", "wrong", "store"):
        if found[what]:
            print(f"{what.upper()}: {found[what] if what != 'lost' else found[what][:20]}")
    if found["dropped"]:
        print(f"DROPPED: {found['dropped']} exchanges, by the proxy's own count")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if found["rl"] is not None and not (found["rl"]["serves"] and found["rl"]["trains"]):
        return 1
    return int(any(found[what] for what in ("lost", "duplicated", "wrong_count", "dropped", "store")))


if __name__ == "__main__":
    sys.exit(main())
