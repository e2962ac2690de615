"""Worker, engine and policy server killed with SIGKILL at the points between two effects of a step; the worker stopped by SIGTERM, too.

One store goes through all kills of a kind, one after the other: what a kill left is looked at, then the next process carries it on to
the next point. What comes out in the end must be what comes out of an uninterrupted run: one route, each turn trained once, the same
weights. Training goes on from a state (rl.resume_from_ckpt), so the beginning is among the points.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from kill_tools import PAUSED
from policy_help import TOKEN, RunningEngine, RunningPolicy, close_rest
from sqlalchemy import func, select
from training_help import answers, server, settings

from metaclaw_core.learn import journal
from metaclaw_core.learn.losses import Call, Inputs
from metaclaw_core.routes import read_route
from metaclaw_core.settings import Settings
from metaclaw_core.store.db import open_store
from metaclaw_core.store.samplefile import FILE, pending, unpack_ids, unpack_logprobs
from metaclaw_core.store.tables import route_events, step_turns, steps, turns, versions

pytestmark = [pytest.mark.local, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
TURNS, BATCH = 4, 2  # two steps
POINTS = (
    "opened", "claimed", "forward", "taught", "before step", "stepped", "state saved", "saved", "before publish",
    "weights saved", "published", "before checks", "checked", "decided", "route published", "done",
)  # fmt: skip
STOPPED_AT = ("forward", "stepped", "saved", "published")
ENGINE_AT = ("claimed", "before step", "stepped", "state saved", "weights saved", "before checks")
POLICY_AT = ("claimed", "stepped", "saved", "published", "decided", "done")


class Forks:
    """A process of `kill_tools`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._stdin, self._stdout = process.stdin, process.stdout

    def tell(self, asked: object) -> None:
        assert self._stdin is not None
        print(json.dumps(asked), file=self._stdin, flush=True)

    def wait_ready(self) -> None:
        assert self._stdout is not None
        assert self._stdout.readline() == "ready\n"

    def answer(self) -> Any:
        assert self._stdout is not None
        return json.loads(self._stdout.readline())


