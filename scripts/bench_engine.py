#!/usr/bin/env python3
"""The engine's speed against plain transformers and peft: python scripts/bench_engine.py [--size small|half-b] [--device …]

Measured through the real SDK, long poll included, on a random-weight model made here: sampling 128 tokens after a
prompt of 512, one request at a time against `generate` and eight at once against one at a time; forward_backward on
8 × 512 tokens against the same loss in a PyTorch loop with peft. Prompts are new each time, so nothing is reused.
Rounds alternate between the two sides and medians are compared, because machines are rarely quiet; on one shared
with others --cpu-time (Linux, with --threads 1) compares the processor seconds of both processes instead.
Needs the extras rl and local, and peft.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metaclaw_core.engine.lora import ALPHA
from metaclaw_core.engine.testing import make_model

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 2, "hidden": 64, "intermediate": 128, "vocab_size": 1000},
    "small": {"layers": 8, "hidden": 384, "intermediate": 1024, "heads": 6, "kv_heads": 2, "vocab_size": 8192},
    "half-b": {"layers": 24, "hidden": 1024, "intermediate": 3072, "heads": 16, "kv_heads": 8, "vocab_size": 151_936},
}
PROMPT, NEW, ROWS, RANK = 512, 128, 8, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", context=2048, spread=0.02, **SIZES[options.size])
        with engine(model, options, Path(folder)) as (url, key, pid):
            clock = (lambda: processor_seconds(pid)) if options.cpu_time else time.perf_counter
            report(options, *measure(model, options, url, key, clock))


@contextmanager
def engine(model: Path, options: argparse.Namespace, home: Path) -> Iterator[tuple[str, str, int]]:
    code = "from metaclaw_core.cli.engine import command; command()"
    flags = ["--model", str(model), "--port", "0", "--json", "--device", options.device, "--dtype", options.dtype]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags, "--threads", str(options.threads)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "METACLAW_HOME": str(home), "HF_HUB_OFFLINE": "1"},
    )
    try:
        assert process.stdout
        ready = json.loads(process.stdout.readline())
        yield ready["url"], Path(ready["key_file"]).read_text().strip(), process.pid
    finally:
        process.terminate()
        process.wait()


def processor_seconds(pid: int) -> float:
    """Of this process and of `pid`."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return time.process_time() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


type Times = dict[str, list[float]]


def measure(
    model: Path, options: argparse.Namespace, url: str, key: str, clock: Callable[[], float]
) -> tuple[Times, int]:
    os.environ["TINKER_TELEMETRY"] = "0"
    import peft
    import tinker
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if options.dtype == "fp32" else torch.bfloat16
    plain: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(options.device).eval()
    size = sum(p.numel() for p in plain.parameters())
    vocabulary = plain.config.vocab_size
    random = np.random.default_rng(0)
    service = tinker.ServiceClient(base_url=url, api_key=key)
    training = service.create_lora_training_client(str(model), rank=RANK).result()
    base_sampler = service.create_sampling_client(base_model=str(model)).result()
    path = training.save_weights_for_sampler("now").result().path
    sampler = service.create_sampling_client(model_path=path).result()

    def prompts(count: int) -> list[list[int]]:
        return [random.integers(3, vocabulary, PROMPT).tolist() for _ in range(count)]

    def ask(client: Any, prompt: list[int]) -> Any:
        return client.sample(tinker.ModelInput.from_ints(prompt), 1, tinker.SamplingParams(max_tokens=NEW, stop=[]))

    def generate() -> None:
        ids = torch.tensor(prompts(1), device=options.device)
        with torch.inference_mode():
            plain.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, top_k=0, attention_mask=torch.ones_like(ids))

    def eight_at_once() -> None:
        for future in [ask(sampler, prompt) for prompt in prompts(ROWS)]:
            future.result()

    def one_at_a_time() -> None:
        for prompt in prompts(ROWS):
            ask(sampler, prompt).result()

    batch = random.integers(3, vocabulary, (ROWS, PROMPT + 1))
    weights = np.ones(PROMPT, dtype=np.float32)
    data = [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(row[:-1].tolist()),
            loss_fn_inputs={"target_tokens": row[1:].astype(np.int64), "weights": weights},  # type: ignore[dict-item]
        )
        for row in batch
    ]
    adapted: Any = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(options.device),
        peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]),
    )
    tensor = torch.from_numpy(batch).to(options.device)

    def peft_loop() -> None:
        logits = adapted(input_ids=tensor[:, :-1], use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tensor[:, 1:].flatten(), reduction="sum")
        loss.backward()
        float(loss.detach())

    def forward_backward() -> None:
        training.forward_backward(data, "cross_entropy").result()

    sides: dict[str, Callable[[], None]] = {
        "generate": generate,
        "engine base": lambda: ask(base_sampler, prompts(1)[0]).result() and None,
        "engine lora": lambda: ask(sampler, prompts(1)[0]).result() and None,
        "one at a time": one_at_a_time,
        "eight at once": eight_at_once,
        "peft loop": peft_loop,
        "forward_backward": forward_backward,
    }
    times: Times = {name: [] for name in sides}
    for turn in range(options.rounds + 1):
        for name, run in sides.items():
            started = clock()
            run()
            if turn:  # the first round warms up
                times[name].append(clock() - started)
    service.close("success").result()
    return times, size


def report(options: argparse.Namespace, times: Times, size: int) -> None:
    median = {name: statistics.median(values) for name, values in times.items()}
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"{options.threads} CPU threads"
    kind = "processor seconds" if options.cpu_time else "seconds"
    print(f"{size / 1e6:.1f} M parameters, {options.dtype}, {where}, {options.rounds} rounds, medians of {kind}\n")
    rows = [
        ("transformers generate, batch 1", NEW / median["generate"], "tokens/s"),
        ("engine, base model", NEW / median["engine base"], "tokens/s"),
        ("engine, LoRA", NEW / median["engine lora"], "tokens/s"),
        ("engine, 8 requests one at a time", ROWS * NEW / median["one at a time"], "tokens/s"),
        ("engine, 8 requests at once", ROWS * NEW / median["eight at once"], "tokens/s"),
        ("peft loop, 8 × 512", ROWS * PROMPT / median["peft loop"], "tokens/s"),
        ("engine forward_backward, 8 × 512", ROWS * PROMPT / median["forward_backward"], "tokens/s"),
    ]
    for name, value, unit in rows:
        print(f"{name:36} {value:10.1f} {unit}")
    print()
    for name, ratio, target in (
        ("engine / generate (base model)", median["generate"] / median["engine base"], 0.9),
        ("eight at once / one at a time", median["one at a time"] / median["eight at once"], 3.0),
        ("forward_backward / peft loop", median["peft loop"] / median["forward_backward"], 0.9),
    ):
        print(f"{name:36} {ratio:6.2f} ×  (target {target} ×)")


if __name__ == "__main__":
    main()
