"""A tiny model, the engine that trains and samples it, and answers it gave: what the measurements of mode rl work on.

    python scripts/tiny_engine.py model FOLDER SIZES    writes a model of random weights, without a download
    python scripts/tiny_engine.py answers HOME          lets the engine of that home answer, and puts it into the store, scored

Design: `TinyEngine` is a real ``metaclaw engine`` in a process of its own, on one thread of the processor and always on the same
port, so it may be killed and started again. What needs torch or the SDK runs in processes that end: the one that measures loads
neither. The model takes tools and says a few letters; the longer half of its answers is rewarded, so there is something to learn.

Limits: needs the extras rl and local (`missing`). The answers of one prompt are put into the store many times over, as if so many
people had got them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests/policy")]

SAMPLED, SESSIONS = 32, 64


def missing() -> str | None:
    """What has to be installed first, for people; None: nothing."""
    names = [name for name in ("torch", "tinker", "transformers", "starlette", "uvicorn") if find_spec(name) is None]
    return f"{', '.join(names)} missing: pip install 'metaclaw-mitmproxy[rl,local]'" if names else None


def write_tiny(folder: Path, **sizes: int) -> Path:
    """A model of `engine.testing.make_model`'s sizes that says letters, made in a process of its own. With a `vocab_size` its
    tokenizer knows words of the load and of the skills, else bytes only."""
    subprocess.run([sys.executable, __file__, "model", str(folder), json.dumps(sizes)], check=True, env=quiet(), capture_output=True)
    return folder


def answers(home: Path, environment: Mapping[str, str]) -> None:
    """Fill the store of `home`, whose settings name a running engine."""
    subprocess.run([sys.executable, __file__, "answers", str(home)], check=True, env=quiet(environment), stdout=subprocess.DEVNULL)


def quiet(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    return {**environment, "TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}


class TinyEngine:
    """``with TinyEngine(model, folder) as engine``: it is ready. `process` is another one after `start`."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self._folder = model, folder
        self._log = folder.with_suffix(".log")
        self.port = 0
        self.process: subprocess.Popen[str] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Of the section `rl`: how it is reached."""
        return {"model": str(self.model), "tinker_base_url": f"http://127.0.0.1:{self.port}", "tinker_api_key": (self._folder / "key").read_text().strip()}

    def start(self) -> None:
        """Returns once it serves. Raises RuntimeError where it ends before."""
        command = [str(Path(sys.executable).with_name("metaclaw")), "engine", "--model", str(self.model), "--port", str(self.port)]
        command += ["--device", "cpu", "--threads", "1", "--prefix-cache-mb", "256", "--dir", str(self._folder), "--json"]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=quiet())
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine ended with {self.process.wait()}: {self._log.read_text()[-2000:]}")
        self.port = int(json.loads(line)["url"].rpartition(":")[2])

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    def cpu_seconds(self) -> float:
        import psutil

        return 0.0 if self.process is None else float(sum(psutil.Process(self.process.pid).cpu_times()[:2]))

    def sleep(self) -> None:
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        self._signal(signal.SIGCONT)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Of one that sleeps otherwise."""
        self.wake()
        yield
        self.sleep()

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()


# --- in a process of its own ----------------------------------------------------------------------


def write_model(folder: Path, sizes: Mapping[str, int]) -> None:
    """The last layer gets a constant to weigh, the first number of each embedding: letters only, and an end after some fifteen."""
    import random
    import string

    import torch
    from bench_hooks import prose
    from render_help import MARKS, QWEN
    from tokenizers import AddedToken
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    from metaclaw_core.engine.testing import make_model

    texts = [file.read_text(encoding="utf-8") for file in sorted((ROOT / "skills").glob("*/SKILL.md"))]
    texts += [prose(random.Random(n), 5_000) for n in range(50)]
    make_model(folder, stops=True, spread=0.05, template=QWEN, texts=texts if "vocab_size" in sizes else (), **sizes)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])  # of a call and of reasoning
    torch.manual_seed(0)
    model: Any = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        head = model.lm_head.weight
        model.model.embed_tokens.weight[:, 0] = 5.0
        head[:, 0] = -10.0
        for token in range(len(tokenizer)):
            if tokenizer.decode([token]) in tuple(string.ascii_letters):
                head[token, 0] = 0.0
        head[tokenizer.eos_token_id] = 0.0
        head[tokenizer.eos_token_id, 0] = 0.25
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_answers(home: Path, count: int = 3_000, prompt_tokens: int = 480) -> None:
    import asyncio

    from sqlalchemy import insert

    from metaclaw_core.learn import journal
    from metaclaw_core.learn.trainer import TrainingServer
    from metaclaw_core.settings import load_settings
    from metaclaw_core.store.db import open_store
    from metaclaw_core.store.samplefile import pack_ids, pack_logprobs
    from metaclaw_core.store.tables import samples, sessions, turns

    rl = load_settings().rl

    async def sampled() -> list[Any]:
        server = TrainingServer(rl.model, base_url=rl.tinker_base_url, api_key=rl.tinker_api_key, lora_rank=rl.lora_rank)
        try:
            tokenizer = await server.tokenizer()
            stop = [tokenizer.eos_token_id]
            replies = await server.sample(None, prompt, n=SAMPLED, max_tokens=64, stop_ids=stop)
            return [reply for reply in replies if reply.stopped and len(reply.tokens) > 0]
        finally:
            await server.aclose()

    prompt = [10 + n % 200 for n in range(prompt_tokens)]
    replies = asyncio.run(sampled())
    middle = sorted(len(reply.tokens) for reply in replies)[len(replies) // 2]
    with open_store(home / "store.db") as store:
        version = journal.begin(store, rl.model, None, None, None)
        now = time.time() - 3600
        rows = {
            sessions: [{"id": f"s{n}", "principal": "p", "session_id": f"s{n}", "generated": False, "agent": "openclaw", "first_at": now, "last_at": now} for n in range(SESSIONS)],
            turns: [
                {"flow_id": f"f{n}", "content_key": f"k{n}", "session": f"s{n % SESSIONS}", "principal": "p", "kind": "main", "dialect": "openai_chat", "scheme": "http",
                 "host": "h", "port": 80, "path": "/", "redacted": False, "retry": False, "attempts": 0, "live": True, "state": "scored", "agent": "openclaw",
                 "version": version.id, "started_at": now + n / 10, "reward": float(len(replies[n % len(replies)].tokens) > middle)}
                for n in range(count)
            ],
            samples: [
                {"flow_id": f"f{n}", "created_at": now + n / 10, "version": version.id, "base_model": rl.model, "tokenizer": rl.model, "klass": "A",
                 "sampling": {"temperature": 1.0, "max_tokens": 64}, "reused": 0, "segments": 1, "stop_reason": "stop", "malformed": False, "redacted": False,
                 "prompt_ids": pack_ids(prompt), "prompt_length": len(prompt), "tokens": pack_ids(reply.tokens), "length": len(reply.tokens),
                 "logprobs": pack_logprobs(reply.logprobs.tolist())}
                for n in range(count)
                for reply in (replies[n % len(replies)],)
            ],
        }  # fmt: skip
        with store.transaction() as db:
            for table, values in rows.items():
                db.execute(insert(table), values)


def main() -> None:
    what, place, *more = sys.argv[1:]
    if what == "model":
        write_model(Path(place), json.loads(more[0]))
    else:
        write_answers(Path(place))


if __name__ == "__main__":
    main()
