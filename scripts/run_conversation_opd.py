#!/usr/bin/env python3
"""On-policy distillation on conversations: the student answers them, a teacher says what it thinks of each token.

    python scripts/run_conversation_opd.py --engine                        nothing else is needed: a tiny model learns
    python scripts/run_conversation_opd.py SOURCE --model BASE --teacher-url http://HOST:8000/v1 --teacher-model NAME

SOURCE is what the student is asked: a metaclaw home (its recorded turns), a capture (mitmproxy's -w, HAR), or JSONL with
{"messages": […]} or {"instruction": …} a line; without it, a few questions. The student is rl.model at rl.tinker_base_url
(Tinker's cloud, or an engine), the teacher any /v1/completions that echoes logprobs of token ids. What no flag names comes from the
settings (~/.metaclaw/config.yaml, METACLAW_*), the keys always do: METACLAW_RL_TINKER_API_KEY, METACLAW_OPD_TEACHER_API_KEY.
--engine starts a local engine for what is missing: the student on a tiny random-weight model (or on --model), and a teacher
that is the same model with a LoRA. The tiny model is asked no more of a conversation than the human's last words.

A step samples fresh replies from the weights of now, asks the teacher for the same ids, and makes one optimiser step on
-kl_penalty_coef * (log p_student - log p_teacher). Every fourth conversation is held out; on those (32 prompts at most)
KL(student || teacher) is estimated before and after, from replies of the student of then: nats per token, with the standard error.

Limits: replies are cut at --max-tokens and trained on all the same, as a token's value does not depend on the reply's end. The
trained state stays on a server that is not ours and its path is printed (for rl.resume_from_ckpt); no store and no route is
touched. A home whose store is a PostgreSQL is not read, nor what still lies in a home's spool.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx
import numpy as np
from opd_conversations import Asked, Prompts, conversations, last_words, prompts_of, told

from metaclaw_core.errors import ConfigError, MetaClawError
from metaclaw_core.learn.batch import Datum, Float32, Sample, build, with_advantages
from metaclaw_core.learn.endpoint import Endpoint
from metaclaw_core.learn.losses import prepare
from metaclaw_core.learn.opd import CLIP, aligned, opd_advantages
from metaclaw_core.learn.teacher import Teacher
from metaclaw_core.settings import Settings, load_settings

MEASURED = 32  # held-out prompts, at most
TINY_RATE, TINY_TOKENS, TINY_CONTEXT = 7e-3, 16, 4096  # of the tiny model
TEACHER_SAYS = " Of course. Here is what I would do first."


# --- the local engine -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def engine(model: str | None) -> Iterator[tuple[str, str, str]]:
    """URL, key and model of an engine that ends with the block. Raises ConfigError."""
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            from transformers.utils.logging import disable_progress_bar

            from metaclaw_core.engine.testing import make_model

            disable_progress_bar()
            model = str(make_model(Path(folder) / "model", stops=True, context=TINY_CONTEXT))
        code = "from metaclaw_core.cli.main import main; main()"
        log = Path(folder) / "engine.log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", code, "engine", "--model", model, "--port", "0", "--json"],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "METACLAW_HOME": folder},
                cwd=Path(__file__).resolve().parents[1],
            )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                said = log.read_text(errors="replace").strip().splitlines()
                raise ConfigError(f"The local engine did not start: {said[-1].removeprefix('metaclaw: ') if said else 'it said nothing'}")
            ready = json.loads(line)
            yield ready["url"], Path(ready["key_file"]).read_text().strip(), ready["model"]
        finally:
            process.terminate()
            process.wait()


def make_teacher(url: str, key: str, model: str, prompts: Sequence[tuple[int, ...]], tokenizer: Any) -> str:
    """The student's base with a LoRA that leans to one answer; the path of its weights."""
    import tinker
    from tinker import types

    service = tinker.ServiceClient(base_url=url, api_key=key)
    training = service.create_lora_training_client(model, rank=4, seed=7).result(600)
    said = tokenizer.encode(TEACHER_SAYS, add_special_tokens=False)
    data = []
    for prompt in prompts[:32]:
        full = [*prompt, *said]
        weights = np.asarray([0.0] * (len(prompt) - 1) + [1.0] * len(said), dtype=np.float32)
        inputs: Any = {"target_tokens": np.asarray(full[1:], dtype=np.int64), "weights": weights}
        data.append(types.Datum(model_input=types.ModelInput.from_ints(full[:-1]), loss_fn_inputs=inputs))
    for _ in range(6):
        training.forward_backward(data, "cross_entropy").result(600)
        training.optim_step(types.AdamParams(learning_rate=5e-3, eps=1e-8, grad_clip_norm=1.0)).result(600)
    path = str(training.save_weights_for_sampler("teacher", ttl_seconds=86_400).result(600).path)
    service.close("success").result(30)
    return path


