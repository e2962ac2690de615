#!/usr/bin/env python
"""What the proxy's clients notice of the worker's scoring: p50 of requests while it scores and while it stands still.

    scripts/bench_scoring_proxy.py                  # 24 pairs of rounds of 40 requests of 60 kB, about a minute
    scripts/bench_scoring_proxy.py --pairs 8

A real mitmdump with the addon and its worker, which has 3,000 turns and a judge of 50 ms (5 % errors, 2 % time-outs). The
worker is stopped (SIGSTOP) for every other round, so both halves of a pair see the same machine; their order alternates.
Bar: the median over the pairs of p50 scoring / p50 idle is at most 1.15. On a machine without a free core for the worker
the figure says how the system shares its cores, not what the worker costs: it prints the load.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from bench_judge import fill  # noqa: E402

from metaclaw_core.proxy.control import call, running_proxies  # noqa: E402
from metaclaw_core.store.db import open_store  # noqa: E402
from metaclaw_core.testing import ScriptedLLM  # noqa: E402

BAR = 1.15


def serve() -> None:
    """The LLM that the client talks to."""
    with ScriptedLLM() as llm:
        print(llm.port, flush=True)
        sys.stdin.read()


def child(*command: str) -> tuple[subprocess.Popen[str], int]:
    """A server that prints its port."""
    process = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scored(home: Path) -> int:
    return count_of(home, "turns WHERE state = 'scored'")


def count_of(home: Path, what: str) -> int:
    with closing(sqlite3.connect(f"file:{home / 'store.db'}?mode=ro", uri=True, timeout=5)) as db:
        return int(db.execute(f"SELECT count(*) FROM {what}").fetchone()[0])


def worker_of(home: Path) -> int | None:
    for proxy in running_proxies(home):
        for row in call(proxy, "status")["children"]:
            if row["pid"]:
                return int(row["pid"])
    return None


def wait_for(what: str, check: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise SystemExit(f"{what} did not happen in {seconds:.0f} s")
        time.sleep(0.05)


def round_of(client: http.client.HTTPConnection, url: str, body: bytes, count: int) -> list[float]:
    """Milliseconds of each request."""
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        client.request("POST", url, body, {"content-type": "application/json", "authorization": "Bearer sk-bench-000000000000"})
        client.getresponse().read()
        times.append((time.perf_counter() - begun) * 1e3)
        time.sleep(0.02)  # else the worker has more to take in than to score
    return times


def measure(home: Path, port: int, llm: int, pairs: int, count: int) -> tuple[list[float], list[float], int]:
    """(p50 while scoring, p50 while it stands still, turns scored meanwhile), a value per pair."""
    worker = worker_of(home)
    if worker is None:
        raise SystemExit("the worker does not run")
    filler = "word " * 12_000
    messages = [{"role": "system", "content": filler}, {"role": "user", "content": "How do I resolve a git rebase conflict?"}]
    body = json.dumps({"model": "m", "messages": messages}).encode()
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    url = f"http://127.0.0.1:{llm}/v1/chat/completions"
    round_of(client, url, body, count)
    halves: dict[bool, list[float]] = {True: [], False: []}
    done = 0
    for pair in range(pairs):
        for scoring in ((True, False), (False, True))[pair % 2]:
            if not scoring:
                os.kill(worker, signal.SIGSTOP)
            before = scored(home)
            try:
                halves[scoring].append(statistics.median(round_of(client, url, body, count)))
            finally:
                os.kill(worker, signal.SIGCONT)
            done += scored(home) - before if scoring else 0
            time.sleep(0.1)  # what piled up while it stood still is not this round's
    client.close()
    return halves[True], halves[False], done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--requests", type=int, default=40, help="of a round")
    parser.add_argument("--turns", type=int, default=3000)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "metaclaw"
        home.mkdir(mode=0o700)
        with open_store(home / "store.db") as store:
            fill(store, args.turns)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("METACLAW_") and not k.lower().endswith("_proxy")}
        environment |= {"METACLAW_HOME": str(home)}
        subprocess.run([sys.executable, "-m", "metaclaw_core.skills.build"], env=environment, cwd=ROOT, check=True, capture_output=True)
        judge, judge_port = child(str(ROOT / "scripts/bench_judge.py"), "--serve", "--latency", "0.05")
        llm, llm_port = child(__file__, "--serve")
        port = free_port()
        sets = {
            "confdir": str(Path(folder) / "mitmproxy"),
            "flow_detail": "0",
            "metaclaw_llm_api_base": f"http://127.0.0.1:{judge_port}/v1",
            "metaclaw_llm_model_id": "judge",
            "metaclaw_judge_timeout_seconds": "1",
            "metaclaw_llm_daily_token_budget": "null",
        }
        command = [str(Path(sys.executable).with_name("mitmdump")), "--listen-host", "127.0.0.1", "-p", str(port)]
        command += ["-s", str(ROOT / "addons/metaclaw.py")]
        command += [part for name, value in sets.items() for part in ("--set", f"{name}={value}")]
        proxy = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            # The golden set comes first and would take the judge from the turns.
            wait_for("the first score", lambda: running_proxies(home) and worker_of(home) and count_of(home, "health") and scored(home))
            busy, idle, done = measure(home, port, llm_port, args.pairs, args.requests)
        finally:
            for process in (proxy, judge, llm):
                process.terminate()
                process.wait(20)
    ratio = statistics.median(b / i for b, i in zip(busy, idle, strict=True))
    print(f"p50 {statistics.median(busy):.2f} ms while {done} turns were scored, {statistics.median(idle):.2f} ms idle; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"scoring / idle: {ratio:.3f}, median of {len(busy)} pairs; the bar is {BAR}")
    if done == 0:
        print("nothing was scored meanwhile: the figure says nothing; give it more --turns")
        return 2
    return 0 if ratio <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
