"""What keeps the worker busy while the proxy is measured: one `Busy` per kind of work, in `BUSY`.

A kind of work is added by writing its `Busy`: the settings that switch it on, a store to work on, and how much of it is done.
It must have enough to do for the whole measurement, and report how much it did: a ratio beside an idle worker says nothing.

The LLM that judges and writes is scripted, takes 50 ms and never fails; it runs in a process of its own.

Training is mode rl with all that belongs to it: the policy server, the worker that trains, and a real ``metaclaw engine`` (one
thread, a tiny model) that sleeps and wakes with them. The requests that are measured are passed on to their upstream as in the
other cases, by a warm-up that does not end (`rl.warmup_turns`): none is routed to the policy server, whose answers would take as
long as the model does. Each step is the worker's own, from the claim to the checks; it takes about as long as the worker's timer
leaves between two, and a round is longer than of the other cases. How much of a core the engine used in the rounds is reported, too.
"""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from bench_homes import environment  # noqa: E402
from bench_judge import exchanges, fill  # noqa: E402
from tiny_engine import TinyEngine, answers, missing, write_tiny  # noqa: E402

from metaclaw_core.model import Exchange  # noqa: E402
from metaclaw_core.store.db import open_store  # noqa: E402
from metaclaw_core.testing import Received, Script, ScriptedLLM  # noqa: E402

LATENCY = 0.05
SCORED_TURNS, EVOLVED_SESSIONS = 6_000, 1_500


@dataclass(frozen=True)
class Busy:
    name: str
    unit: str  # of what is done
    settings: Callable[[int, TinyEngine | None], dict[str, Any]]  # port of the scripted LLM, engine → config.yaml
    fill: Callable[[Path], None]  # give a home's worker its work
    progress: Callable[[Path], int]  # how much of it is done
    engine: Callable[[Path], TinyEngine] | None = None  # what makes the engine it needs beside the home, in an empty folder
    missing: Callable[[], str | None] = lambda: None  # why it can't be measured here
    requests: int = 300  # of a round


def count(home: Path, rows: str) -> int:
    """How many of `rows` ("turns WHERE …") there are; 0 while there is no such table."""
    with closing(sqlite3.connect(f"file:{home / 'store.db'}?mode=ro", uri=True, timeout=5)) as db:
        return int(db.execute(f"SELECT count(*) FROM {rows}").fetchone()[0])


def _llm(port: int) -> dict[str, Any]:
    return {"api_base": f"http://127.0.0.1:{port}/v1", "model_id": "busy", "daily_token_budget": None}


def _scoring(port: int, _: TinyEngine | None) -> dict[str, Any]:
    return {"llm": _llm(port), "skills": {"auto_evolve": False}}


def _evolving(port: int, _: TinyEngine | None) -> dict[str, Any]:
    return {"llm": _llm(port), "judge": {"enabled": False}}


def _training(_: int, engine: TinyEngine | None) -> dict[str, Any]:
    """The weights hardly move, so that every answer stays good to learn from."""
    assert engine is not None
    rl = {"lora_rank": 8, "batch_size": 32, "min_sessions": 4, "learning_rate": 1e-7, "support_share": 0, "max_staleness": 1_000_000, "warmup_turns": 1_000_000_000}
    return {"mode": "rl", "rl": rl | engine.settings, "judge": {"enabled": False}, "skills": {"auto_evolve": False}}


def _engine(folder: Path) -> TinyEngine:
    return TinyEngine(write_tiny(folder / "model", layers=4, hidden=128, intermediate=512), folder / "engine")


def _to_score(home: Path) -> None:
    with open_store(home / "store.db") as store:
        fill(store, SCORED_TURNS)


def _to_evolve(home: Path) -> None:
    with open_store(home / "store.db") as store:
        made = [conversation(number, time.time() - 7200 + number) for number in range(EVOLVED_SESSIONS)]
        for at in range(0, len(made), 100):
            store.ingest(made[at : at + 100])


def _to_train_on(home: Path) -> None:
    answers(home, environment(home))


def conversation(number: int, at: float) -> Exchange:
    """One exchange that is a session of its own; a person says in it how they want something done."""
    example = next(exchanges(1))
    asked = f"When you write report {number}, always put the summary first and run the spell checker before you send it to me, please."
    body = {"model": "m", "messages": [{"role": "system", "content": f"You help. Session {number}."}, {"role": "user", "content": asked}]}
    answer = {"id": f"e{number}", "model": "m", "choices": [{"index": 0, "message": {"role": "assistant", "content": "Understood."}, "finish_reason": "stop"}]}
    return replace(
        example,
        flow_id=f"evolve-{number}",
        host="api.openai.com",
        started_at=at,
        request_body=json.dumps(body).encode(),
        response_body=json.dumps(answer).encode(),
    )


_REPORT = re.compile(rb"When you write report (\d+), always put the summary first")


def answer(received: Received) -> Script:
    """As a judge; as an evolver where the conversation is one of ours."""
    found = _REPORT.search(received.body)
    if found is None:
        return Script(text="It does what was asked.\nScore: 1", first_after=LATENCY)
    number = int(found[1])
    steps = [f"{n}. Do step {n} of report {number}: look at part {n * 7 % 11}, write it down plainly, then read it again aloud." for n in range(1, 7)]
    edit = {
        "op": "add",
        "name": f"write-report-{number}",
        "description": f"How report {number} is written: the summary first, then the spell checker.",
        "triggers": [f"write report {number}"],
        "body": f"# Report {number}\n\n" + "\n".join(steps),
        "quotes": [f"When you write report {number}, always put the summary first and run the spell checker"],
    }
    return Script(text=json.dumps({"edits": [edit]}), first_after=LATENCY)


class BusyLLM:
    """The scripted LLM in a process of its own; ``port`` is where it listens."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


BUSY: tuple[Busy, ...] = (
    Busy("scoring", "turns", _scoring, _to_score, lambda home: count(home, "turns WHERE state = 'scored'")),
    Busy("evolving", "sessions", _evolving, _to_evolve, lambda home: count(home, "segments WHERE state = 'done'")),
    Busy("training", "steps", _training, _to_train_on, lambda home: count(home, "steps WHERE state = 'routed'"), _engine, missing, 600),
)


def main() -> None:
    with ScriptedLLM(answer) as llm:
        print(llm.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
