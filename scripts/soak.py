"""Traffic for a long time while everything goes wrong: `scripts/soak`.

    scripts/soak --minutes 60 --turns 1000000      # the long form: an hour on a store of a million turns
    scripts/soak --minutes 5
    scripts/soak --minutes 30 --mode rl            # and with a policy server, a trainer and an engine
    .venv/bin/python scripts/soak.py --short       # what the test-suite runs: every fault once, under a minute

A real `metaclaw start` with its worker and a judge, clients in all five dialects, slow-loris clients, bodies of captures that
were damaged, bodies of 64 MB. Beside that one fault after the other, in random order, with a pause between them (`FAULTS`).
A proxy that was killed is started again, as a service manager would. At the end everything is stopped in order and
check_invariants.py, a program of its own, compares what the clients wrote down with the store.

In mode rl most requests go to the policy server, a worker trains on what was scored of its answers, and both ask a real ``metaclaw
engine`` with a tiny model. Policy server and engine are killed and stopped as well (`RL_FAULTS`); at the end the one must serve and
the other train again.

What a kill may take along: requests that were under way, and exchanges whose answer was complete less than a moment before
(``--margin``), since the proxy commits every 20 ms and answers without waiting for it.

Limits: a fault of the disk is a limit of the kernel on the size of files a process may write (0: each write fails at once),
and, where the processes can be made unable to override modes, folders without write permission. The clock that jumps is
Python's `time.time`, for the proxy and its children; the system's stays. While file descriptors are short, new connections
fail with us as with any proxy: requests of that moment are not held against it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
sys.path[:0] = [str(ROOT), str(SCRIPTS)]

from bench_homes import config, environment, skills_home  # noqa: E402
from soak_load import Journal, Load, captured_bodies  # noqa: E402
from tiny_engine import TinyEngine, missing, quiet, write_tiny  # noqa: E402

from metaclaw_core.proxy.control import RunningProxy, call, running_proxies  # noqa: E402

# The clock of the proxy and its children: as the system's, plus what eight bytes of a file say.
JUMPING_CLOCK = """
import mmap, os, struct, time
with open(os.environ["SOAK_CLOCK"], "r+b") as file:
    _offset = mmap.mmap(file.fileno(), 8)