@contextmanager
def forks(*arguments: str) -> Iterator[Forks]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("METACLAW_")}
    environment |= {"PYTHONPATH": str(ROOT), "TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("kill_tools.py")), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield Forks(process)
        finally:
            process.kill()


@dataclass
class Forked:
    """A server that was forked: what `RunningPolicy` needs of a process."""

    pid: int

    def poll(self) -> int | None:
        """None: it runs, or nobody has looked since it ended."""
        return None

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class Lab:
    """An engine in a process of its own, and trainers in theirs."""

    def __init__(self, model: Path, home: Path, trainers: Forks, servers: Forks) -> None:
        self._model, self._home, self._trainers, self._servers = model, home, trainers, servers
        self._port = 0
        self.pid = 0
        self.engine = self.start_engine()
        self.settings: Settings = settings(self.engine, batch_size=BATCH, min_sessions=1, learning_rate=1e-3)

    def start_engine(self) -> RunningEngine:
        says = self._home / "says.json"
        says.unlink(missing_ok=True)
        arguments = ["--model", str(self._model), "--port", str(self._port), "--device", "cpu", "--threads", "1", "--json"]
        environment = {"METACLAW_HOME": str(self._home)}
        self._servers.tell({"engine": {"arguments": arguments, "environment": environment, "says": str(says)}})
        self.pid = self._servers.answer()
        deadline = time.monotonic() + 60
        while not (says.exists() and says.read_text().endswith("\n")):
            assert time.monotonic() < deadline, "the engine does not listen"
            time.sleep(0.01)
        ready = json.loads(says.read_text())
        self._port = int(ready["url"].rpartition(":")[2])
        return RunningEngine(ready["url"], Path(ready["key_file"]).read_text().strip(), ready["model"], None)  # type: ignore[arg-type]

    def kill_engine(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.start_engine()

    def start_policy(self, home: Path) -> RunningPolicy:
        environment = {
            "METACLAW_HOME": str(home),
            "METACLAW_RL_MODEL": self.engine.model,
            "METACLAW_RL_TINKER_BASE_URL": self.engine.url,
            "METACLAW_RL_TINKER_API_KEY": self.engine.key,
        }
        self._servers.tell({"policy": {"environment": environment, "token": TOKEN}})
        return RunningPolicy(home, Forked(self._servers.answer()))  # type: ignore[arg-type]

    def ask(self, *homes: Path, kills: Sequence[Sequence[str]] = (), how: str = "kill") -> None:
        said = self.settings.model_dump(mode="json")
        self._trainers.tell([
            {"home": str(home), "kills": list(at), "how": how, "steps": 2, "settings": said}
            for home, at in zip(homes, kills or [()] * len(homes), strict=True)
        ])  # fmt: skip

    def ended(self) -> list[int]:
        return list(self._trainers.answer())

    def run(self, *homes: Path, kills: Sequence[Sequence[str]] = (), how: str = "kill") -> list[int]:
        """Side by side; their exit statuses."""
        self.ask(*homes, kills=kills, how=how)
        return self.ended()

    def run_pausing(self, home: Path, points: Sequence[str], act: Callable[[str], None]) -> None:
        """One trainer, which waits at each of `points` until `act` is done."""
        self.ask(home, kills=[points], how="pause")
        for _ in points:
            deadline = time.monotonic() + 60
            while not (home / PAUSED).exists():
                assert time.monotonic() < deadline, "the trainer does not come to the point"
                time.sleep(0.01)
            act(json.loads((home / PAUSED).read_text() or '"?"'))
            (home / PAUSED).unlink()
        assert self.ended() == [0]

    def weights(self, state_path: str) -> dict[str, Any]:
        from safetensors.numpy import load_file

        run, kind, name = state_path.removeprefix("tinker://").split("/")
        return load_file(self._home / "engine" / run / kind / f"{name}.safetensors")


@pytest.fixture(scope="module")
def lab(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with ExitStack() as exits:
        processes = [exits.enter_context(forks(*arguments)) for arguments in ((), ("servers",))]
        for process in processes:
            process.wait_ready()
        made = Lab(tiny_model, tmp_path_factory.mktemp("killed-engine"), *processes)
        yield made
        close_rest(made.engine)


@pytest.fixture(scope="module")
def begun(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with answers for two steps, of the state that training goes on from."""
    home = tmp_path_factory.mktemp("begun")
    where = server(lab.settings)

    async def fill() -> str:
        await where.open(None)
        ids, ones = np.array([10, 11, 12, 13]), np.ones(3, dtype=np.float32)
        await where.step(Call("importance_sampling", {}, (Inputs(ids[:-1].astype(np.int32), ids[1:], -ones, ones),), 3, 0.0), 1e-3)
        state, weights = await where.save_state("start"), await where.save_weights("start")
        with open_store(home / "store.db") as store:
            rewards = iter([1.0, 0.0] * TURNS)
            await answers(store, where, weights, TURNS, lambda _: next(rewards), sessions=2)
        await where.aclose()
        return state

    state = asyncio.run(fill())
    lab.settings = lab.settings.model_copy(update={"rl": lab.settings.rl.model_copy(update={"resume_from_ckpt": state})})
    return home


@pytest.fixture(scope="module")
def whole(lab: Lab, begun: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The weights after each step of an uninterrupted run."""
    home = Path(shutil.copytree(begun, tmp_path_factory.mktemp("whole") / "home"))
    assert lab.run(home) == [0]
    told = json.loads((home / "told.json").read_text())
    assert told["points"] == ["resumed", *POINTS, *POINTS], told["said"][0]
    first, second = (lab.weights(path) for path in states_of(home))
    assert differ(first, second) > 1e-4  # a step is seen
    return [first, second]


def states_of(home: Path) -> list[str]:
    """Of the versions that were trained, by their ids."""
    with open_store(home / "store.db") as store, store.reading() as db:
        return list(db.scalars(select(versions.c.state_path).where(versions.c.parent.is_not(None)).order_by(versions.c.id)))


def differ(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name].astype(np.float64) - other[name]).max()) for name in one)


def check_cut(home: Path, name: str) -> None:
    """What a cut run left at the point `name`: nothing in between."""
    with open_store(home / "store.db") as store:
        with store.reading() as db:
            states = list(db.scalars(select(turns.c.state)))
            ended = steps.c.state.not_in(("claimed", "abandoned"))
            trained = list(db.scalars(select(step_turns.c.turn).where(step_turns.c.reason.is_(None)).join(steps).where(ended)))
        assert set(states) <= {"scored", "batched", "trained"}, name
        assert sorted(trained) == sorted(set(trained)), name
        assert states.count("trained") == len(trained), name
        assert len(journal.open_steps(store)) <= 1, name
        current = journal.in_force(store)
        if name == "resumed":
            assert current is None
            return
        assert current is not None, name
        for number in (current.working, current.stable):  # never a version whose state or weights are not saved
            version = journal.version(store, number)
            assert version.state_path, name
            assert version.sampler_path, name
    route = read_route(home)
    assert route is not None, name
    assert {route.working, route.stable} <= {served.version for served in route.served}, name


def check_done(lab: Lab, home: Path, whole: Sequence[dict[str, Any]]) -> None:
    with open_store(home / "store.db") as store:
        current = journal.in_force(store)
        assert current is not None
        assert journal.open_steps(store) == []
        with store.reading() as db:
            assert set(db.scalars(select(turns.c.state))) == {"trained"}
            assert db.scalar(select(func.max(route_events.c.id))) == current.generation
            working = list(db.scalars(select(versions.c.id).where(versions.c.status == "working")))
            lineage: list[int] = []
            number: int | None = current.working
            while number is not None:
                row = db.execute(select(versions).where(versions.c.id == number)).one()
                lineage += list(db.scalars(select(step_turns.c.turn).where(step_turns.c.step == row.step, step_turns.c.reason.is_(None))))
                number = row.parent
        assert working == [current.working]
        assert sorted(lineage) == list(range(1, TURNS + 1))  # each once, none lost
    route = read_route(home)
    assert route is not None
    assert (route.generation, route.working, route.stable) == (current.generation, current.working, 1)
    states = states_of(home)
    assert len(states) == 2  # nothing was saved twice
    for path, expected in zip(states, whole, strict=True):
        assert differ(lab.weights(path), expected) < 1e-6


def test_a_worker_that_is_killed_at_each_point_makes_the_same_steps_once(lab: Lab, begun: Path, whole: list[dict[str, Any]], tmp_path: Path):
    """33 kills in three stores, side by side. In each step a store is killed at every third point up to the decision, and at one after
    it: what follows the decision is not done again."""
    ends = POINTS[-3:]
    homes = [Path(shutil.copytree(begun, tmp_path / name.replace(" ", "-"))) for name in ends]
    plans: list[list[str]] = [[], [], []]
    for points in (("resumed", *POINTS[:-3]), POINTS[:-3]):
        for n, plan in enumerate(plans):
            plan += [*points[n::3], ends[n]]
    assert sum(map(len, plans)) == 33
    for at in zip_longest(*plans):
        there = [(home, name) for home, name in zip(homes, at, strict=True) if name is not None]
        statuses = lab.run(*(home for home, _ in there), kills=[[name] for _, name in there])
        assert statuses == [-signal.SIGKILL] * len(there), there
        for home, name in there:
            check_cut(home, name)
    assert lab.run(*homes) == [0, 0, 0]
    for home in homes:
        check_done(lab, home, whole)


def test_a_worker_that_is_stopped_undoes_a_step_or_leaves_it_to_be_carried_on(lab: Lab, begun: Path, whole: list[dict[str, Any]], tmp_path: Path):
    """SIGTERM cancels the job at its next wait and ends orderly."""
    home = Path(shutil.copytree(begun, tmp_path / "stopped"))
    for name in STOPPED_AT:
        assert lab.run(home, kills=[[name]], how="stop") == [0], name
        assert json.loads((home / "told.json").read_text())["said"][-1] == "stopped", name
        check_cut(home, name)
        with open_store(home / "store.db") as store, store.reading() as db:
            assert "claimed" not in set(db.scalars(select(steps.c.state))), name  # nothing waits for the next start
    assert lab.run(home) == [0]
    check_done(lab, home, whole)


def test_an_engine_that_is_killed_and_comes_back_costs_no_turn(lab: Lab, begun: Path, whole: list[dict[str, Any]], tmp_path: Path):
    """It comes back without what it had in memory: sessions, models, samplers."""
    home = Path(shutil.copytree(begun, tmp_path / "engine"))

    def act(name: str) -> None:
        lab.kill_engine()
        check_cut(home, name)

    lab.run_pausing(home, ENGINE_AT, act)
    check_done(lab, home, whole)


def test_a_policy_server_that_is_killed_answers_again_by_the_route_and_loses_no_answer(lab: Lab, begun: Path, whole: list[dict[str, Any]], tmp_path: Path):
    """Each time with an answer on its way: that one may be lost, never a part of it kept."""
    home = Path(shutil.copytree(begun, tmp_path / "policy"))
    policy = lab.start_policy(home)
    answered: dict[str, int] = {}  # the version that each flow was answered by

    def asked(flow: str, tokens: int) -> int:
        body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": tokens}
        with suppress(httpx.HTTPError):
            return policy.ask("/v1/chat/completions", body, flow).status_code
        return 0

    def act(name: str) -> None:
        nonlocal policy
        current = read_route(home)  # at "decided" the store is ahead of it
        assert current is not None
        for when in ("before", "after"):
            beat = policy.wait_until(version=current.working)
            assert set(beat.versions) >= {current.working, current.stable}
            assert asked(f"{when} {name}", 16) == 200
            answered[f"{when} {name}"] = current.working
            if when == "before":
                cut = threading.Thread(target=asked, args=(f"cut at {name}", 400))
                cut.start()
                time.sleep(0.05)
                policy.process.kill()
                cut.join(30)
                policy.client.close()
                policy = lab.start_policy(home)
        check_cut(home, name)

    lab.run_pausing(home, POLICY_AT, act)
    policy.process.kill()
    policy.client.close()
    check_done(lab, home, whole)
    rows = {row["flow_id"]: row for _, row in pending(home / "run" / FILE, 1_000)}
    assert {flow: row["version"] for flow, row in rows.items() if not flow.startswith("cut")} == answered
    assert sum(flow.startswith("cut") for flow in rows) < len(POLICY_AT)  # some were cut indeed
    for row in rows.values():
        assert len(unpack_ids(row["tokens"])) == len(unpack_logprobs(row["logprobs"])) == row["length"] > 0
    assert set(answered.values()) == {1, 2}, answered
