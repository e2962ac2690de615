"""How fast turns are scored: 1,000 of them by a judge that takes 50 ms, fails at 5 % and hangs at 2 %.

    .venv/bin/python scripts/bench_judge.py [--turns 1000] [--concurrency 8] [--latency 0.05] [--database URL]

The judge is a scripted server in a process of its own; a request that hangs is given up after one second.
Targets: every turn is scored once and none is lost; the time is that of the judge's answers divided by
the concurrency, at most 25 % more; memory is flat from the second quarter on (below 5 % growth).

The first figure is a ratio to what the judge alone needs, which a busy machine lengthens: scoring takes about half a core,
and where that is not free the ratio grows while nothing is wrong. Read it together with the share of a core that is printed.
What the clients of the proxy notice meanwhile is measured by bench_scoring_proxy.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import batched
from pathlib import Path

from metaclaw_core.learn.budget import Budget
from metaclaw_core.learn.endpoint import Endpoint
from metaclaw_core.learn.llm import LLMClient, Retry
from metaclaw_core.learn.scoring import ScoreReport, score
from metaclaw_core.model import Exchange, Hints
from metaclaw_core.settings import Settings
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.testing import Received, Script, ScriptedLLM

TIMEOUT = 1.0


def serve(latency: float) -> None:
    """The judge; it prints its port, and what it did once stdin closes."""
    done = {"answered": 0, "errors": 0, "hung": 0}

    def answer(_: Received) -> Script:
        n = sum(done.values())
        kind = "errors" if n % 20 == 3 else "hung" if n % 50 == 7 else "answered"
        done[kind] += 1
        if kind == "errors":
            return Script(status=500)
        return Script(text="It does what was asked.\nScore: 1", first_after=30 if kind == "hung" else latency)

    with ScriptedLLM(answer) as llm:
        print(llm.port, flush=True)
        sys.stdin.read()
        print(json.dumps(done), flush=True)


def fill(store: Store, count: int) -> None:
    for batch in batched(exchanges(count), 100):
        store.ingest(batch)


def exchanges(count: int) -> Iterator[Exchange]:
    """Tool loops of four exchanges, each with a history, arguments and results of some size."""
    for n in range(count):
        loop, step = divmod(n, 4)
        asked = f"Task {loop}: count the lines of each file and tell me the longest. " + "Details. " * 40
        messages: list[dict[str, object]] = [{"role": "system", "content": "You help."}, {"role": "user", "content": asked}]
        for i in range(step):
            call = {"id": f"c{i}", "type": "function", "function": {"name": "exec", "arguments": json.dumps({"command": f"wc -l f{i}"})}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": f"c{i}", "content": f"{i} lines " + "output " * 300})
        reply: dict[str, object] = {"role": "assistant", "content": "The longest is f2."}
        if step < 3:
            call = {"id": f"c{step}", "type": "function", "function": {"name": "exec", "arguments": json.dumps({"command": f"wc -l f{step}"})}}
            reply = {"role": "assistant", "content": "", "tool_calls": [call]}
        answer = {"id": f"r{n}", "model": "m", "choices": [{"index": 0, "message": reply, "finish_reason": "stop"}]}
        yield Exchange(
            flow_id=f"bench-{n}",
            dialect="openai_chat",
            method="POST",
            scheme="https",
            host="api.example.com",
            port=443,
            path="/v1/chat/completions",
            started_at=1_700_000_000.0 + n,
            duration_ms=500.0,
            principal="0" * 32,
            hints=Hints(),
            request_body=json.dumps({"model": "m", "messages": messages, "tools": [{"type": "function", "function": {"name": "exec"}}]}).encode(),
            request_encoding="",
            status_code=200,
            response_body=json.dumps(answer).encode(),
            response_encoding="",
            response_type="application/json",
            complete=True,
            error=None,
            live=True,
        )


def rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


async def watch(sizes: list[float]) -> None:
    while True:
        sizes.append(rss_mb())
        await asyncio.sleep(0.1)


async def run(store: Store, port: int, concurrency: int) -> tuple[ScoreReport, float, list[float]]:
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", "judge", "")
    retry = Retry(attempts=6, wait_initial=0.05, wait_max=0.2, wait_jitter=0.05)
    sizes: list[float] = []
    watcher = asyncio.ensure_future(watch(sizes))
    async with LLMClient(endpoint, Budget(store, None), concurrency=concurrency, timeout_s=TIMEOUT, retry=retry) as client:
        started = time.perf_counter()
        report = await score(store, Settings(), client)
        took = time.perf_counter() - started
    watcher.cancel()
    return report, took, sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--database", help="another database than a new SQLite file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.latency)
        return
    command = [sys.executable, __file__, "--serve", "--latency", str(args.latency)]
    with tempfile.TemporaryDirectory() as folder, open_store(args.database or Path(folder) / "store.db") as store:
        fill(store, args.turns)
        judge = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if judge.stdin is None or judge.stdout is None:
            raise SystemExit("the judge has no pipes")
        cpu = time.process_time()
        report, took, sizes = asyncio.run(run(store, int(judge.stdout.readline()), args.concurrency))
        cpu = time.process_time() - cpu
        judge.stdin.close()
        done = json.loads(judge.stdout.readline())
        judge.wait(10)
        left = sum(1 for _ in store.turns(state="captured"))
        scored = sum(row["score"] == 1 for row in store.turns(state="scored"))
    least = (done["answered"] * args.latency + done["hung"] * TIMEOUT) / args.concurrency
    quarter = len(sizes) // 4
    early, late = max(sizes[quarter : 2 * quarter], default=0.0), max(sizes[3 * quarter :], default=0.0)
    print(f"{report.scored} turns scored in {took:.1f} s, {report.votes} votes; {left} left, {report.problems or 'no problems'}")
    print(f"the judge: {done['answered']} answers, {done['errors']} errors, {done['hung']} time-outs")
    print(f"{report.scored / took:.0f} turns/s; the judge alone needs {least:.1f} s: {took / least:.2f} times that; {cpu / took:.0%} of a core")
    print(f"memory {early:.0f} MB in the second quarter, {late:.0f} MB in the last: {late / early - 1:+.1%}")
    good = (scored, left) == (args.turns, 0) and took / least <= 1.25 and late <= early * 1.05
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
