"""How fast the worker takes exchanges in: 1,000 of 55 kB and more, written to a spool, then ingested.

    .venv/bin/python scripts/bench_ingest.py [--sessions 25] [--turns 40] [--database URL]

The traffic is synthetic: each session has a 42 kB system prompt, 12 kB of tools, and grows by a human
message, a tool call, a 4 kB result and an answer; a turn is one exchange. Targets on two cores: at least
300 exchanges a second, memory flat from the first quarter on but for what is remembered of bodies (`store.recall`: 8 MB of
them, three times that in all), and less than 10 % of the request bodies on disk. `bench_ingest_stages.py` says where
the time goes, in real sessions of three sizes.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from metaclaw_core.model import Exchange, Hints
from metaclaw_core.store.db import open_store
from metaclaw_core.store.drain import BATCH_BYTES, BATCH_ROWS
from metaclaw_core.store.spool import SpoolReader, SpoolWriter
from metaclaw_core.wire.jsonio import dumps

_WORDS = [f"{a}{b}{c}" for a in ("ban", "tor", "mel", "sik", "rul") for b in "aeiou" for c in ("ka", "no", "ti", "rem")]

_STABLE = "<!-- openclaw:attempt:STABLE -->\n"


def filler(rng: random.Random, size: int) -> str:
    """Word-like text; it compresses about like prose."""
    return " ".join(rng.choices(_WORDS, k=size // 6 + 1))[:size]


def session(number: int, turns: int, dialogue: int = 200) -> Iterator[Exchange]:
    """One session as an agent sends it: every exchange repeats the whole history."""
    rng = random.Random(number)
    tools = [
        {
            "type": "function",
            "function": {"name": f"tool_{i}", "description": filler(random.Random(i), 900), "parameters": {}},
        }
        for i in range(12)
    ]
    session_id = f"00000000-0000-4000-8000-{number:012d}"
    runtime = f"Runtime: agent=main | session=agent:main:bench{number} | sessionId={session_id} | host=bench"
    messages: list[dict[str, object]] = [{"role": "system", "content": _STABLE + filler(random.Random(0), 42_000)}]
    for turn in range(turns):
        text = f"[Mon 2026-11-23 20:38 UTC] {filler(rng, dialogue)}"
        messages.append({"role": "user", "content": text if turn else f"{text}\n\n{runtime}"})
        call = {
            "id": f"call_{turn}",
            "type": "function",
            "function": {"name": "tool_1", "arguments": dumps({"path": filler(rng, 30)})},
        }
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": f"call{turn}", "content": filler(rng, 4_000)})
        answer = filler(rng, dialogue)
        body = {"model": "bench-1", "stream": True, "messages": messages, "tools": tools}
        head = {"id": f"chatcmpl-{number}-{turn}", "object": "chat.completion.chunk", "model": "bench-1"}
        deltas = [{"role": "assistant", "content": ""}, *({"content": word + " "} for word in answer.split()[:-1])]
        deltas.append({"content": answer.split()[-1]})
        chunks = [{**head, "choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
        chunks.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        yield Exchange(
            flow_id=f"bench-{number}-{turn}",
            dialect="openai_chat",
            method="POST",
            scheme="https",
            host="api.example.com",
            port=443,
            path="/v1/chat/completions",
            started_at=1_795_466_303.0 + number * 10_000 + turn * 10,
            duration_ms=900.0,
            principal="0" * 32,
            hints=Hints(trace_id=f"{number:016x}{turn:016x}", client="openclaw"),
            request_body=dumps(body).encode(),
            request_encoding="",
            status_code=200,
            response_body="".join(f"data: {dumps(c)}\n\n" for c in chunks).encode() + b"data: [DONE]\n\n",
            response_encoding="",
            response_type="text/event-stream",
            complete=True,
            error=None,
            live=True,
        )
        messages.append({"role": "assistant", "content": answer})


def _rss_mb() -> float:
    with Path("/proc/self/statm").open() as f:
        return int(f.read().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=25)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--database", help="a database URL in place of a temporary SQLite file")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        spool = Path(folder) / "spool.db"
        bodies = spooling = 0.0
        with SpoolWriter(spool) as writer:
            for number in range(args.sessions):
                exchanges = list(session(number, args.turns))
                bodies += sum(len(e.request_body) for e in exchanges)
                start = time.perf_counter()
                writer.append(exchanges)
                spooling += time.perf_counter() - start
        total = args.sessions * args.turns
        print(
            f"spool    {total} exchanges, {bodies / total / 1000:.0f} kB a request body, {spooling / total * 1000:.2f} ms each"
        )

        store_path = Path(folder) / "store.db"
        store = open_store(args.database or store_path)
        done, start, cpu, rss = 0, time.perf_counter(), time.process_time(), []
        with SpoolReader(spool) as reader:
            while batch := reader.batch(BATCH_ROWS, BATCH_BYTES):
                report = store.ingest([exchange for _, exchange in batch], redacted=True)
                if report.failed or report.skipped or report.duplicates:
                    sys.exit(f"unexpected: {report}")
                reader.delete([row_id for row_id, _ in batch])
                done += len(batch)
                rss.append((done, _rss_mb()))
        took, cpu = time.perf_counter() - start, time.process_time() - cpu
        store.close()
        quarter = next(mb for n, mb in rss if n >= total / 4)
        print(f"ingest   {done / took:.0f} exchanges/s ({took:.2f} s; {cpu / total * 1000:.2f} ms of CPU each)")
        print(
            f"memory   {max(mb for _, mb in rss):.0f} MB at most, {rss[-1][1] - quarter:+.1f} MB since the first quarter"
        )
        if not args.database:
            stored = store_path.stat().st_size
            print(f"storage  {stored / 1e6:.1f} MB for {bodies / 1e6:.1f} MB of request bodies: {stored / bodies:.1%}")


if __name__ == "__main__":
    main()
