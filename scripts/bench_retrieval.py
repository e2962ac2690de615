#!/usr/bin/env python
"""How well and how fast skills are found, against the targets; exit status 1 if one is missed.

    .venv/bin/python scripts/bench_retrieval.py [--json] [--quick]

Reads the labelled pool in ../shared/retrieval (or $METACLAW_SHARED/retrieval) and lets the judge that lies there
compute the ranking figures; the small talk at the end of this file is our own, so that one figure rests on lines
that nobody has tuned on. Times are the fastest of three per query, query building included, on whatever machine
this runs on; --quick leaves out the library of 10,000.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metaclaw_core.agents import identify
from metaclaw_core.model import Hints, Message, Request, Role, Text
from metaclaw_core.skills import Index, Skill, build_index, load_index, save_index

CHECKOUT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("METACLAW_SHARED", CHECKOUT.parent / "shared")) / "retrieval"

SMALL_TALK = (
    "good morning! how did you sleep?",
    "cool, cheers",
    "sounds good to me",
    "hmm, not sure about that",
    "I'm bored",
    "you're the best",
    "ok I'm back",
    "brb, getting coffee",
    "are you still there?",
    "no, the other one",
    "why not?",
    "great, let's continue tomorrow",
    "happy birthday!",
    "what's your favourite colour?",
    "are you a human?",
    "ignore that, typo",
    "stop",
    "one more time",
    "Danke, das war's!",
    "Guten Morgen, wie geht's dir?",
    "Ja, mach das bitte so",
    "¿cómo estás hoy?",
    "muchas gracias, perfecto",
    "bonjour, tu vas bien ?",
    "non merci, c'est bon",
    "谢谢你",
    "早上好",
    "好的，继续吧",
    "你是谁？",
    "ありがとうございます",
    "お疲れ様です",
    "それでいいです",
    "고마워요",
    "잘 자요",
    "спасибо большое",
    "привет, как дела?",
)


@dataclass(frozen=True)
class Figure:
    name: str
    value: float
    target: float
    at_least: bool

    @property
    def ok(self) -> bool:
        return self.value >= self.target if self.at_least else self.value <= self.target


def rows(name: str) -> list[dict[str, Any]]:
    with (DATA / name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def judged(split: str, queries: list[dict[str, Any]], answer: Callable[[dict[str, Any]], list[str]]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        for query in queries:
            file.write(json.dumps({"qid": query["qid"], "ranked": answer(query)}) + "\n")
        file.flush()
        command = [sys.executable, str(DATA / "judge.py"), file.name, "--split", str(DATA / split), "--json"]
        out = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(out.stdout)
    return result


def found(index: Index, texts: str | list[str]) -> list[str]:
    return [hit.name for hit in index.search(texts, 10)]


def enveloped(query: str, envelope: dict[str, str]) -> list[str]:
    texts = (
        (Role.SYSTEM, envelope["system"]),
        (Role.USER, envelope["user_prefix"] + query + envelope["user_suffix"]),
        (Role.USER, envelope["internal"]),
    )
    messages = tuple(Message(role, (Text(text),)) for role, text in texts)
    return list(identify(Request("openai-chat", None, True, messages), Hints()).human_texts)


def share(values: Iterable[bool]) -> float:
    return float(np.mean([float(v) for v in values]))


def milliseconds(index: Index, queries: list[str]) -> tuple[float, float]:
    taken = []
    for query in queries:
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            index.search(query)
            best = min(best, time.perf_counter() - start)
        taken.append(best * 1e3)
    p50, p95 = np.percentile(taken, [50, 95]).tolist()
    return p50, p95


def quality(pool: list[Skill], index: Index) -> Iterable[Figure]:
    queries, small_talk = rows("queries.dev.jsonl"), [row["query"] for row in rows("chitchat.dev.jsonl")]
    envelope = json.loads((DATA / "openclaw_envelope.json").read_text(encoding="utf-8"))
    bare = judged("queries.dev.jsonl", queries, lambda q: found(index, q["query"]))["metrics"]
    yield Figure("recall@6", bare["recall@6"]["mean"], 0.88, True)
    yield Figure("nDCG@10", bare["nDCG@10"]["mean"], 0.80, True)
    wrapped = judged("queries.dev.jsonl", queries, lambda q: found(index, enveloped(q["query"], envelope)))["metrics"]
    gap = abs(wrapped["recall@6"]["mean"] - bare["recall@6"]["mean"])
    yield Figure("recall@6, bare text against OpenClaw's envelope", gap, 0.01, False)
    turns = judged("turns.dev.jsonl", rows("turns.dev.jsonl"), lambda q: found(index, q["turns"]))["groups"]
    for source, target in (("topic-shift", 0.80), ("one-ack", 0.80), ("three-acks", 0.76)):
        yield Figure(f"recall@6, {source}", turns[f"source={source}"]["recall@6"], target, True)
    for name, lines in (("small talk", small_talk), ("our own small talk", list(SMALL_TALK))):
        yield Figure(f"{name} given nothing", share(not index.search(line) for line in lines), 0.90, True)
    yield Figure("labelled queries given something", share(bool(index.search(q["query"])) for q in queries), 0.96, True)
    yield from small_libraries(pool, queries, [*small_talk, *SMALL_TALK])


def small_libraries(pool: list[Skill], queries: list[dict[str, Any]], small_talk: list[str]) -> Iterable[Figure]:
    """The cut-off at 44 skills, over eight random libraries of which half have labelled queries."""
    by_name = {skill.name: skill for skill in pool}
    wanted = sorted({name for q in queries for name in q["relevant"] if name in by_name})
    silent, kept = [], []
    for seed in range(8):
        draw = random.Random(seed)
        names = set(draw.sample(wanted, 22)) | set(draw.sample(sorted(by_name.keys() - set(wanted)), 22))
        index = build_index([by_name[name] for name in sorted(names)])
        silent += [not index.search(line) for line in small_talk]
        kept += [bool(index.search(q["query"])) for q in queries if names & set(q["relevant"])]
    yield Figure("44 skills: small talk given nothing", share(silent), 0.90, True)
    yield Figure("44 skills: labelled queries given something", share(kept), 0.96, True)


def speed(pool: list[Skill], sizes: tuple[int, ...]) -> Iterable[Figure]:
    queries = [row["query"] for row in rows("queries.dev.jsonl")]
    flood = " ".join(skill.body for skill in pool[:60])
    pastes = [flood[i * 5_000 : i * 5_000 + 8_000] for i in range(40)]
    limits = {1_000: (0.3, 1.0), 10_000: (0.5, 2.0)}
    for size in sizes:
        copies = [Skill(f"{s.name}.{i}", s.description, s.body) for i in range(-(-size // len(pool))) for s in pool]
        index = build_index(random.Random(0).sample(copies, size))
        p50, p95 = milliseconds(index, queries)
        yield Figure(f"{size:,} skills: ms per query, p50", p50, limits[size][0], False)
        yield Figure(f"{size:,} skills: ms per query, p95", p95, limits[size][1], False)
        yield Figure(
            f"{size:,} skills: ms for a pasted 8,000 characters, p95", milliseconds(index, pastes)[1], 3.0, False
        )
        if size == 1_000:
            start = time.perf_counter()
            index.add(Skill("zebra-crossing", "Paints a zebra crossing at the quokka enclosure.", "Use quokka paint."))
            hit = index.search("paint the quokka crossing")[0].name == "zebra-crossing"
            taken = (time.perf_counter() - start) * 1e3
            yield Figure("1,000 skills: ms until an added one is found", taken if hit else float("inf"), 50.0, False)
            with tempfile.TemporaryDirectory() as folder:
                save_index(index, Path(folder, "index"))
                start = time.perf_counter()
                load_index(Path(folder, "index"))
                yield Figure("1,000 skills: ms to read the file", (time.perf_counter() - start) * 1e3, 500.0, False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--quick", action="store_true", help="without the library of 10,000 skills")
    args = parser.parse_args()
    if not (DATA / "judge.py").is_file():
        print(f"There is no labelled data in {DATA}; set METACLAW_SHARED.", file=sys.stderr)
        return 2
    with gzip.open(DATA / "skills.core.jsonl.gz", "rt", encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    pool = [Skill(entry["id"], entry["description"], entry["body"]) for entry in entries]
    start = time.perf_counter()
    index = build_index(pool)
    built = time.perf_counter() - start
    figures = [*quality(pool, index), *speed(pool, (1_000,) if args.quick else (1_000, 10_000))]
    missed = [figure for figure in figures if not figure.ok]
    if args.json:
        report = [asdict(figure) | {"ok": figure.ok} for figure in figures]
        print(json.dumps({"skills": len(pool), "build_s": built, "missed": len(missed), "figures": report}))
    else:
        print(f"{len(pool):,} skills, built in {built:.1f} s")
        for figure in figures:
            verdict = "ok" if figure.ok else "MISSED"
            print(
                f"  {figure.name:55} {figure.value:8.3f}  {'≥' if figure.at_least else '≤'} {figure.target:<6g} {verdict}"
            )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
