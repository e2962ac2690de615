"""One engine and one policy server for all tests of this folder that need them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from policy_help import RunningEngine, RunningPolicy, close_rest, running_engine, running_policy, speak_words


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It answers with letters that mean nothing, some 100 of them, and ends by itself."""
    from metaclaw_core.engine.testing import make_model

    folder = make_model(tmp_path_factory.mktemp("chat") / "model", context=2048, stops=True)
    speak_words(folder)
    return folder


@pytest.fixture(scope="session")
def engine(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    with running_engine(chat_model, tmp_path_factory.mktemp("engine-home")) as running:
        yield running
        close_rest(running)


@pytest.fixture(scope="session")
def policy(engine: RunningEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPolicy]:
    with running_policy(engine, tmp_path_factory.mktemp("policy-home")) as running:
        running.wait_until()
        yield running


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
