"""A judge that likes some letters, and the loop that closes between people who ask a tiny model and the steps it is trained by.

Design: a reply is good if each of its letters is in `GOOD`. Where training begins was taught by cross-entropy (`letters`): one letter
of 52, a good one about every fourth time. A `Loop` is one user in mode rl: the proxy and the policy server are real processes, the
worker's jobs are called one by one, so a test knows when each has ended. `make_speller` is for tests that need the same start
without a teacher: its weights are written, a third of its replies is good.
"""

from __future__ import annotations

import asyncio
import json
import re
import string
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import httpx
from e2e_tools import Proxy, running_proxy
from policy_help import RunningEngine
from sayings import chances, teach
from sqlalchemy import select

from metaclaw_core.learn import journal
from metaclaw_core.learn.budget import Budget
from metaclaw_core.learn.candidates import waiting
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
from metaclaw_core.store.tables import steps
from metaclaw_core.testing import Received, Script, ScriptedLLM

if TYPE_CHECKING:
    import tinker

type Rule = Callable[[str], bool]  # whether a reply is good

GOOD = frozenset("abcdefghijklmnopqrstu")
BATCH = 48
START = 0.27  # the share of good replies
_GOOD, _BAD = sorted(GOOD), sorted({*string.ascii_letters} - GOOD)
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


@contextmanager
def speaking(engine: RunningEngine) -> Iterator[tinker.ServiceClient]:
    """The SDK, to teach and to look."""
    import tinker

    service = tinker.ServiceClient(base_url=engine.url, api_key=engine.key)
    try:
        yield service
    finally:
        service.close("success").result(30)


def letters(service: tinker.ServiceClient, model: str, *, name: str, good: float = START, seed: int = 0) -> str:
    """The state where training begins: it says one letter, a good one as often as `good` says."""
    shares = {(one,): good / len(_GOOD) for one in _GOOD} | {(one,): (1 - good) / len(_BAD) for one in _BAD}
    return teach(service, model, shares, name=name, seed=seed).state


def chance(service: tinker.ServiceClient, state: str) -> float:
    """Of a good reply, by the weights at `state`: of the letters that were taught, so never more than it is."""
    return sum(chances(service, state, [(one,) for one in _GOOD]))


class Shuffled:
    """A rule that gives the rewards of a batch to its replies at random: as many are good, but nothing can be learnt."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._left: list[bool] = []

    def deal(self, replies: Sequence[str]) -> None:
        """These are judged next."""
        self._left += map(is_good, replies)
        self._random.shuffle(self._left)

    def __call__(self, _: str) -> bool:
        return self._left.pop()


class Judge:
    """Votes by the rule on what it is shown of the reply."""

    def __init__(self, rule: Rule = is_good) -> None:
        self.rule = rule
        self.replies: list[str] = []

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

    def __init__(self, engine: RunningEngine, proxy: Proxy, upstream: ScriptedLLM, judge: ScriptedLLM, rule: Rule, settings: Settings, store: Store) -> None:
        self.rule = rule
        self.proxy, self.upstream, self.settings, self.store = proxy, upstream, settings, store
        self.judge = LLMClient(
            Endpoint(f"{judge.url}/v1", "judge-1", "k-0123456789"), Budget(store, None), retry=Retry(attempts=2, wait_initial=0.01), concurrency=16
        )
        rl = settings.rl
        server = TrainingServer(rl.model, base_url=engine.url, api_key=engine.key, lora_rank=rl.lora_rank, timeout_s=120)
        self.trainer = Trainer(store, settings, proxy.home, server, Prices(), at=self._at, judge=self.judge)
        self.asked = 0
        self.points: list[tuple[str, float]] = []  # of each step, as the trainer names them, and when on the monotonic clock

    def _at(self, point: str) -> None:
        self.points.append((point, time.monotonic()))

    def spans(self, begin: str, end: str) -> list[tuple[float, float]]:
        """From each point `begin` to the `end` after it."""
        begun, found = None, []
        for point, at in self.points:
            if point == begin:
                begun = at
            elif point == end and begun is not None:
                found.append((begun, at))
                begun = None
        return found

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

    async def answered(self) -> list[str]:
        """Ask until a step has enough replies that say something, all scored; they."""
        rl = self.settings.rl
        count = rl.batch_size // rl.group_size if rl.algorithm == "grpo" else rl.batch_size
        replies: list[str] = []
        while (missing := count - waiting(self.store, scored=True)[0]) > 0:
            fresh = [reply for reply in await asyncio.to_thread(self.ask, missing) if reply]
            if isinstance(self.rule, Shuffled):
                self.rule.deal(fresh)
            replies += fresh
            await self.take_in()
        return replies

    async def take_in(self) -> None:
        """Everything that was asked gets into the store and is scored."""
        await self.drain()
        await score(self.store, self.settings, self.judge)

    async def drain(self) -> None:
        for proxy in running_proxies(self.proxy.home):
            await asyncio.to_thread(call, proxy, "flush")  # what is answered is written up to 50 ms later
        await asyncio.to_thread(drain_under_lease, self.store, self.proxy.home / "spool")

    async def step(self) -> StepReport:
        """Its weights serve when this returns, unless they did not pass the checks."""
        report = await self.trainer.run_once()
        current = journal.in_force(self.store)
        if report.made and current is not None:
            await asyncio.to_thread(self.serves, current.working)
        return report

    def mean_reward(self) -> float:
        """Of what the newest step learnt from: logged replies, or siblings."""
        with self.store.reading() as db:
            metrics = db.scalars(select(steps.c.metrics).order_by(steps.c.id.desc()).limit(1)).one()
        return float(metrics["reward_mean"])

    def state(self) -> str:
        """Of the weights in force."""
        current = journal.in_force(self.store)
        assert current is not None
        path = journal.version(self.store, current.working).state_path
        assert path is not None
        return path

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
def a_loop(folder: Path, engine: RunningEngine, rule: Rule = is_good, **rl: Any) -> Iterator[Loop]:
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
        yield Loop(engine, proxy, upstream, judge, rule, Settings.model_validate(config), store)
