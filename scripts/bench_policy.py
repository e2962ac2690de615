#!/usr/bin/env python3
"""What the policy server adds to a call of the SDK: python scripts/bench_policy.py [--rounds N]

One conversation of about 12,000 tokens that stays and 1,000 new ones at its end in each round, on a random-weight model
with 32k positions and a vocabulary of 8k made here, one token sampled so that the rest shows. Rounds alternate between the
policy server, as a process of its own and asked as the proxy asks it, and a prompt of the same kind given to the SDK here. Both
find the conversation in the engine's prefix cache. Prints medians in milliseconds: of both, and of the difference
within a round. Needs the extras rl and local.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import tinker
from tinker import types

from metaclaw_core.engine.testing import make_model
from metaclaw_core.policy.memory import SessionTokens
from metaclaw_core.policy.render import Renderer
from metaclaw_core.routes import read_heartbeat
from metaclaw_core.wire import by_name

UNCHANGED, NEW = 12_000, 1_000  # tokens
SIZE: dict[str, Any] = {"layers": 1, "hidden": 16, "intermediate": 16, "heads": 1, "kv_heads": 1}  # what it samples is of no interest
TARGET_MS = 10.0
PATH = "/v1/chat/completions"
TOKEN = "bench"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dice = random.Random(0)
        vocabulary = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(2, 9))) for _ in range(6000)]
        texts = [" ".join(dice.choices(vocabulary, k=200)) for _ in range(600)]
        model = make_model(folder / "model", context=32_768, vocab_size=8192, texts=texts, spread=0.02, **SIZE)
        with engine(model, folder) as (url, key), policy(model, folder, url, key) as address:
            result = asyncio.run(measure(model, url, key, address, vocabulary, dice, options.rounds))
    if options.json:
        print(json.dumps(result))
    else:
        print(
            f"prompt of {result['prompt_tokens']} tokens, {result['rounds']} rounds: policy {result['policy_ms']:.1f} ms, "
            f"SDK {result['sdk_ms']:.1f} ms, overhead {result['overhead_ms']:.1f} ms (target ≤ {TARGET_MS:g})"
        )


@contextmanager
def engine(model: Path, folder: Path) -> Iterator[tuple[str, str]]:
    code = "from metaclaw_core.cli.engine import command; command()"
    arguments = ["--model", str(model), "--port", "0", "--device", "cpu", "--threads", "1", "--json"]
    with child([sys.executable, "-c", code, *arguments], {"METACLAW_HOME": str(folder / "engine")}) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        yield ready["url"], Path(ready["key_file"]).read_text().strip()


@contextmanager
def policy(model: Path, folder: Path, url: str, key: str) -> Iterator[str]:
    home = folder / "policy"
    settings = {
        "METACLAW_HOME": str(home),
        "METACLAW_RL_MODEL": str(model),
        "METACLAW_RL_TINKER_BASE_URL": url,
        "METACLAW_RL_TINKER_API_KEY": key,
    }
    with child([sys.executable, "-m", "metaclaw_core.policy", "--follow-stdin"], settings) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps({"token": TOKEN}) + "\n")
        process.stdin.flush()
        while (beat := read_heartbeat(home)) is None or not beat.ready:
            if process.poll() is not None:
                sys.exit("The policy server ended before it was ready.")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{beat.port}"


@contextmanager
def child(command: list[str], settings: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1", **settings}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def measure(
    model: Path, url: str, key: str, address: str, vocabulary: list[str], dice: random.Random, rounds: int
) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    renderer = Renderer(tokenizer)
    service = await asyncio.to_thread(lambda: tinker.ServiceClient(base_url=url, api_key=key))
    client = await asyncio.to_thread(lambda: service.create_sampling_client(base_model=str(model)).result())
    said = Conversation(renderer, tokenizer, vocabulary, dice)
    mine: list[float] = []
    theirs: list[float] = []
    headers = {"authorization": f"Bearer {TOKEN}", "x-metaclaw-session": "bench", "x-metaclaw-explore": "1"}
    async with httpx.AsyncClient(timeout=120) as http:
        for number in range(rounds + 3):
            body, _ = said.next()
            began = time.perf_counter()
            answer = await http.post(address + PATH, content=body, headers={**headers, "x-metaclaw-flow": str(number)})
            mine.append(time.perf_counter() - began)
            answer.raise_for_status()
            body, ids = said.next()
            began = time.perf_counter()
            await client.sample(types.ModelInput.from_ints(ids), 1, types.SamplingParams(max_tokens=1, stop=list(renderer.stop_ids)))
            theirs.append(time.perf_counter() - began)
    await service.close("success")
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    middles = (1000 * statistics.median(times[3:]) for times in (mine, theirs, differences))  # the first ones fill the caches
    return {
        "prompt_tokens": answer.json()["usage"]["prompt_tokens"],
        "rounds": rounds,
        **dict(zip(("policy_ms", "sdk_ms", "overhead_ms"), middles, strict=True)),
    }


class Conversation:
    """A long conversation whose last message is another one each time."""

    def __init__(self, renderer: Renderer, tokenizer: Any, vocabulary: list[str], dice: random.Random) -> None:
        self._renderer, self._tokenizer, self._vocabulary, self._dice = renderer, tokenizer, vocabulary, dice
        self._messages: list[dict[str, str]] = [{"role": "system", "content": self._text(UNCHANGED // 2)}]
        for _ in range(10):
            self._messages.append({"role": "user", "content": self._text(UNCHANGED // 40)})
            self._messages.append({"role": "assistant", "content": self._text(UNCHANGED // 40)})

    def _text(self, tokens: int) -> str:
        words = " ".join(self._dice.choices(self._vocabulary, k=tokens))
        tokenizer = self._tokenizer
        return str(tokenizer.decode(tokenizer.encode(words, add_special_tokens=False)[:tokens]))

    def next(self) -> tuple[bytes, tuple[int, ...]]:
        """The body of a request, and the ids it is rendered to."""
        messages = [*self._messages, {"role": "user", "content": self._text(NEW)}]
        body = json.dumps({"model": "m", "messages": messages, "max_tokens": 1}).encode()
        request = by_name("openai_chat").parse_request(body, PATH)
        return body, self._renderer.render(request, SessionTokens(), max_tokens=2**31).ids


if __name__ == "__main__":
    main()
