"""How long the policy server takes from a request to token ids, where most of the prompt was there in the request before.

    .venv/bin/python scripts/bench_render.py [--rounds 100] [--reserved 0]

A recorded OpenClaw session (tests/captures) goes on: at each round the model answers with a call, sampled token by token,
and a tool result of some 1,000 tokens comes back; the prompt before it has 12,000 tokens at least. `--reserved` adds so many
special tokens to the vocabulary, as DeepSeek's and Kimi's have. Target: p50 <= 10 ms. The comparison is what transformers
takes for the same prompt. The tokenizer is trained on the session, the chat template is Qwen-like (tests/policy/render_help).
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "policy")]

from mitmproxy import io  # noqa: E402
from render_help import QWEN, Kept, make_tokenizer, recorded, result  # noqa: E402

from metaclaw_core.policy.messages import chat_of, declared  # noqa: E402
from metaclaw_core.policy.render import Renderer  # noqa: E402

NEW_WORDS = 600  # about 1,000 tokens
MAX_MESSAGES = 21  # then the session begins anew


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--reserved", type=int, default=0)
    options = parser.parse_args()
    with (ROOT / "tests/captures/openai-completions.mitm").open("rb") as file:
        requests = list(recorded(list(io.FlowReader(file).stream())))
    texts = [message.text for asked in requests for message in asked.messages] + [repr(requests[0].tools)]
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|reserved {i}|>" for i in range(options.reserved)))
    tokenizer = make_tokenizer(QWEN, texts, special=special, vocab_size=8192 + options.reserved)
    renderer = Renderer(tokenizer)
    start = max(requests, key=lambda asked: len(asked.messages))
    words = [word for word in " ".join(texts).split() if "<" not in word]
    draw = random.Random(1)
    known, messages = Kept(), list(start.messages)
    renderer.render(start, known, max_tokens=10**9)
    took, worked, plain, read, lengths, unchanged = [], [], [], [], [], []
    before: tuple[int, ...] = ()
    for number in range(options.rounds):
        if len(messages) > MAX_MESSAGES:
            known, messages = Kept(), list(start.messages)
        asked = replace(start, messages=tuple(messages))
        said = " ".join(draw.choices(words, k=30))
        call = f'{said}\n<tool_call>\n{{"name": "read", "arguments": {{"path": "{number}"}}}}\n</tool_call><|im_end|>'
        ids = [id for word in call.split(" ") for id in tokenizer(f" {word}", add_special_tokens=False)["input_ids"]]
        began = time.perf_counter()
        reader = renderer.reader(asked)
        reader.feed(ids)
        reader.finish()
        read.append(time.perf_counter() - began)
        known.add(reader.message, ids)
        messages += [reader.message, result(" ".join(draw.choices(words, k=NEW_WORDS)))]
        asked = replace(start, messages=tuple(messages))

        began, clock = time.perf_counter(), time.thread_time()
        prompt = renderer.render(asked, known, max_tokens=10**9)
        took.append(time.perf_counter() - began)
        worked.append(time.thread_time() - clock)
        lengths.append(len(prompt.ids))
        unchanged.append(next((i for i, pair in enumerate(zip(before, prompt.ids, strict=False)) if pair[0] != pair[1]), len(before)))
        before = prompt.ids

        chat, tools = chat_of(asked.messages, renderer.abilities, {}), declared(asked)
        began = time.perf_counter()
        tokenizer.apply_chat_template(chat, tools=tools, add_generation_prompt=True)
        plain.append(time.perf_counter() - began)

    def ms(values: list[float]) -> str:
        ranked = sorted(values)
        return f"p50 {statistics.median(ranked) * 1e3:.1f} ms, p95 {ranked[int(0.95 * (len(ranked) - 1))] * 1e3:.1f} ms"

    print(f"prompts of {min(lengths):,} to {max(lengths):,} tokens, unchanged before them {statistics.median(unchanged):,.0f} (median)")
    print(f"renderer      {ms(took)}; of it on a processor {ms(worked)}")
    print(f"transformers  {ms(plain)}")
    print(f"reading {len(ids)} ids of a reply: {ms(read)}")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    return 0 if statistics.median(took) <= 0.010 else 1


if __name__ == "__main__":
    raise SystemExit(main())
