"""The trainer killed at every point between two effects, with SIGKILL, by its worker's SIGTERM, and with the engine killed under it.

Each case starts from the same store and is carried on by another process. What must come out is what comes out of an
uninterrupted run: one route, each turn trained once, the same weights.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policy_help import RunningEngine, running_engine
from sqlalchemy import select
from training_help import answers, server, settings

from metaclaw_core.learn import journal
from metaclaw_core.routes import read_route
from metaclaw_core.settings import Settings
from metaclaw_core.store.db import open_store
from metaclaw_core.store.tables import route_events, step_turns, steps, turns, versions

pytestmark = [pytest.mark.local, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
TURNS, BATCH = 4, 2  # two steps
POINTS = (
    "opened", "claimed", "forward", "taught", "before step", "stepped", "state saved", "saved", "before publish",
    "weights saved", "published", "before checks", "checked", "decided", "route published", "done",
)  # fmt: skip
ENGINE_AT = ("claimed", "before step", "state saved", "weights saved")
STOPPED_AT = ("forward", "stepped", "saved", "published")


@dataclass
class Lab:
    engine: RunningEngine
    checkpoints: Path
    settings: Settings
    forks: subprocess.Popen[str]
    exits: ExitStack

    def ask(self, *homes: Path, kill_at: Sequence[int] = (), how: str = "kill") -> None:
        rl = self.settings.model_dump(mode="json")
        asked = [
            {"home": str(home), "kill_at": place, "how": how, "steps": 2, "settings": rl}
            for home, place in zip(homes, kill_at or [0] * len(homes), strict=True)
        ]
        assert self.forks.stdin is not None
        print(json.dumps(asked), file=self.forks.stdin, flush=True)

    def ended(self) -> list[int]:
        assert self.forks.stdout is not None
        return list(json.loads(self.forks.stdout.readline()))

    def run(self, *homes: Path, kill_at: Sequence[int] = (), how: str = "kill") -> list[int]:
        """Side by side; their exit statuses."""
        self.ask(*homes, kill_at=kill_at, how=how)
        return self.ended()

    def restart_engine(self) -> None:
        port = int(self.engine.url.rpartition(":")[2])
        self.engine.process.wait(30)
        self.engine = self.exits.enter_context(running_engine(Path(self.engine.model), self.checkpoints.parent, port))

    def weights(self, state_path: str) -> dict[str, Any]:
        from safetensors.numpy import load_file

        run, kind, name = state_path.removeprefix("tinker://").split("/")
        return load_file(self.checkpoints / run / kind / f"{name}.safetensors")


@contextmanager
def forks() -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("METACLAW_")}
    environment |= {"PYTHONPATH": str(ROOT), "TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("kill_tools.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def lab(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """An engine of its own, which is killed here and there."""
    home = tmp_path_factory.mktemp("killed-engine")
    with ExitStack() as exits:
        process = exits.enter_context(forks())
        engine = exits.enter_context(running_engine(tiny_model, home))
        rl = settings(engine, batch_size=BATCH, min_sessions=1, learning_rate=1e-3)
        yield Lab(engine, home / "engine", rl, process, exits)


@pytest.fixture(scope="module")
def begun(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with answers for two steps."""
    home = tmp_path_factory.mktemp("begun")
    where = server(lab.settings)

    async def fill() -> None:
        with open_store(home / "store.db") as store:
            rewards = iter([1.0, 0.0] * TURNS)
            await answers(store, where, None, TURNS, lambda _: next(rewards), sessions=2)
        await where.aclose()

    asyncio.run(fill())
    return home


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run, and where it stood after its first step."""

    home: Path
    between: Path
    weights: tuple[dict[str, Any], ...]  # after each step


@pytest.fixture(scope="module")
def whole(lab: Lab, begun: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    home = Path(shutil.copytree(begun, tmp_path_factory.mktemp("whole") / "home"))
    assert lab.run(home) == [0]
    told = json.loads((home / "told.json").read_text())
    assert told["points"] == [*POINTS, *POINTS]
    between = Path(shutil.copytree(begun, tmp_path_factory.mktemp("between") / "home"))
    # Killed where the next step begins: the first one is done with.
    assert lab.run(between, kill_at=[len(POINTS) + 1]) == [-signal.SIGKILL]
    states = states_of(home)
    first, second = (lab.weights(path) for path in states)
    assert differ(first, second) > 1e-4  # a step is seen
    assert differ(lab.weights(states_of(between)[0]), first) < 1e-6
    return Whole(home, between, (first, second))


def states_of(home: Path) -> list[str]:
    with open_store(home / "store.db") as store, store.reading() as db:
        return list(db.scalars(select(versions.c.state_path).where(versions.c.state_path.is_not(None)).order_by(versions.c.id)))


def differ(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name].astype(np.float64) - other[name]).max()) for name in one)


def check_cut(home: Path) -> None:
    """What a cut run left: nothing in between."""
    with open_store(home / "store.db") as store:
        with store.reading() as db:
            states = list(db.scalars(select(turns.c.state)))
            trained = list(db.scalars(select(step_turns.c.turn).where(step_turns.c.reason.is_(None)).join(steps).where(steps.c.state.not_in(("claimed", "abandoned")))))
        assert set(states) <= {"scored", "batched", "trained"}
        assert sorted(trained) == sorted(set(trained))
        assert len(journal.open_steps(store)) <= 1
        current = journal.in_force(store)
        assert current is not None
        for number in (current.working, current.stable):  # never a version whose state or weights are not saved
            version = journal.version(store, number)
            assert number == 1 or (version.state_path and version.sampler_path)
    route = read_route(home)
    assert route is not None
    assert {route.working, route.stable} <= {served.version for served in route.served}


def check_done(lab: Lab, home: Path, whole: Whole) -> None:
    with open_store(home / "store.db") as store:
        current = journal.in_force(store)
        assert current is not None
        assert journal.open_steps(store) == []
        with store.reading() as db:
            assert set(db.scalars(select(turns.c.state))) == {"trained"}
            assert db.scalar(select(route_events.c.id).order_by(route_events.c.id.desc()).limit(1)) == current.generation
            working = list(db.scalars(select(versions.c.id).where(versions.c.status == "working")))
            lineage: list[int] = []
            number: int | None = current.working
            while number is not None:
                row = db.execute(select(versions).where(versions.c.id == number)).one()
                lineage += list(db.scalars(select(step_turns.c.turn).where(step_turns.c.step == row.step, step_turns.c.reason.is_(None))))
                number = row.parent
        assert working == [current.working]
        assert sorted(lineage) == list(range(1, TURNS + 1))  # each once, none lost
        version = journal.version(store, current.working)
    route = read_route(home)
    assert route is not None
    assert (route.generation, route.working, route.stable) == (current.generation, current.working, 1)
    assert version.state_path is not None
    assert differ(lab.weights(version.state_path), whole.weights[1]) < 1e-6


def carried_on(lab: Lab, whole: Whole, *homes: Path) -> None:
    for home in homes:
        check_cut(home)
        with open_store(home / "store.db") as store, store.transaction() as db:
            db.exec_driver_sql("DELETE FROM leases")
    assert lab.run(*homes) == [0] * len(homes)
    for home in homes:
        check_done(lab, home, whole)
        shutil.rmtree(home)


def copies(of: Path, names: Sequence[str], tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(of, tmp_path / name.replace(" ", "-"))) for name in names]


@pytest.mark.parametrize("second", [False, True], ids=["first step", "second step"])
def test_killed_at_each_point_a_step_is_made_once_and_is_the_same(lab: Lab, begun: Path, whole: Whole, second: bool, tmp_path: Path):
    homes = copies(whole.between if second else begun, POINTS, tmp_path)
    for some in (slice(0, 8), slice(8, 16)):
        places = list(range(1, len(POINTS) + 1))[some]
        assert lab.run(*homes[some], kill_at=places) == [-signal.SIGKILL] * len(places)
        carried_on(lab, whole, *homes[some])


def test_stopped_by_the_worker_a_step_is_undone_or_carried_on(lab: Lab, begun: Path, whole: Whole, tmp_path: Path):
    """SIGTERM cancels the job at its next wait and ends orderly."""
    homes = copies(begun, STOPPED_AT, tmp_path)
    assert lab.run(*homes, kill_at=[POINTS.index(name) + 1 for name in STOPPED_AT], how="stop") == [0] * len(STOPPED_AT)
    for home in homes:
        assert json.loads((home / "told.json").read_text())["said"][-1] == "stopped"
        with open_store(home / "store.db") as store, store.reading() as db:
            assert "claimed" not in set(db.scalars(select(steps.c.state)))  # nothing waits for the next start
    carried_on(lab, whole, *homes)


@pytest.mark.parametrize("name", ENGINE_AT)
def test_an_engine_that_is_killed_and_comes_back_costs_no_turn(lab: Lab, whole: Whole, name: str, tmp_path: Path):
    [home] = copies(whole.between, [name], tmp_path)
    lab.ask(home, kill_at=[POINTS.index(name) + 1], how=str(lab.engine.process.pid))
    deadline = time.monotonic() + 60
    while not (home / "engine-gone").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lab.restart_engine()
    (home / "engine-gone").unlink()
    assert lab.ended() == [0]
    check_done(lab, home, whole)
