"""A tiny model that says a few letters and ends, a judge that likes some of them, and the loop that closes between the two.

The reply is good if each of its letters is in `GOOD`. At the start about a third are: a letter is drawn from 53, and after each
one the reply ends with a chance of about a third.
"""

from __future__ import annotations

import asyncio
import json
import re
import string
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from e2e_tools import Proxy, running_proxy
from policy_help import RunningEngine
from sqlalchemy import func, select

from metaclaw_core.learn.budget import Budget
from metaclaw_core.learn.endpoint import Endpoint
from metaclaw_core.learn.llm import LLMClient, Retry
from metaclaw_core.learn.prices import Prices
from metaclaw_core.learn.scoring import score
from metaclaw_core.learn.trainer import TrainingServer
from metaclaw_core.learn.training import StepReport, Trainer
from metaclaw_core.proxy.control import call, running_proxies
from metaclaw_core.settings import Settings
from metaclaw_core.store.db import open_store
from metaclaw_core.store.drain import drain_under_lease
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import turns
from metaclaw_core.testing import Received, Script, ScriptedLLM

GOOD = frozenset("abcdefghijklmnopqrstu")
BATCH = 48
SCRIPT = """
from metaclaw_core.proxy.addon import MetaClaw
addons = [MetaClaw(worker=False, policy="metaclaw_core.policy")]
"""


def is_good(reply: str) -> bool:
    letters = reply.strip()
    return bool(letters) and set(letters) <= GOOD


def make_speller(folder: Path) -> Path:
    """The model: letters and the end of a reply only, and no end before the first letter."""
    import torch
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    from metaclaw_core.engine.testing import make_model

    make_model(folder, context=512, stops=True, spread=0.05)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (newline,) = tokenizer.encode("\n", add_special_tokens=False)
    with torch.no_grad():
        words, head = model.model.embed_tokens.weight, model.lm_head.weight
        words[:, 0], words[:, 1] = 5.0, 0.0  # a constant, and "the reply begins here"
        words[newline, 1] = 5.0
        head[:, 0], head[:, 1] = -10.0, 0.0
        for token in range(len(tokenizer)):
            if tokenizer.decode([token]) in string.ascii_letters and len(tokenizer.decode([token])) == 1:
                head[token, 0] = 0.0
        head[tokenizer.eos_token_id] = 0.0
        head[tokenizer.eos_token_id, 0], head[tokenizer.eos_token_id, 1] = 0.6, -4.0
    model.save_pretrained(folder)
    return folder


class Judge:
    """Votes by the rule on what it is shown of the reply."""

    def __init__(self, rule: Callable[[str], bool] = is_good) -> None:
        self.rule, self.replies = rule, []

    def __call__(self, received: Received) -> Script:
        shown = received.json()["messages"][-1]["content"]
        reply = said_in(shown)
        self.replies.append(reply)
        return Script(text=json.dumps({"reason": "by rule", "score": 1 if self.rule(reply) else -1}))


def said_in(transcript: str) -> str:
    """The reply in what a judge is shown: the text of the last section that the agent wrote."""
    sections = re.split(r"(?m)^.*\b[0-9a-f]{8,}\b.*$\n?", transcript)
    heads = re.findall(r"(?m)^.*\b[0-9a-f]{8,}\b.*$", transcript)
    found = [text for head, text in zip(heads, sections[1:], strict=False) if re.search(r"agent|assistant|reply|action", head, re.IGNORECASE)]
    return found[-1].strip() if found else ""


