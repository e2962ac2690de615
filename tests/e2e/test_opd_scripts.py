"""The two scripts that show distillation, run as a user types them: what they say of wrong input, and that they do it.

The student is a tiny model that says a few words and ends, however long the prompt: so the turns of an agent can be trained on.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from e2e_tools import ROOT, environment
from openclaw_tools import KIT, RecordingLLM, WithoutGateway
from policy_help import RunningEngine, close_rest, running_engine
from taught_model import make_untaught

from metaclaw_core.proxy.control import running_proxies
from metaclaw_core.testing import Script, ScriptedLLM

pytestmark = [pytest.mark.local, pytest.mark.slow]

CONVERSATION, OPENCLAW_SH = str(ROOT / "scripts/run_conversation_opd.py"), str(ROOT / "scripts/run_openclaw_tinker_opd.sh")
NEEDED = ("--model", "m", "--teacher-url", "http://127.0.0.1:9/v1", "--teacher-model", "t")


def run(home: Path, *words: str, seconds: float = 110, **env: str) -> subprocess.CompletedProcess[str]:
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *words] if words[0].endswith(".py") else list(words)
    whole = {k: v for k, v in environment(home).items() if not k.startswith("TINKER_")} | {"TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=whole | env, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "No student is named: give --model, set rl.model, or try it with --engine."),
        (["--model", "m"], "No teacher is named: give --teacher-url and --teacher-model, or try it with --engine."),
        (["--model", "m", "--teacher-model", "t"], "A teacher has both a --teacher-url (such as http://HOST:8000/v1) and a --teacher-model."),
        (NEEDED, "The training server wants a key: set METACLAW_RL_TINKER_API_KEY (or TINKER_API_KEY), or try it with --engine."),
        (["--engine", "nowhere"], "nowhere is not there: name a metaclaw home, a capture or a JSONL file."),
        (["--engine", str(ROOT / "README.md")], "is neither a mitmproxy capture nor a HAR file (Invalid data format.). Conversations in JSONL"),
        (["--engine", str(ROOT / "tests")], "is no metaclaw home, it has no store.db: name a home, a capture or a JSONL file."),
    ],
)
def test_distilling_conversations_says_in_one_sentence_what_is_wrong(tmp_path: Path, words: list[str], said: str) -> None:
    done = run(tmp_path / "home", CONVERSATION, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("run_conversation_opd: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--colour"], "--colour is no option; --help shows all of them."),
        (["--steps", "0"], "--steps 0 is no whole number from 1 on."),
        (["--model"], "--model needs a value; --help shows all options."),
        ([], "No student is named: give --model, the base model to train."),
        (["--model", "m"], "No teacher is named: give --teacher-url (such as http://HOST:8000/v1) and --teacher-model."),
        (NEEDED, "The training server wants a key: set METACLAW_RL_TINKER_API_KEY or TINKER_API_KEY."),
    ],
)
def test_the_whole_path_says_in_one_sentence_what_is_wrong(tmp_path: Path, words: list[str], said: str) -> None:
    done = run(tmp_path / "home", OPENCLAW_SH, *words)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"run_openclaw_tinker_opd: {said}\n")


def test_a_tiny_model_comes_nearer_to_its_teacher_with_nothing_else_at_hand(tmp_path: Path) -> None:
    asked = tmp_path / "asked.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"What is on page {n}?"}, {"role": "assistant", "content": "Text."}]} for n in range(8)]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(tmp_path / "home", CONVERSATION, str(asked), "--engine", "--steps", "6", "--json")
    assert done.returncode == 0, done.stderr
    first, before, *steps, last = map(json.loads, done.stdout.splitlines())
    assert (first["learnt_from"], first["held_out"]) == (6, 2)
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert all(row["dropped"] == 0 and row["advantage"] < 0 for row in steps)
    assert last["kl_before"] == before["kl_before"]
    assert last["kl_after"] < 0.5 * last["kl_before"], done.stdout


@dataclass(frozen=True)
class Taught:
    """An engine, and weights on it that lean to a few words."""

    engine: RunningEngine
    teacher: str

    def options(self) -> list[str]:
        engine = self.engine
        return ["--model", engine.model, "--tinker-url", engine.url, "--teacher-url", f"{engine.url}/oai/api/v1", "--teacher-model", self.teacher]

    def keys(self) -> dict[str, str]:
        key = self.engine.key
        return {"METACLAW_RL_TINKER_API_KEY": key, "METACLAW_OPD_TEACHER_API_KEY": key, "METACLAW_RL_LORA_RANK": "4"}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Taught]:
    folder = tmp_path_factory.mktemp("student")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TINKER_TELEMETRY", "0")
        with running_engine(make_brief(folder / "model"), folder / "engine") as engine:
            yield Taught(engine, make_teacher(engine))
            close_rest(engine)


def make_brief(folder: Path) -> Path:
    """A model that says lower-case words only, about eight of them, whatever it is asked."""
    import torch
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    make_untaught(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = {i: tokenizer.decode([i]) for i in range(len(tokenizer))}
    said = [i for i, text in texts.items() if text.isascii() and text.strip().isalpha() and text.islower()]
    with torch.no_grad():
        head = model.lm_head.weight
        head[:, 0] = -10.0
        head[said, 0] = 0.0
        head[tokenizer.eos_token_id, 0] = 1.0
    model.save_pretrained(folder)
    return folder


def make_teacher(engine: RunningEngine) -> str:
    """The path of its weights."""
    import tinker
    from tinker import types

    service = tinker.ServiceClient(base_url=engine.url, api_key=engine.key)
    training = service.create_lora_training_client(engine.model, rank=4, seed=7).result(60)
    tokenizer = training.get_tokenizer()
    ids = tokenizer.encode("user\nRead the notes.", add_special_tokens=False) + tokenizer.encode(" the same words as ever", add_special_tokens=False)
    weights = np.ones(len(ids) - 1, dtype=np.float32)
    inputs: Any = {"target_tokens": np.asarray(ids[1:], dtype=np.int64), "weights": weights}
    datum = types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=inputs)
    for _ in range(6):
        training.forward_backward([datum], "cross_entropy").result(60)
        training.optim_step(types.AdamParams(learning_rate=5e-3, eps=1e-8)).result(60)
    path: str = training.save_weights_for_sampler("teacher", ttl_seconds=3600).result(60).path
    service.close("success").result(60)
    return path


def test_a_student_and_a_teacher_at_given_addresses_are_used(tmp_path: Path, taught: Taught) -> None:
    few = ("--steps", "2", "--conversations", "8", "--replies", "4", "--max-tokens", "8", "--learning-rate", "5e-3", "--json")
    done = run(tmp_path / "home", CONVERSATION, *taught.options(), *few, **taught.keys())
    assert done.returncode == 0, done.stderr
    first, _, one, two, last = map(json.loads, done.stdout.splitlines())
    assert (first["student"], first["teacher"]) == (taught.engine.model, taught.teacher)
    assert one["kl"] > 0
    assert two["tokens"] > 100
    assert last["state"].startswith("tinker://")


def test_a_teacher_that_the_address_does_not_have_is_named(tmp_path: Path, taught: Taught) -> None:
    options = [*taught.options()[:-1], "tinker://none/sampler_weights/none"]
    done = run(tmp_path / "home", CONVERSATION, *options, **taught.keys())
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("run_conversation_opd: The teacher at 127.0.0.1:")
    assert done.stderr.count("\n") == 1


def whole_path(home: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The script; its proxy ends with it, or here where it had to be killed."""
    try:
        return run(home, OPENCLAW_SH, *words, **env)
    finally:
        for proxy in running_proxies(home):
            os.kill(proxy.pid, signal.SIGTERM)


