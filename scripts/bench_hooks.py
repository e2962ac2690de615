#!/usr/bin/env python
"""CPU that our own code takes per request, measured inside one process: hooks on the loop, and the writer thread.

    scripts/bench_hooks.py                 # 60 and 400 kB, all five dialects, 2,000 requests each size
    scripts/bench_hooks.py --kb 60 --requests 400 --profile

Sessions of 40 requests that grow: a human turn and three rounds of its tool loop, ten times. The hooks are called as
mitmproxy calls them, on real `HTTPFlow` objects, without sockets. Times are CPU time of a thread (`thread_time`, less
what reading that clock takes itself), so what else the machine does matters little. `new` is a request with a new human
message, `cont` one of its tool loop, `all` the mean over all requests; `writer` is the spool's thread per request,
redaction and commit included. Bars, hooks and writer together: at 60 kB ≤ 0.4 ms a request; at 400 kB ≤ 0.4 ms `cont` and
≤ 1.8 ms `new`. Exit status 1 where one is broken.

What a request costs where, at 60 / 400 kB (µs of CPU, load average 3): headers 20 / 24, reading the body by the one before
77 / 118, who speaks 31 / 63, the copy with the block 8 / 22, record and queue 28 / 32; for a new human message retrieval 124 / 184
and choosing 26 / 36; the writer 100 / 130 for a row, of which a third looks for secrets.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import os
import pstats
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TASKS = [
    "Please debug this Python function, it raises KeyError on empty input",
    "Why is this SQL query slow?",
    "Write a cron job that rotates the logs",
    "Draft an email to the team about the outage",
    "yes, do it",
]
WORDS = ["agent", "tool", "file", "the", "bash", "quoted", "skill", "return", "path/to/x.py", "{k:v}", "error", "and", "of", "to", "in", "is", "for", "with", "on", "as"]
CARRIER = "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\ndata\n<<<END_OPENCLAW_INTERNAL_CONTEXT>>>"
PATHS = {
    "openai_chat": "/v1/chat/completions",
    "openai_responses": "/v1/responses",
    "anthropic": "/v1/messages",
    "gemini": "/v1beta/models/m:streamGenerateContent?alt=sse",
    "ollama": "/api/chat",
}


def prose(rng: random.Random, size: int) -> str:
    return " ".join(rng.choices(WORDS, k=size // 5 + 1))[:size]


def session(dialect: str, kb: int, number: int) -> Iterator[tuple[bytes, str, bool]]:
    """(body, trace id, whether a new human message is in it), 40 of them."""
    rng = random.Random(number)
    runtime = f"Runtime: agent=main | session=agent:main:b{number} | sessionId={number:08x}-0000-4000-8000-000000000000 | shell=bash"
    system = f"<!-- openclaw:attempt:STABLE -->\n{prose(rng, 38_000)}\n<!-- openclaw:attempt:DYNAMIC -->\n{runtime}\n"
    tools = [prose(rng, 900) for _ in range(12)]
    history: list[tuple[str, str]] = [
        ("human" if n % 2 == 0 else "assistant", prose(rng, 10_000)) for n in range(2 * max(0, (kb - 60) // 20))
    ]
    for turn in range(10):
        trace = f"{number:016x}{turn:016x}"
        history.append(("human", f"{TASKS[(number + turn) % len(TASKS)]} ({turn})"))
        for step in range(4):
            yield render(dialect, system, tools, history, runtime), trace, step == 0
            history += [("call", f"c{turn}x{step}"), ("result", prose(rng, 600))] if step < 3 else [("assistant", prose(rng, 300))]


def render(dialect: str, system: str, tools: list[str], history: list[tuple[str, str]], runtime: str) -> bytes:
    stamped = [(role, f"[Mon 2026-11-23 20:38 UTC] {text}" if role == "human" else text) for role, text in history]
    body: dict[str, Any]
    if dialect in ("openai_chat", "ollama"):
        if dialect == "openai_chat":
            first = next(i for i, (role, _) in enumerate(stamped) if role == "human")
            stamped[first] = ("human", f"{stamped[first][1]}\n\n{runtime}")
        messages: list[Any] = [{"role": "system", "content": system}]
        for role, text in [*stamped, ("human", CARRIER)]:
            if role == "call":
                arguments: Any = {"path": text} if dialect == "ollama" else json.dumps({"path": text})
                call = {"id": text, "type": "function", "function": {"name": "read", "arguments": arguments}}
                messages.append({"role": "assistant", "content": None if dialect == "openai_chat" else "", "tool_calls": [call]})
            elif role == "result":
                messages.append({"role": "tool", "content": text, "tool_call_id": "x"})
            else:
                messages.append({"role": {"human": "user"}.get(role, role), "content": text})
        functions = [{"type": "function", "function": {"name": f"t{i}", "description": t, "parameters": {}}} for i, t in enumerate(tools)]
        body = {"model": "m", "messages": messages, "stream": True, "tools": functions}
    elif dialect == "openai_responses":
        items: list[Any] = []
        for role, text in [*stamped, ("human", CARRIER)]:
            if role == "call":
                items.append({"type": "function_call", "call_id": text, "name": "read", "arguments": json.dumps({"path": text})})
            elif role == "result":
                items.append({"type": "function_call_output", "call_id": "x", "output": text})
            else:
                kind = "output_text" if role == "assistant" else "input_text"
                items.append({"type": "message", "role": {"human": "user"}.get(role, role), "content": [{"type": kind, "text": text}]})
        functions = [{"type": "function", "name": f"t{i}", "description": t, "parameters": {}} for i, t in enumerate(tools)]
        body = {"model": "m", "input": items, "stream": True, "tools": functions, "instructions": system}
    elif dialect == "anthropic":
        messages = []
        for role, text in [*stamped, ("human", CARRIER)]:
            if role == "call":
                messages.append({"role": "assistant", "content": [{"type": "tool_use", "id": text, "name": "read", "input": {"path": text}}]})
            elif role == "result":
                messages.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": text}]})
            else:
                messages.append({"role": {"human": "user"}.get(role, role), "content": [{"type": "text", "text": text}]})
        functions = [{"name": f"t{i}", "description": t, "input_schema": {}} for i, t in enumerate(tools)]
        blocks = [{"type": "text", "text": system}]
        body = {"model": "m", "max_tokens": 8192, "stream": True, "messages": messages, "system": blocks, "tools": functions}
    else:
        contents = []
        for role, text in [*stamped, ("human", CARRIER)]:
            part: dict[str, Any] = {"text": text}
            if role == "call":
                part = {"functionCall": {"name": "read", "args": {"path": text}}}
            elif role == "result":
                part = {"functionResponse": {"name": "read", "response": {"output": text}}}
            contents.append({"role": "model" if role in ("call", "assistant") else "user", "parts": [part]})
        functions = [{"name": f"t{i}", "description": t} for i, t in enumerate(tools)]
        body = {"contents": contents, "systemInstruction": {"parts": [{"text": system}]}, "tools": [{"functionDeclarations": functions}]}
    return json.dumps(body, separators=(",", ":")).encode()


ANSWER = b'data: {"choices":[{"index":0,"delta":{"content":"ok"},"finish_reason":"stop"}]}\n\n' * 20


async def measure(kb: int, requests: int, profile: bool) -> dict[str, float]:
    from mitmproxy import http
    from mitmproxy.test import taddons, tflow

    from metaclaw_core.proxy.addon import MetaClaw
    from metaclaw_core.proxy.rewrite import Rewriter
    from metaclaw_core.proxy.service import Service

    addon = MetaClaw(worker=False)
    with taddons.context(addon, loadcore=False) as context:
        context.options.server = False
        addon.running()
        assert addon.settings is not None
        assert addon._runtime is not None
        current = addon._runtime
        addon._rewriter = Rewriter(addon.settings, current.sessions, current.spool)
        addon._service = Service(current, addon, worker=False, policy=None, environment={})
        addon._service.prepare()
        clock = time.pthread_getcpuclockid(current.spool._thread.ident or 0)
        spent: dict[str, list[float]] = {"new": [], "cont": []}
        names = list(PATHS)
        profiler = cProfile.Profile() if profile else None
        done = number = 0
        reading = clock_cost()
        writer_before = time.clock_gettime(clock)
        while done < requests:
            dialect = names[number % len(names)]
            for body, trace, new in session(dialect, kb, number):
                flow = tflow.tflow(resp=True)
                flow.live = True
                flow.request = http.Request.make(
                    "POST",
                    f"https://api.example.com{PATHS[dialect]}",
                    body,
                    {"content-type": "application/json", "authorization": "Bearer k", "traceparent": f"00-{trace}-{1:016x}-01"},
                )
                flow.response = None
                response = http.Response.make(200, b"", {"content-type": "text/event-stream"})
                response.headers.pop("content-length", None)
                if profiler:
                    profiler.enable()
                begun = time.thread_time()
                addon.requestheaders(flow)
                await addon.request(flow)
                took = time.thread_time() - begun
                flow.response = response
                begun = time.thread_time()
                addon.responseheaders(flow)
                stream = flow.response.stream
                assert callable(stream)
                stream(ANSWER)
                stream(b"")
                flow.response.data.content = None
                flow.response.timestamp_end = flow.request.timestamp_start + 1
                addon.response(flow)
                spent["new" if new else "cont"].append(took + time.thread_time() - begun - 2 * reading)
                if profiler:
                    profiler.disable()
                done += 1
            number += 1
            await asyncio.to_thread(current.spool.flush)
        writer = (time.clock_gettime(clock) - writer_before) / done
        assert current.counters["injected"] > 0.9 * done, dict(current.counters)
        addon._service = None
        current.close()
    if profiler:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(30)
    spent["all"] = spent["new"] + spent["cont"]
    return {name: 1e3 * sum(times) / len(times) for name, times in spent.items()} | {"writer": 1e3 * writer}


def clock_cost() -> float:
    """CPU seconds between two readings of the clock with nothing between them."""
    begun = time.thread_time()
    for _ in range(1000):
        time.thread_time()
    return (time.thread_time() - begun) / 1001


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kb", type=int, nargs="+", default=[60, 400])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    broken = False
    with tempfile.TemporaryDirectory() as folder:
        os.environ["METACLAW_HOME"] = folder
        print(f"load average {os.getloadavg()[0]:.1f}\n\n| kB | new, ms | cont, ms | all, ms | writer, ms |\n|---|---|---|---|---|", flush=True)
        bars: list[str] = []
        for kb in args.kb:
            got = asyncio.run(measure(kb, args.requests, args.profile))
            print("|", " | ".join([str(kb), *(f"{got[name]:.3f}" for name in ("new", "cont", "all", "writer"))]), "|", flush=True)
            limits = {"all": 0.4} if kb <= 60 else {"cont": 0.4, "new": 1.8}
            for name, limit in limits.items():
                both = got[name] + got["writer"]
                bars.append(f"{kb} kB, {name} + writer: {both:.3f} ms <= {limit} ms: {'met' if both <= limit else 'NOT MET'}")
                broken = broken or both > limit
        print("", *bars, sep="\n")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
