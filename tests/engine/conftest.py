"""One engine process for all tests of this folder, on a tiny random-weight model; skipped where torch is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_help import Client, RunningEngine


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from metaclaw_core.engine.testing import make_model

    return make_model(tmp_path_factory.mktemp("tiny") / "model")


def close_rest(engine: RunningEngine) -> None:
    """The SDK keeps a RestClient's connections for the life of the process; pytest wants them closed at its end."""
    holder = engine.rest().holder
    holder.run_coroutine_threadsafe(holder.aclose()).result(30)


@pytest.fixture(scope="session")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    """The real command in a process of its own."""
    home = tmp_path_factory.mktemp("engine-home")
    arguments = ["--model", str(tiny_model), "--port", "0", "--device", "cpu", "--threads", "1", "--json"]
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
        key = Path(ready["key_file"]).read_text().strip()
        running = RunningEngine(ready["url"], key, ready["model"], home / "engine")
        yield running
        close_rest(running)
    finally:
        process.terminate()
        process.wait(timeout=30)
        if process.stdout:
            process.stdout.close()


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def client(engine: RunningEngine) -> Iterator[Client]:
    service = engine.service()
    yield Client(service, engine.model)
    service.close("success").result(60)