class Loop:
    """One user in rl mode: asks, and lets the jobs run between."""

    def __init__(self, engine: RunningEngine, proxy: Proxy, upstream: ScriptedLLM, judge: ScriptedLLM, settings: Settings, store: Store) -> None:
        self.proxy, self.upstream, self.settings, self.store = proxy, upstream, settings, store
        self.judge = LLMClient(
            Endpoint(f"{judge.url}/v1", "judge-1", "k-0123456789"), Budget(store, None), retry=Retry(attempts=2, wait_initial=0.01), concurrency=16
        )
        rl = settings.rl
        server = TrainingServer(rl.model, base_url=engine.url, api_key=engine.key, lora_rank=rl.lora_rank, timeout_s=120)
        self.trainer = Trainer(store, settings, proxy.home, server, Prices())
        self.asked = 0

    def ask(self, count: int = BATCH, *, off: bool = False) -> list[str]:
        """So many people at once, each with a question of his own; the replies."""
        first, self.asked = self.asked, self.asked + count
        with httpx.Client(proxy=self.proxy.url, trust_env=False, timeout=60) as client, ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda n: self._one(client, n, off), range(first, first + count)))

    def _one(self, client: httpx.Client, n: int, off: bool) -> str:
        body = {"model": "m", "max_tokens": 24, "messages": [{"role": "user", "content": f"Spell {n}"}]}
        headers = {"traceparent": f"00-{n + 1:032x}-2222222222222222-01", "authorization": "Bearer sk-user-0123456789"}
        if off:
            headers["x-metaclaw"] = "off"
        answer = client.post(f"{self.upstream.url}/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        said: str = answer.json()["choices"][0]["message"]["content"] or ""
        return said

    async def learn(self) -> StepReport:
        """Everything that was asked is taken in and scored, then a step is made; its weights serve when this returns."""
        await asyncio.to_thread(drain_under_lease, self.store, self.proxy.home / "spool")
        await score(self.store, self.settings, self.judge)
        report = await self.trainer.run_once()
        if report.version is not None:
            await asyncio.to_thread(self.serves, report.version)
        return report

    def mean_reward(self, last: int = BATCH) -> float:
        """Of the newest scored turns."""
        newest = select(turns.c.reward).where(turns.c.reward.is_not(None), turns.c.version.is_not(None)).order_by(turns.c.id.desc()).limit(last)
        with self.store.reading() as db:
            return float(db.scalar(select(func.avg(newest.subquery().c.reward))) or 0.0)

    def serves(self, version: int) -> None:
        """Wait until the proxy gives new turns to `version`."""
        deadline = time.monotonic() + 30
        while True:
            found = next((call(proxy, "status")["route"] for proxy in running_proxies(self.proxy.home)), None)
            if found and found["ready"] and found["working"] == version and version in found["versions"]:
                return
            assert time.monotonic() < deadline, f"version {version} does not serve: {found}\n{self.proxy.output()[-2000:]}"
            time.sleep(0.05)

    async def aclose(self) -> None:
        await self.judge.aclose()
        await self.trainer.aclose()


@contextmanager
def a_loop(folder: Path, engine: RunningEngine, rule: Callable[[str], bool] = is_good, **rl: Any) -> Iterator[Loop]:
    home = folder / "metaclaw"
    home.mkdir(mode=0o700, parents=True)
    values = {
        "model": engine.model, "tinker_base_url": engine.url, "tinker_api_key": engine.key, "lora_rank": 8, "batch_size": BATCH,
        "min_sessions": 4, "learning_rate": 1e-2, "support_share": 0, "control_share": 0, "warmup_turns": 0,
    }  # fmt: skip
    config = {"mode": "rl", "rl": values | rl, "judge": {"patience": 0, "votes": 1}, "skills": {"enabled": False, "auto_evolve": False}}
    (home / "config.yaml").write_text(json.dumps(config))
    (folder / "rl.py").write_text(SCRIPT)
    with (
        ScriptedLLM(lambda _: Script(text="upstream")) as upstream,
        ScriptedLLM(Judge(rule)) as judge,
        open_store(home / "store.db") as store,
        running_proxy(folder, "-s", str(folder / "rl.py")) as proxy,
    ):
        yield Loop(engine, proxy, upstream, judge, Settings.model_validate(config), store)