_real = time.time
time.time = lambda: _real() + struct.unpack("d", _offset[:8])[0]
"""


class Soak:
    def __init__(self, folder: Path, seed: int, short: bool, rl: bool = False) -> None:
        self.folder, self.short, self.rl = folder, short, rl
        self.engine: TinyEngine | None = None
        self.home = folder / "home"
        self.chance = random.Random(seed)
        self.journal = Journal(folder / "journal.jsonl")
        self.clock = folder / "clock"
        self.clock.write_bytes(struct.pack("d", 0.0))
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(JUMPING_CLOCK)
        self.llm = subprocess.Popen([sys.executable, str(SCRIPTS / "soak_llm.py"), str(folder / "llm.log")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.llm.stdout is not None
        self.llm_port = int(self.llm.stdout.readline())
        self.port = free_port()
        self.proxy: subprocess.Popen[bytes] | None = None
        self.stopping = threading.Event()
        self.seen_dropped = 0

    # --- processes --------------------------------------------------------------------------------

    def prepare(self, turns: int) -> None:
        if turns:
            from bench_store import make

            make(self.home, turns)
            if self.rl:  # the oldest are scored first: these would take all of the judge's time, and nothing be trained on
                with closing(sqlite3.connect(self.home / "store.db")) as db, db:
                    db.execute("UPDATE turns SET state = 'skipped', reason = '\"made for the soak\"' WHERE state = 'captured'")
        self.home.mkdir(mode=0o700, exist_ok=True)
        llm = {"api_base": f"http://127.0.0.1:{self.llm_port}/v1", "model_id": "judge", "daily_token_budget": None}
        settings: dict[str, Any] = {"llm": llm, "judge": {"timeout_seconds": 1, "patience": 1}, "skills": {"dir": str(self.home / "skills")}}
        if self.rl:
            self.engine = TinyEngine(write_tiny(self.folder / "model", layers=1, context=4096, vocab_size=2048), self.folder / "engine")
            self.engine.start()
            rl = {"lora_rank": 4, "batch_size": 8, "min_sessions": 2, "learning_rate": 1e-4, "max_staleness": 8, "support_share": 0, "warmup_turns": 0}
            settings |= {"mode": "rl", "rl": rl | self.engine.settings, "policy": {"first_segment_timeout": 4, "max_tokens": 64}}
            settings["judge"] |= {"votes": 1}
        (self.home / "config.yaml").write_text(config(settings))
        skills_home(self.folder, 0, home=self.home)

    def start_proxy(self) -> None:
        command = [str(Path(sys.executable).with_name("metaclaw")), "start", "--port", str(self.port), "--set", f"confdir={self.folder / 'ca'}"]
        variables = quiet(environment(self.home)) | {"SOAK_CLOCK": str(self.clock), "PYTHONPATH": os.pathsep.join(filter(None, [str(self.folder / "site"), os.environ.get("PYTHONPATH")]))}
        with (self.folder / "proxy.log").open("ab") as log:
            self.proxy = subprocess.Popen([*unprivileged(), *command], env=variables, stdout=log, stderr=subprocess.STDOUT)

    def keep_alive(self) -> None:
        """What a service manager does."""
        while not self.stopping.wait(0.05):
            if self.proxy is None or self.proxy.poll() is not None:
                self.start_proxy()

    def control(self) -> RunningProxy | None:
        return next((p for p in running_proxies(self.home) if self.proxy is not None and p.pid == self.proxy.pid), None)

    def ready(self, seconds: float = 30.0) -> dict[str, Any]:
        """Wait until the proxy serves and its children run; what it says of itself."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with suppress(OSError, ValueError):
                if (running := self.control()) is not None:
                    status = call(running, "status", 5)
                    if status["listen"] and all(child["pid"] for child in status["children"]):
                        return status
            time.sleep(0.1)
        raise SystemExit(f"the proxy is not back after {seconds:.0f} s; see {self.folder / 'proxy.log'}")

    def child(self, name: str) -> int | None:
        """The process id of the proxy's child of that name."""
        with suppress(OSError, ValueError):
            if (running := self.control()) is not None:
                return next((child["pid"] for child in call(running, "status", 5)["children"] if child["name"] == name), None)
        return None

    def routes(self, seconds: float) -> bool:
        """Wait until the policy server answers; does it?"""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with suppress(OSError, ValueError):
                if (running := self.control()) is not None:
                    route = call(running, "status", 5)["route"]
                    if route and route["ready"] and route["enabled"] and route["breaker"] == "closed":
                        return True
            time.sleep(0.2)
        return False

    def examined(self, seconds: float) -> bool:
        """Wait until the judge has passed its examination, as anybody's has who trains; has it?"""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with closing(sqlite3.connect(f"file:{self.home / 'store.db'}?mode=ro", uri=True, timeout=30)) as db:
                if db.execute("SELECT 1 FROM health WHERE ok").fetchone():
                    return True
            time.sleep(0.5)
        return False

    def steps(self) -> int:
        """That were made to their end."""
        with closing(sqlite3.connect(f"file:{self.home / 'store.db'}?mode=ro", uri=True, timeout=30)) as db:
            return int(db.execute("SELECT count(*) FROM steps WHERE state IN ('routed', 'rejected')").fetchone()[0])

    def recovered(self) -> dict[str, Any]:
        """After all: whether it serves again, and whether a further step is made."""
        serves, before = self.routes(180), self.steps()
        deadline = time.monotonic() + 180
        while self.steps() == before and time.monotonic() < deadline:
            time.sleep(1)
        return {"serves": serves, "steps": self.steps(), "trains": self.steps() > before}

    def flush(self) -> None:
        """After a fault of the disk: until everything that waited in memory is on it."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with suppress(OSError):
                if (running := self.control()) is not None and call(running, "flush", 10).get("flushed"):
                    self.seen_dropped = max(self.seen_dropped, call(running, "status")["spool"]["dropped"])
                    return
            time.sleep(0.2)
        raise SystemExit("the spool can't be written 30 s after the disk was given back")

    def family(self) -> list[int]:
        """The proxy's descendants, whatever they are: the worker, the build of an index, a policy server."""
        import psutil

        with suppress(psutil.Error):
            if self.proxy is not None:
                return [child.pid for child in psutil.Process(self.proxy.pid).children(recursive=True)]
        return []

    def stop(self) -> None:
        self.stopping.set()
        time.sleep(0.1)
        if self.proxy is not None and self.proxy.poll() is None:
            self.proxy.terminate()
            try:
                self.proxy.wait(30)
            except subprocess.TimeoutExpired:
                self.proxy.kill()
                self.proxy.wait()
        if self.engine is not None:
            self.engine.kill()
        assert self.llm.stdin is not None
        self.llm.stdin.close()
        self.llm.wait(10)

    # --- faults -----------------------------------------------------------------------------------

    def pause(self, short: float, long: float) -> None:
        time.sleep(self.chance.uniform(0.5, 1.0) * (short if self.short else long))

    def kill_proxy(self) -> None:
        assert self.proxy is not None
        begun = time.time()
        self.proxy.kill()
        self.proxy.wait()
        self.journal.write(killed=begun, dead=time.time())
        self.ready()

    def kill_child(self) -> None:
        for pid in self.family()[:1] if self.chance.random() < 0.7 else self.family():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.ready(90)

    def disk_full(self) -> None:
        """For the proxy, the worker or both; each write fails, or each that makes a file longer than it may be."""
        assert self.proxy is not None
        pids = [self.proxy.pid, *self.family()]
        chosen = self.chance.choice((pids, pids[:1], pids[1:]))
        begun = time.time()
        with limited(chosen, resource.RLIMIT_FSIZE, self.chance.choice((0, 100_000, 1_000_000))):
            self.pause(1.5, 8.0)
        self.journal.write(disk_from=begun, disk_to=time.time())
        self.flush()

    def read_only(self) -> None:
        """No file can be made or opened for writing below the home; what is open stays open."""
        changed = [path for path in (self.home, *self.home.rglob("*")) if path.is_dir()]
        modes, begun = {path: path.stat().st_mode for path in changed}, time.time()
        for path in changed:
            path.chmod(0o500)
        try:
            if self.chance.random() < 0.5:
                self.kill_child_quietly()
            self.pause(1.5, 8.0)
        finally:
            for path, mode in modes.items():
                path.chmod(mode)
            self.journal.write(disk_from=begun, disk_to=time.time())
        self.flush()
        self.ready(90)

    def kill_child_quietly(self) -> None:
        for pid in self.family()[:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def store_locked(self) -> None:
        with closing(sqlite3.connect(self.home / "store.db", isolation_level=None, timeout=30)) as db:
            db.execute("BEGIN EXCLUSIVE")
            self.pause(2.0, 40.0 if self.chance.random() < 0.2 else 5.0)
            db.execute("ROLLBACK")

    def clock_jump(self) -> None:
        """An hour or a day ahead or back, and back again."""
        offset = self.chance.choice((-86_400.0, -3_600.0, -5.0, 5.0, 3_600.0, 86_400.0))
        self.set_clock(offset)
        self.pause(1.5, 10.0)
        self.set_clock(0.0)

    def set_clock(self, offset: float) -> None:
        with self.clock.open("r+b") as file:  # in place: the processes have it mapped
            file.write(struct.pack("d", offset))

    def descriptors(self) -> None:
        """The proxy may open two more files."""
        assert self.proxy is not None
        used = len(list(Path(f"/proc/{self.proxy.pid}/fd").iterdir()))
        self.journal.write(descriptors_from=time.time())
        with limited([self.proxy.pid], resource.RLIMIT_NOFILE, used + 2):
            self.pause(1.0, 4.0)
        time.sleep(1.5)  # asyncio accepts again after a second
        self.journal.write(descriptors_to=time.time())
        self.flush()

    def stopped(self) -> None:
        """The worker, or the policy server, stands still for a while, as on a machine that swaps."""
        self.stand_still(self.family()[:1], 1.0, 15.0)

    def stand_still(self, pids: list[int], short: float, long: float) -> None:
        begun = time.time()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        self.pause(short, long)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        if self.rl:  # the policy server's requests hang that long; the worker has none
            self.journal.write(stopped_from=begun, stopped_to=time.time())

    def kill_policy(self) -> None:
        if (pid := self.child("policy")) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.routes(60)

    def kill_engine(self) -> None:
        """And start it again, at once or after a while."""
        assert self.engine is not None
        self.engine.kill()
        self.pause(1.0, self.chance.choice((0.5, 15.0)))
        self.engine.start()
        self.routes(60)

    def stop_engine(self) -> None:
        """It takes requests and says nothing."""
        assert self.engine is not None
        self.engine.sleep()
        self.pause(4.0, 20.0)
        self.engine.wake()
        self.routes(60)

    def stop_policy(self) -> None:
        """For a moment that its heartbeat does not show, or for longer."""
        if (pid := self.child("policy")) is not None:
            self.stand_still([pid], 1.5, self.chance.choice((1.5, 12.0)))
        self.routes(60)


FAULTS: dict[str, tuple[int, Callable[[Soak], None]]] = {  # name → (how often beside the others, what is done)
    "proxy killed": (6, Soak.kill_proxy),
    "worker or other child killed": (4, Soak.kill_child),
    "disk full": (3, Soak.disk_full),
    "folders read-only": (2, Soak.read_only),
    "store locked": (2, Soak.store_locked),
    "clock jumps": (2, Soak.clock_jump),
    "no file descriptors": (1, Soak.descriptors),
    "worker stopped": (1, Soak.stopped),
}

RL_FAULTS: dict[str, tuple[int, Callable[[Soak], None]]] = {
    "policy server killed": (4, Soak.kill_policy),
    "engine killed": (3, Soak.kill_engine),
    "engine stopped": (3, Soak.stop_engine),
    "policy server stopped": (2, Soak.stop_policy),
}


@contextmanager
def limited(pids: list[int], what: int, soft: int) -> Iterator[None]:
    old: dict[int, tuple[int, int]] = {}
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            old[pid] = resource.prlimit(pid, what)
            resource.prlimit(pid, what, (soft, old[pid][1]))
    try:
        yield
    finally:
        for pid, limits in old.items():
            with suppress(ProcessLookupError, PermissionError):
                resource.prlimit(pid, what, limits)


def unprivileged() -> list[str]:
    """For root: what lets its processes be refused by the mode of a folder, as everybody's are."""
    if os.geteuid() == 0 and shutil.which("setpriv"):
        words = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--"]
        if subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0:
            return words
    return []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def order(soak: Soak, until: float) -> Iterator[str]:
    """Short: each fault once, kills twice. Long: by their weights until the time is over; each of them first once."""
    faults = faults_of(soak)
    once = list(faults)
    soak.chance.shuffle(once)
    yield from once
    if soak.short:
        yield from ("worker or other child killed", "proxy killed")
        return
    while time.monotonic() < until:
        yield soak.chance.choices(list(faults), [weight for weight, _ in faults.values()])[0]


def faults_of(soak: Soak) -> dict[str, tuple[int, Callable[[Soak], None]]]:
    return FAULTS | RL_FAULTS if soak.rl else FAULTS


def run(soak: Soak, args: argparse.Namespace) -> dict[str, Any]:
    soak.prepare(args.turns)
    load = Load(soak.journal, soak.port, soak.llm_port, captured_bodies(ROOT / "tests" / "captures"), routed=soak.rl)
    load.learn()
    keeper = threading.Thread(target=soak.keep_alive, daemon=True)
    keeper.start()
    soak.ready()
    if soak.rl and not (soak.routes(120) and soak.examined(120)):
        raise SystemExit(f"the policy server does not serve, or the judge did not pass; see {soak.home / 'logs'}")
    clients = [threading.Thread(target=load.client, args=(n,), daemon=True) for n in range(args.clients)]
    clients.append(threading.Thread(target=load.loris, daemon=True))
    for client in clients:
        client.start()
    begun = time.monotonic()
    until = begun + (0 if args.short else args.minutes * 60)
    faults: dict[str, int] = {}
    for number, name in enumerate(order(soak, until)):
        soak.pause(0.7, 3.0)
        before = load.served
        soak.journal.write(fault=name, at=time.time())
        faults_of(soak)[name][1](soak)
        faults[name] = faults.get(name, 0) + 1
        if number % (4 if args.short else 40) == 2:
            load.huge(f"huge-{number}")
            soak.flush()  # it takes the writer longer than the margin, and all that is behind it
            faults["64 MB body"] = faults.get("64 MB body", 0) + 1
        print(f"{time.monotonic() - begun:6.0f} s  {name}: {load.served - before} requests served meanwhile, {load.served} in all, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    soak.pause(1.0, 5.0)
    recovered = soak.recovered() if soak.rl else None
    load.stop.set()
    for client in clients:
        client.join(PATIENCE_AT_END)
    status = soak.ready()
    soak.seen_dropped = max(soak.seen_dropped, status["spool"]["dropped"])
    return {"faults": faults, "seconds": round(time.monotonic() - begun), "sessions": load.sessions, "dropped": soak.seen_dropped, "rl": recovered}


PATIENCE_AT_END = 70.0


def drain(home: Path) -> None:
    """Take in what lies in the spools. A worker that was killed while it did so keeps its lease for up to a minute, which need
    not be waited for: nobody is left."""
    with closing(sqlite3.connect(home / "store.db", isolation_level=None, timeout=30)) as db:
        db.execute("DELETE FROM leases WHERE name = 'ingest'")
    command = [str(Path(sys.executable).with_name("metaclaw")), "turns", "--limit", "1", "--json"]
    deadline = time.monotonic() + 150
    while True:
        done = subprocess.run(command, env=environment(home), capture_output=True, text=True, check=False)
        if done.returncode == 0 and not any((home / "spool").glob("*.db")):
            return
        if time.monotonic() > deadline:
            print(f"the spools are not taken in to the end: {done.stderr.strip()}", file=sys.stderr)
            return
        time.sleep(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--mode", choices=("skills_only", "rl"), default="skills_only", help="rl needs the extras rl and local")
    parser.add_argument("--short", action="store_true", help="every fault once")
    parser.add_argument("--turns", type=int, default=0, help="turns that are in the store before")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--margin", type=float, default=0.25, metavar="SECONDS", help="what a kill may take along")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave everything there")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    if args.mode == "rl" and (lacks := missing()) is not None:
        parser.error(f"--mode rl: {lacks}")
    print(f"seed {args.seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        soak = Soak(folder, args.seed, args.short, args.mode == "rl")
        try:
            told = run(soak, args)
        finally:
            soak.stop()
        (folder / "soak.json").write_text(json.dumps(told))
        drain(soak.home)
        check = [sys.executable, str(SCRIPTS / "check_invariants.py"), str(folder), "--margin", str(args.margin)]
        if args.json:
            check += ["--json", str(args.json)]
        return subprocess.run(check, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