# --- distilling -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Said:
    """Replies of the student with the teacher's word on each token."""

    datums: tuple[Datum, ...]
    teacher: tuple[Float32, ...]  # (N,) each
    dropped: int  # replies that the teacher says nothing of
    problem: str | None  # the last reason


class Distilling:
    def __init__(self, server: Any, teacher: Teacher, stop_ids: Sequence[int], max_tokens: int) -> None:
        self._server, self._teacher, self._stop_ids, self._max_tokens = server, teacher, stop_ids, max_tokens
        self._numbers = 0

    async def said(self, path: str | None, prompts: Sequence[tuple[int, ...]], replies: int) -> Said:
        """Fresh replies of the weights at `path`. Raises ServerError, LLMUnavailable, LLMRefused."""
        asked = (self._server.sample(path, p, n=replies, max_tokens=self._max_tokens, stop_ids=self._stop_ids) for p in prompts)
        samples = [
            self._sample(prompt, reply)
            for prompt, found in zip(prompts, await asyncio.gather(*asked), strict=True)
            for reply in found
            if reply.tokens
        ]
        datums = build(samples)
        taught = await asyncio.gather(*(self._teacher.score(d.full.tolist()) for d in datums))
        values = [None if t.logprobs is None else aligned(t.logprobs, d.targets.size) for d, t in zip(datums, taught, strict=True)]
        good = [(d, v) for d, v in zip(datums, values, strict=True) if v is not None]
        problem = next((t.problem for t in reversed(taught) if t.problem), None)
        return Said(tuple(d for d, _ in good), tuple(v for _, v in good), len(datums) - len(good), problem)

    def _sample(self, prompt: tuple[int, ...], reply: Any) -> Sample:
        self._numbers += 1
        return Sample(
            turn=self._numbers, session=f"s{self._numbers}", split_by=f"s{self._numbers}", human_turn=None, klass="A",
            prompt_ids=np.asarray(prompt, dtype=np.int32), tokens=np.asarray(reply.tokens, dtype=np.int32),
            logprobs=reply.logprobs, version=0, stop_reason="stop" if reply.stopped else "length", reward=None, malformed=False,
            redacted=False, created_at=time.time(), cluster="", agent="",
        )  # fmt: skip

    async def kl(self, path: str | None, prompts: Sequence[tuple[int, ...]], replies: int) -> tuple[float, float]:
        """KL(student ‖ teacher), nats per token, and its standard error (over replies)."""
        found = _whole(await self.said(path, prompts, replies))
        differences = [
            (d.logprobs - t)[part.span].astype(np.float64) for d, t in zip(found.datums, found.teacher, strict=True) for part in d.parts
        ]
        mean = float(np.concatenate(differences).mean())
        size = np.mean([one.size for one in differences])
        spread = np.std([(one - mean).sum() / size for one in differences])
        return mean, float(spread / np.sqrt(len(differences)))

    async def step(self, path: str | None, prompts: Sequence[tuple[int, ...]], replies: int, beta: float, rate: float) -> dict[str, Any]:
        found = _whole(await self.said(path, prompts, replies))
        present = await self._server.forward(found.datums)
        each = [opd_advantages(d, s, t, beta=beta) for d, s, t in zip(found.datums, present, found.teacher, strict=True)]
        flat = np.concatenate([values for one in each for values in one.values()])
        kl = np.concatenate([(s - t)[p.span] for d, s, t in zip(found.datums, present, found.teacher, strict=True) for p in d.parts])
        call = prepare([with_advantages(d, one) for d, one in zip(found.datums, each, strict=True)], present)
        if call is None:
            raise ConfigError("There is nothing to learn: student and teacher say the same, or opd.kl_penalty_coef is 0.")
        await self._server.step(call, rate)
        return {
            "kl": round(float(kl.mean()), 4), "advantage": round(float(flat.mean()), 4), "advantage_abs": round(float(np.abs(flat).mean()), 4),
            "clipped": round(float((np.abs(flat) >= CLIP).mean()), 4), "tokens": call.tokens, "dropped": found.dropped,
        }  # fmt: skip


