#!/usr/bin/env python3
"""Time to find the place and to splice, per dialect and body size: python scripts/bench_splice.py [CAPTURE.mitm …]

The bodies are made up in the shape of an agent's: 42 kB of system prompt, 16 kB of tools, the rest history,
with the keys in the order in which OpenClaw sends them. Captures given as arguments are timed as well.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metaclaw_core.wire import splice
from metaclaw_core.wire.base import Slot

PROSE = 'Read the file before you answer.\nSay "done" only when the tests pass, and name what you left out.\n'
SYSTEM = (PROSE * 500)[:42_000]
SCHEMA = {"type": "object", "properties": {n: {"type": "string", "description": "What it is"} for n in "abcdefghij"}}
TOOLS = [{"name": f"tool_{i}", "description": PROSE * 5, "parameters": SCHEMA} for i in range(14)]
BLOCK = splice.render_block(("## A skill\n" + PROSE * 20) * 3)
RUNS = 300

type Shape = Callable[[list[str]], dict[str, Any]]


def chat(history: list[str]) -> dict[str, Any]:
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(history)]
    return {"model": "m", "messages": [{"role": "system", "content": SYSTEM}, *turns], "stream": True, "tools": TOOLS}


def anthropic(history: list[str]) -> dict[str, Any]:
    system = [{"type": "text", "text": SYSTEM[:30_000], "cache_control": {"type": "ephemeral"}}]
    system.append({"type": "text", "text": SYSTEM[30_000:]})
    return {"model": "m", "messages": chat(history)["messages"][1:], "max_tokens": 9, "system": system, "tools": TOOLS}


def responses(history: list[str]) -> dict[str, Any]:
    items = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": t}]} for t in history]
    return {"model": "m", "input": items, "stream": True, "instructions": SYSTEM, "tools": TOOLS, "store": True}


def gemini(history: list[str]) -> dict[str, Any]:
    contents = [{"role": "user", "parts": [{"text": text}]} for text in history]
    system = {"parts": [{"text": SYSTEM}]}
    return {"contents": contents, "systemInstruction": system, "tools": [{"functionDeclarations": TOOLS}]}


DIALECTS: dict[str, tuple[Callable[[bytes], Slot], Shape]] = {
    "openai_chat": (splice.slot_openai_chat, chat),
    "openai_responses": (splice.slot_openai_responses, responses),
    "anthropic": (splice.slot_anthropic, anthropic),
    "gemini": (splice.slot_gemini, gemini),
    "ollama": (splice.slot_ollama, chat),
}
PATHS = {
    "/chat/completions": "openai_chat",
    "/responses": "openai_responses",
    "/messages": "anthropic",
    "GenerateContent": "gemini",
    "/api/chat": "ollama",
}


def p50_ms(work: Callable[[], object]) -> float:
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def report(label: str, name: str, body: bytes) -> None:
    find = DIALECTS[name][0]
    slot = find(body)
    sent = splice.insert(body, slot, BLOCK)
    ours = find(sent)
    found, put, parse = p50_ms(lambda: find(body)), p50_ms(lambda: splice.insert(body, slot, BLOCK)), p50_ms(lambda: json.loads(body))
    out = p50_ms(lambda: splice.remove(sent, ours))
    print(f"{label:34} {len(body):>8,} B  find {found:.3f}  insert {put:.3f}  remove {out:.3f}  (json.loads {parse:.3f}) ms")


def main(captures: list[str]) -> None:
    for kb in (60, 400):
        for name, (_, shape) in DIALECTS.items():
            bare = len(json.dumps(shape([])))
            history = [PROSE * 10] * max(2, int((kb * 1000 - bare) / (len(PROSE) * 10 + 60)))
            report(name, name, json.dumps(shape(history), separators=(",", ":")).encode())
    for capture in captures:
        from mitmproxy.io import FlowReader  # only where captures are given: it imports for half a second

        with Path(capture).open("rb") as file:
            largest = max(FlowReader(file).stream(), key=lambda flow: len(flow.request.content))
        name = next(name for path, name in PATHS.items() if path in largest.request.path)
        report(Path(capture).stem, name, largest.request.content)


if __name__ == "__main__":
    main(sys.argv[1:])
