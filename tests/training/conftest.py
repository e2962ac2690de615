"""One engine for all tests of this folder; a home with answers of its tiny model to train on."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from policy_help import RunningEngine, close_rest, running_engine

if TYPE_CHECKING:
    from between_help import Between, Lane

@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from metaclaw_core.engine.testing import make_model

    model = make_model(tmp_path_factory.mktemp("tiny") / "model", stops=True)
    gc.collect()
    gc.freeze()  # what torch has made stays: looking through it after each test takes more than half a second
    return model


@pytest.fixture(scope="session")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    with running_engine(tiny_model, tmp_path_factory.mktemp("engine-home")) as running:
        yield running
        close_rest(running)


@pytest.fixture(scope="session")
def begun(engine: RunningEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with four answers of the base model in its store. Copy it."""
    from guard_help import begin

    home = tmp_path_factory.mktemp("begun")
    begin(engine, home)
    return home


@pytest.fixture(scope="session")
def lanes(engine: RunningEngine) -> Iterator[Between]:
    from between_help import between

    with between(engine) as running:
        yield running


@pytest.fixture
def proxy(lanes: Between) -> Iterator[Lane]:
    with lanes.lane() as lane:
        yield lane


@pytest.fixture
def lab(engine: RunningEngine, proxy: Lane, begun: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes a `guard_help.Lab`."""
    from guard_help import labs

    with labs(engine, proxy, begun, tmp_path) as make:
        yield make


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    gc.collect()  # what the SDK left open ends in the test that opened it, not in a later one