def tasks(folder: Path, count: int) -> str:
    folder.mkdir()
    (folder / "tasks.jsonl").write_text("".join(json.dumps({"task_id": f"t{n}", "instruction": f"Say word {n}."}) + "\n" for n in range(count)))
    return str(folder)


def test_without_openclaw_the_built_in_loop_is_what_is_learnt_from(tmp_path: Path, taught: Taught) -> None:
    llm = {"METACLAW_LLM_MODEL_ID": "m", "METACLAW_LLM_API_KEY": "sk-test-0"}
    with ScriptedLLM(lambda _: Script(text="upstream")) as upstream:
        llm["METACLAW_LLM_API_BASE"] = f"{upstream.url}/v1"
        done = whole_path(
            tmp_path / "home", *taught.options(), "--steps", "1", "--batch", "4", "--tasks", tasks(tmp_path / "tasks", 4),
            PATH=_path_without_openclaw(), **taught.keys(), **llm,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert not upstream.received  # every turn was the student's
    assert "OpenClaw is not installed: the built-in loop asks llm.* in its place." in done.stderr
    assert "working version 2, stable version 1 (step 1)" in done.stdout
    assert "samples    4 of class A" in done.stdout


@pytest.mark.openclaw
def test_the_real_openclaw_is_answered_by_a_student_that_is_distilled(tmp_path: Path, taught: Taught) -> None:
    with RecordingLLM() as llm:
        stage = WithoutGateway(tmp_path / "stage", llm)
        stage.make_home()
        own = ("HTTP_PROXY", "HTTPS_PROXY", "NODE_EXTRA_CA_CERTS", "METACLAW_HOME")  # for the script to set
        env = {name: value for name, value in stage.agent_env().items() if name not in own}
        env["PATH"] = f"{KIT / 'node_modules/.bin'}:{os.environ['PATH']}"
        done = whole_path(
            stage.home, *taught.options(), "--steps", "1", "--batch", "1", "--tasks", tasks(tmp_path / "tasks", 1),
            "--openclaw-model", "exloop/fake-1", **env, **taught.keys(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert [message for message in llm.received if message.dialect != "other"] == []
    assert "1 done; results in " in done.stderr
    assert "round 1: 1 of 1 steps are made; KL(student || teacher) of the last batch: 0." in done.stderr
    assert "working version 2, stable version 1 (step 1)" in done.stdout


def _path_without_openclaw() -> str:
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not shutil.which("openclaw", path=folder))
