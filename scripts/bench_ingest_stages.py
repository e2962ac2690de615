#!/usr/bin/env python
"""What taking in one exchange costs, stage by stage, in sessions of the real OpenClaw that grow.

    .venv/bin/python scripts/bench_ingest_stages.py [--kb 5 60 400] [--sessions 12] [--rounds 3]

A dozen sessions of one caller take turns. Each is made from the recording `openai-completions`: its system prompt
(cut for 5 kB), its tools, its messages, lengthened by turns of the same kind to the size asked for; then it grows by a
message of the human and three tool results, again and again. All sessions' requests of one step are a batch, which goes
through the spool, so that steps with a new human message and steps that continue a tool loop can be told apart. CPU time
of the one thread, per exchange, medians over the steps; "all" is measured without the clocks.

Noted down on two cores that others used as well (load average 4), both in the same minute; ms an exchange. Before requests
were read by those before them and batches were written together:

                                5 human    5 continued       60 human   60 continued      400 human  400 continued
    read the spool                0.033          0.028          0.032          0.031          0.065          0.066
    look for our block            0.008          0.010          0.034          0.034          0.189          0.190
    parse the request             0.095          0.116          0.306          0.299          2.935          2.611
    hash its messages             0.064          0.076          0.169          0.169          1.456          1.218
    key of the exchange           0.014          0.017          0.044          0.044          0.215          0.213
    parse the answer              0.075          0.075          0.088          0.081          0.124          0.101
    the rest of reading           0.029          0.031          0.049          0.050          0.163          0.155
    who speaks                    0.028          0.030          0.048          0.047          0.158          0.136
    decide and write              0.721          0.780          0.955          0.912          2.136          1.840
    transaction                   0.087          0.082          0.115          0.106          0.328          0.337
    empty the spool               0.018          0.021          0.022          0.022          0.033          0.034
    all                           1.205          1.277          1.891          1.900          6.825          7.062

and since:

    read the spool                0.032          0.029          0.031          0.035          0.092          0.102
    find the body before          0.027          0.031          0.039          0.041          0.075          0.078
    parse the request             0.027          0.037          0.029          0.041          0.044          0.059
    hash its messages             0.013          0.016          0.014          0.017          0.027          0.033
    key of the exchange           0.014          0.016          0.045          0.045          0.212          0.212
    parse the answer              0.073          0.074          0.077          0.077          0.085          0.086
    the rest of reading           0.039          0.038          0.040          0.041          0.048          0.050
    who speaks                    0.019          0.018          0.020          0.021          0.054          0.054
    ask what is known             0.018          0.016          0.020          0.019          0.024          0.024
    decide                        0.071          0.124          0.081          0.136          0.100          0.158
    write                         0.112          0.128          0.130          0.140          0.155          0.168
    transaction                   0.032          0.035          0.039          0.040          0.064          0.069
    empty the spool               0.018          0.019          0.019          0.024          0.096          0.075
    all                           0.493          0.612          0.582          0.702          1.182          1.229
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from metaclaw_core.model import Exchange
from metaclaw_core.proxy.readflows import read_exchanges
from metaclaw_core.store import ingest, ingest_writes, reading, recall, rollouts
from metaclaw_core.store.db import open_store
from metaclaw_core.store.drain import drain_spool
from metaclaw_core.store.spool import SpoolReader, SpoolWriter

ROOT = Path(__file__).resolve().parents[1]
STAGES: dict[str, list[tuple[Any, str]]] = {
    "read the spool": [(SpoolReader, "batch")],
    "find the body before": [(recall.Recall, "near"), (reading, "has")],
    "parse the request": [(recall, "reread"), (recall, "read")],
    "hash its messages": [(recall.Recall, "read")],
    "key of the exchange": [(reading, "content_key")],
    "parse the answer": [(reading, "_response")],
    "the rest of reading": [(rollouts, "read")],
    "who speaks": [(ingest, "identify")],
    "ask what is known": [(ingest, "recorded"), (ingest, "known_messages"), (ingest, "with_turn_id")],
    "decide": [(ingest.Ingest, "run")],
    "write": [(ingest_writes.Writes, "flush")],
    "transaction": [(rollouts.Store, "ingest")],
    "empty the spool": [(SpoolReader, "delete")],
}


class Clocks:
    """CPU time of the functions of each stage, without that of stages that they call."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []
        for stage, places in STAGES.items():
            for owner, name in places:
                setattr(owner, name, self._timed(getattr(owner, name), stage))

    def _timed(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            began = time.thread_time()
            self._inner.append(0.0)
            try:
                return function(*args, **options)
            finally:
                took = time.thread_time() - began
                self.spent[stage] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        return timed


def recording() -> Path:
    shared = Path(os.environ.get("METACLAW_SHARED", ROOT.parent / "shared"))
    full = shared / "captures" / "openai-completions.mitm"
    return full if full.exists() else ROOT / "tests" / "captures" / "openai-completions.mitm"


class Session:
    """One session as the recorded client sends it."""

    def __init__(self, number: int, kb: int, recorded: Exchange) -> None:
        self._recorded = recorded
        self._number = number
        self._steps = 0
        self._body = json.loads(recorded.request_body)
        system, self._first, self._carrier = self._body["messages"]
        if kb < 60:
            system = system | {"content": system["content"][: kb * 400] + system["content"][-kb * 100 :]}
            self._body["tools"] = self._body["tools"][:1]
        self._first = self._first | {"content": f"{self._first['content']}\n(session {number})"}
        self._history = [system, self._first]
        while len(self._history) < 4 or self._size() < kb * 1000:
            self._grow(human=len(self._history) % 7 == 2)

    def step(self, *, human: bool) -> Exchange:
        self._grow(human=human)
        self._steps += 1
        body = self._body | {"messages": [*self._history, self._carrier]}
        return replace(
            self._recorded,
            flow_id=f"{self._number}-{self._steps}",
            started_at=self._recorded.started_at + self._steps,
            hints=replace(self._recorded.hints, trace_id=f"{self._number:016x}{self._turn:016x}", session_id=f"s-{self._number}"),
            request_body=json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode(),
            live=True,
        )

    def _grow(self, *, human: bool) -> None:
        at = len(self._history)
        if human:
            self._history.append({"role": "assistant", "content": f"Done with part {at}. " * 12})
            self._history.append({"role": "user", "content": f"[Mon 2026-11-23 20:38 UTC] Now look at part {at} of it, please."})
            self._turn = at
            return
        call = {"id": f"call_{at}", "type": "function", "function": {"name": "read", "arguments": json.dumps({"path": f"part{at}.py"})}}
        self._history.append({"role": "assistant", "content": None, "tool_calls": [call]})
        lines = "\n".join(f"{at}.{i}: def part_{at}_{i}(value: int) -> int: return value + {i}" for i in range(30))
        self._history.append({"role": "tool", "tool_call_id": f"call_{at}", "content": lines})

    def _size(self) -> int:
        return len(json.dumps(self._body | {"messages": self._history}, ensure_ascii=False))

    _turn = 0


def steps(sessions: list[Session], rounds: int) -> Iterator[tuple[str, list[Exchange]]]:
    yield "first", [session.step(human=True) for session in sessions]
    for _ in range(rounds):
        yield "human", [session.step(human=True) for session in sessions]
        for _ in range(3):
            yield "continued", [session.step(human=False) for session in sessions]


def measure(kb: int, count: int, rounds: int, recorded: Exchange, clocks: Clocks | None) -> dict[str, list[dict[str, float]]]:
    """By kind of step, of each batch: ms an exchange by stage, and "all"."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open_store(folder / "store.db") as store, SpoolWriter(folder / "spool.db") as writer:
            for kind, batch in steps([Session(number, kb, recorded) for number in range(count)], rounds):
                writer.append(batch)
                if clocks is not None:
                    clocks.spent.clear()
                began = time.thread_time()
                report = drain_spool(store, writer.path)
                took = {"all": time.thread_time() - began} | (dict(clocks.spent) if clocks is not None else {})
                if report.stored != count or report.problems:
                    sys.exit(f"unexpected: {report}")
                found[kind].append({stage: 1000 * s / count for stage, s in took.items()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kb", type=int, nargs="+", default=[5, 60, 400])
    parser.add_argument("--sessions", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with recording().open("rb") as file:
        recorded = next(e for e in read_exchanges(file, str(recording()), b"key") if e is not None)
    measure(5, 4, 1, recorded, None)  # statements are compiled, modules are there
    plain = {kb: measure(kb, args.sessions, args.rounds, recorded, None) for kb in args.kb}
    clocks = Clocks()
    timed = {kb: measure(kb, args.sessions, args.rounds, recorded, clocks) for kb in args.kb}
    kinds = [(kb, kind) for kb in args.kb for kind in ("human", "continued")]
    print(f"{'load ' + ' '.join(f'{x:.1f}' for x in os.getloadavg()):24}" + "".join(f"{f'{kb} {kind}':>15}" for kb, kind in kinds))
    for stage in (*STAGES, "all"):
        values = [statistics.median(step.get(stage, 0.0) for step in (plain if stage == "all" else timed)[kb][kind]) for kb, kind in kinds]
        print(f"{stage:24}" + "".join(f"{value:15.3f}" for value in values))


if __name__ == "__main__":
    main()
