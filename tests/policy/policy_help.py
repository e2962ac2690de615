"""What the policy server's tests share: an engine and a policy server, each in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from metaclaw_core.routes import FLOW_HEADER, Heartbeat, read_heartbeat
from metaclaw_core.store import samplefile

TOKEN = "token-of-this-run"
SECONDS = 60.0


@dataclass(frozen=True)
class RunningEngine:
    url: str
    key: str
    model: str
    process: subprocess.Popen[str]


@dataclass
class RunningPolicy:
    """Asks as the proxy does."""

    home: Path
    process: subprocess.Popen[bytes]
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=SECONDS))

    def heartbeat(self) -> Heartbeat | None:
        return read_heartbeat(self.home)

    def wait_until(self, *, ready: bool = True, version: int | None = None) -> Heartbeat:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            beat = self.heartbeat()
            ours = beat is not None and beat.pid == self.process.pid
            if beat is not None and ours and beat.ready is ready and (version is None or version in beat.versions):
                return beat
            assert self.process.poll() is None, "the policy server has ended"
            time.sleep(0.05)
        raise AssertionError(f"no heartbeat with ready={ready}: {self.heartbeat()}")

    @property
    def url(self) -> str:
        beat = self.heartbeat()
        assert beat is not None
        return f"http://127.0.0.1:{beat.port}"

    def ask(self, path: str, body: dict[str, Any], flow: str, **headers: str) -> httpx.Response:
        return self.client.post(self.url + path, json=body, headers=self.headers(flow, **headers))

    def headers(self, flow: str, **more: str) -> dict[str, str]:
        named = {f"x-metaclaw-{name}": value for name, value in more.items()}
        return {"authorization": f"Bearer {TOKEN}", FLOW_HEADER: flow, "x-metaclaw-explore": "1", **named}

    def sample(self, flow: str) -> dict[str, Any]:
        """The row of the table `samples`, arrays unpacked; waits a moment for an answer that was broken off."""
        deadline = time.monotonic() + 10
        while True:
            rows = [row for _, row in samplefile.pending(self.home / "run" / samplefile.FILE, 10_000)]
            row = next((row for row in rows if row["flow_id"] == flow), None)
            if row is not None:
                break
            assert time.monotonic() < deadline, f"no sample of {flow}"
            time.sleep(0.05)
        if row["prompt_ids"] is not None:
            row["prompt_ids"] = samplefile.unpack_ids(row["prompt_ids"]).tolist()
            row["tokens"] = samplefile.unpack_ids(row["tokens"]).tolist()
            row["logprobs"] = samplefile.unpack_logprobs(row["logprobs"]).tolist()
        return row


def speak_words(folder: Path) -> None:
    """Let a model of `make_model` say ASCII letters and spaces only, and end after about a hundred.

    One number of each embedding is made the same and large, so the last layer has a constant to weigh: a bias per token.
    """
    import torch
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    said = {i: tokenizer.decode([i]) for i in range(len(tokenizer))}
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 5.0
        head = model.lm_head.weight
        head[:, 0] = -10.0
        for i, text in said.items():
            if text.isascii() and (text.isalpha() or text == " "):
                head[i, 0] = 0.0
        head[tokenizer.eos_token_id] = 0.0
        head[tokenizer.eos_token_id, 0] = -0.05
    model.save_pretrained(folder)


def close_rest(engine: RunningEngine) -> None:
    """The SDK keeps a RestClient's connections for the life of the process; pytest wants them closed at its end."""
    import tinker

    holder = tinker.RestClient(base_url=engine.url, api_key=engine.key).holder
    holder.run_coroutine_threadsafe(holder.aclose()).result(30)
    with warnings.catch_warnings():  # what a finished ServiceClient has left behind
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@contextlib.contextmanager
def running_engine(model: Path, home: Path, port: int = 0) -> Iterator[RunningEngine]:
    arguments = ["--model", str(model), "--port", str(port), "--device", "cpu", "--threads", "1", "--json"]
    code = "from metaclaw_core.cli.engine import command; command()"
    environment = {**os.environ, "METACLAW_HOME": str(home), "TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=sys.stderr, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the engine ended with {process.wait()}"
        ready = json.loads(line)
        yield RunningEngine(ready["url"], Path(ready["key_file"]).read_text().strip(), ready["model"], process)
    finally:
        process.kill()
        process.wait(timeout=30)
        if process.stdout:
            process.stdout.close()


@contextlib.contextmanager
def running_policy(engine: RunningEngine, home: Path, **settings: str) -> Iterator[RunningPolicy]:
    """Started as the proxy starts it. Yields at once; `wait_until` waits until it can sample."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("METACLAW_", "TINKER_"))}
    environment |= {
        "METACLAW_HOME": str(home),
        "METACLAW_RL_MODEL": engine.model,
        "METACLAW_RL_TINKER_BASE_URL": engine.url,
        "METACLAW_RL_TINKER_API_KEY": engine.key,
        "HF_HUB_OFFLINE": "1",
        **settings,
    }
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "metaclaw_core.policy", "--follow-stdin"],
        stdin=subprocess.PIPE,
        stderr=sys.stderr,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), **environment},
    )
    policy = RunningPolicy(home, process)
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps({"token": TOKEN}).encode() + b"\n")
        process.stdin.flush()
        yield policy
    finally:
        policy.client.close()
        process.kill()
        process.wait(timeout=30)
        if process.stdin:
            process.stdin.close()