def _whole(said: Said) -> Said:
    if not said.datums:
        raise ConfigError(f"The teacher's answers can't be used for any reply: {said.problem or 'all of them are empty'}")
    return said


# --- the run --------------------------------------------------------------------------------------------------------------


async def run(options: argparse.Namespace, settings: Settings, asked: Sequence[Asked]) -> None:
    from metaclaw_core.learn.trainer import TrainingServer

    rl, opd = settings.rl, settings.opd
    tell = _Teller(options.json)
    server = TrainingServer(rl.model, base_url=rl.tinker_base_url or None, api_key=rl.tinker_api_key or None, lora_rank=rl.lora_rank)
    try:
        tokenizer = await server.tokenizer()
        prompts = prompts_of(asked, tokenizer, options.max_prompt_tokens)
        name = opd.teacher_model
        if _own_teacher(options):
            name = await asyncio.to_thread(make_teacher, rl.tinker_base_url, rl.tinker_api_key, rl.model, prompts.learnt_from, tokenizer)
            endpoint = Endpoint(f"{rl.tinker_base_url}/oai/api/v1", name, rl.tinker_api_key)
        else:
            endpoint = Endpoint(opd.teacher_url, name, opd.teacher_api_key.strip())
        async with Teacher(endpoint) as teacher:
            await teacher.check(tokenizer)
            counts = {"learnt_from": len(prompts.learnt_from), "held_out": len(prompts.held_out), "left_out": dict(prompts.left_out)}
            tell(student=rl.model, teacher=name, **counts)
            distilling = Distilling(server, teacher, prompts.stop_ids, options.max_tokens)
            await distil(distilling, server, options, settings.opd.kl_penalty_coef, prompts, tell)
    finally:
        await server.aclose()


async def distil(
    distilling: Distilling, server: Any, options: argparse.Namespace, beta: float, prompts: Prompts, tell: _Teller
) -> None:
    measured = prompts.held_out[:MEASURED]
    before, error = await distilling.kl(None, measured, options.replies)
    tell(kl_before=round(before, 4), standard_error=round(error, 4))
    await server.open(None)
    path, turning = None, cycle(prompts.learnt_from)
    for number in range(1, options.steps + 1):
        began = time.monotonic()
        some = list(islice(turning, options.conversations))
        row = await distilling.step(path, some, options.replies, beta, options.learning_rate)
        path = await server.save_weights(f"opd-{number}", 86_400)
        tell(step=number, **row, seconds=round(time.monotonic() - began, 2))
    after, error = await distilling.kl(path, measured, options.replies)
    row: dict[str, Any] = {"kl_after": round(after, 4), "standard_error": round(error, 4), "kl_before": round(before, 4)}
    if not options.engine:  # whose folder goes with it
        row["state"] = await server.save_state(f"opd-{secrets.token_hex(4)}")
    tell(**row)


class _Teller:
    """One line for each thing that happens, or one JSON object."""

    def __init__(self, as_json: bool) -> None:
        self._json = as_json

    def __call__(self, **row: Any) -> None:
        print(json.dumps(row) if self._json else "  ".join(f"{name} {_figure(value)}" for name, value in row.items() if value != {}), flush=True)


def _figure(value: Any) -> str:
    if isinstance(value, Mapping):
        return told(value)
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, metavar="SOURCE")
    parser.add_argument("--engine", action="store_true", help="start a local engine for what is not given")
    parser.add_argument("--model", help="the student's base model (default: rl.model)")
    parser.add_argument("--tinker-url", help="where it is trained (default: rl.tinker_base_url, else Tinker's cloud)")
    parser.add_argument("--teacher-url", help="default: opd.teacher_url")
    parser.add_argument("--teacher-model", help="default: opd.teacher_model")
    parser.add_argument("--kl-penalty-coef", type=float, help="default: opd.kl_penalty_coef")
    parser.add_argument("--steps", type=_positive, default=20)
    parser.add_argument("--conversations", type=_positive, default=12, help="of one step")
    parser.add_argument("--replies", type=_positive, default=8, help="to each")
    parser.add_argument("--max-tokens", type=_positive, help=f"of a reply (default: 256; the tiny model: {TINY_TOKENS})")
    parser.add_argument("--max-prompt-tokens", type=_positive, help="longer ones are shortened or left out (default: 8192, tiny: 512)")
    parser.add_argument("--learning-rate", type=float, help="default: rl.learning_rate, else 2e-5; the tiny model: 7e-3")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("it must be 1 or more")
    return value


def _settings(options: argparse.Namespace, **rl: Any) -> Settings:
    """The settings with the flags over them. Raises ConfigError for what is missing or wrong."""
    flags = {"model": options.model, "tinker_base_url": options.tinker_url} | rl
    opd = {"teacher_url": options.teacher_url, "teacher_model": options.teacher_model, "kl_penalty_coef": options.kl_penalty_coef}
    return load_settings({name: {k: v for k, v in of.items() if v is not None} for name, of in (("rl", flags), ("opd", opd))})


def _own_teacher(options: argparse.Namespace) -> bool:
    return bool(options.engine and not options.teacher_url)


def _check(options: argparse.Namespace, settings: Settings) -> None:
    rl, opd = settings.rl, settings.opd
    if missing := [n for n in ("torch", "tinker", "transformers") if (options.engine or n != "torch") and not _installed(n)]:
        raise ConfigError(f"{', '.join(missing)} must be installed: pip install 'metaclaw-mitmproxy[rl{',local' if options.engine else ''}]'.")
    if options.engine and options.tinker_url:
        raise ConfigError("--engine starts a training server of its own: leave --tinker-url out, or --engine.")
    if not _own_teacher(options) and bool(opd.teacher_url) != bool(opd.teacher_model):
        raise ConfigError("A teacher has both a --teacher-url (such as http://HOST:8000/v1) and a --teacher-model.")
    if options.engine:
        return
    if not rl.model:
        raise ConfigError("No student is named: give --model, set rl.model, or try it with --engine.")
    if not opd.teacher_url:
        raise ConfigError("No teacher is named: give --teacher-url and --teacher-model, or try it with --engine.")
    if not (rl.tinker_api_key or os.environ.get("TINKER_API_KEY")):
        raise ConfigError("The training server wants a key: set METACLAW_RL_TINKER_API_KEY (or TINKER_API_KEY), or try it with --engine.")


def _reach(url: str) -> None:
    """Raises ConfigError where nothing answers: the SDK would try again for minutes."""
    try:
        httpx.get(url, timeout=10)
    except (httpx.HTTPError, httpx.InvalidURL) as e:
        raise ConfigError(f"The training server at {url} can't be reached ({e}): is the engine running, is the URL right?") from e


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def _fill_in(options: argparse.Namespace, settings: Settings, *, tiny: bool) -> None:
    options.max_tokens = options.max_tokens or (TINY_TOKENS if tiny else 256)
    options.max_prompt_tokens = options.max_prompt_tokens or (TINY_CONTEXT // 2 if tiny else 8192)
    options.learning_rate = options.learning_rate or (TINY_RATE if tiny else settings.rl.learning_rate or 2e-5)


def main(words: Sequence[str] | None = None) -> int:
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    logging.getLogger("tinker").setLevel(logging.ERROR)
    options = _parser().parse_args(words)
    try:
        settings = _settings(options)
        _check(options, settings)
        asked = conversations(options.source)
        if not options.engine:
            if settings.rl.tinker_base_url:
                _reach(settings.rl.tinker_base_url)
            _fill_in(options, settings, tiny=False)
            asyncio.run(run(options, settings, asked))
            return 0
        with engine(options.model) as (url, key, model):
            tiny = options.model is None
            _fill_in(options, settings, tiny=tiny)
            asyncio.run(run(options, _settings(options, model=model, tinker_base_url=url, tinker_api_key=key), last_words(asked) if tiny else asked))
    except MetaClawError as e:
        print(f"run_conversation_opd: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
