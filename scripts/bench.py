#!/usr/bin/env python
"""What the proxy costs beside bare mitmdump, in one run of interleaved rounds. Ratios only: absolute figures belong to one
machine in one minute.

    scripts/bench.py                        # everything, under ten minutes
    scripts/bench.py --quick                # two rounds of each, a look
    scripts/bench.py --only cost busy       # cost, stream, crowd, skills, busy
    scripts/bench.py --readme               # also into README.md (scripts/readme.py writes it, from docs/bench.json)

Variants: ``direct``; ``bare`` mitmdump; ``same``, an exact copy of bare that shows the noise; ``script``, ``mitmdump -s
addons/metaclaw.py``; ``lean``, ``metaclaw start``. Ours have 1,000 skills and each request is a new human turn, which is
the dearest kind. In each round all variants are measured one after the other, every other round backwards, and a proxy
sleeps with all its children while another is measured (../shared/bench, whose parts do the work).

Not every size is crossed with everything else. Each of the five parts answers one question:
cost    5, 60, 400 kB, http and https, one at a time, JSON: CPU and latency of a request (must be below bare's when lean)
stream  60 kB: time to the first token, and how late the tokens are
crowd   16 and 64 at a time: throughput, CPU
skills  0, the built-in, 1,000 and 10,000 skills at 60 kB
busy    p99 while the worker scores, writes skills, and trains, against a proxy whose worker only takes in (`BUSY`)

Limits: `busy` has the worker beside client, proxy and upstream; where fewer cores than that are free it shows how the
system shares them: the load is in the JSON. Without ../shared/bench (or METACLAW_SHARED) this says so; exit status 2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
sys.path[:0] = [str(ROOT), str(SCRIPTS)]

from bench_busy import BUSY, Busy, BusyLLM  # noqa: E402
from bench_homes import BUILT_IN, config, skills_home  # noqa: E402
from bench_proxy import harness  # noqa: E402
from tiny_engine import TinyEngine  # noqa: E402

JSON = ROOT / "docs" / "bench.json"
SIZES = (0, BUILT_IN, 1_000, 10_000)
PARTS = ("cost", "stream", "crowd", "skills", "busy")
CA = "ssl_verify_upstream_trusted_ca"
Cell = dict[str, dict[str, Any]]  # variant → metrics
# (metric, variant, cells, limit): what issue and README promise; x_ is a ratio to bare, of medians over the rounds.
BARS = (
    ("x_cpu", "lean", ("cost", 5, 60), 1.0),
    ("x_cpu", "lean", ("cost", 400), 1.1),
    ("x_p50", "lean", ("cost", 5, 60), 1.0),
    ("x_p50", "lean", ("cost", 400), 1.1),
)
BUSY_BAR = 1.15


@dataclass(frozen=True)
class Rounds:
    cost: int = 8
    stream: int = 4
    crowd: int = 4
    skills: int = 8
    busy: int = 10


class Bench:
    """Everything that runs: the upstream, the proxies by name, and how they are measured."""

    def __init__(self, compare: Any, load: Any, stack: ExitStack) -> None:
        self.compare, self.load, self.stack = compare, load, stack
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        self.args = Namespace(
            upstream_port=0, host=None, ttft_ms=0, itl_ms=0, chunks=16, settle=0.2, mitmdump=str(Path(sys.executable).with_name("mitmdump"))
        )
        self.upstream = compare.start_upstream(self.args, self.folder, stack)
        self.variants: dict[str, Any] = {"direct": compare.Variant("direct")}
        self.homes: dict[str, Path] = {}

    def start(self, name: str, home: Path | None = None, *, lean: bool = True) -> None:
        """A proxy that then sleeps: bare mitmdump without `home`, else ours with that METACLAW_HOME."""
        words = ""
        if home is not None:
            tools = Path(sys.executable).parent
            mapping = compare_script(self.compare)
            sets = {"confdir": "{confdir}", CA: "{ca}"}
            if lean:
                command = [str(tools / "metaclaw"), "start", "--port", "{port}"]
                sets |= {"scripts": mapping, "termlog_verbosity": "error"}
            else:
                command = [str(tools / "mitmdump"), "-q", "-s", mapping, "--listen-host", "127.0.0.1", "-p", "{port}"]
                command += ["-s", str(ROOT / "addons" / "metaclaw.py")]
            command += [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
            words = shlex.join(["env", f"METACLAW_HOME={home}", *command])
            self.homes[name] = home
        self.variants[name] = self.compare.start_proxy(words, self.args, self.upstream, self.folder / f"confdir-{name}", self.stack)

    def schedule(self, ttft_ms: float, itl_ms: float, chunks: int) -> None:
        import urllib.request

        data = json.dumps({"ttft_ms": ttft_ms, "itl_ms": itl_ms, "chunks": chunks}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.upstream['http']}/_config", data)
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).read()

    def once(self, name: str, scheme: str, load: Any) -> dict[str, Any]:
        variant = self.variants[name]
        target = variant.target(scheme, self.compare.DIALECTS[load.api].host, self.upstream)
        result: dict[str, Any] = self.compare.one_run(variant, target, load, self.upstream, self.args.settle)
        return result

    def cell(self, names: tuple[str, ...], scheme: str, load: Any, rounds: int) -> Cell:
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for number in range(rounds):
            for name in names if number % 2 == 0 else reversed(names):
                found[name].append(self.once(name, scheme, load))
        return {name: summary(name, found) for name in names}


def compare_script(compare: Any) -> str:
    return str(Path(compare.__file__).with_name("upstream_map.py"))


def summary(name: str, rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds; ratios and differences are taken within a round. CPU is that of the proxy's own process."""
    own, bare, direct = rounds[name], rounds.get("bare"), rounds.get("direct")
    made: dict[str, Any] = {"rounds": len(own), "errors": sum(r["errors"] for r in own)}
    for metric in ("cpu_ms", "p50_ms", "p99_ms", "rps", "ttft_p50_ms", "late_p50_ms"):
        if not all(metric in r for r in own):
            continue
        short = metric.removesuffix("_ms")
        made[metric] = round(statistics.median(r[metric] for r in own), 3)
        if bare is not None and name not in ("bare", "direct") and all(b.get(metric) for b in bare):
            made[f"x_{short}"] = round(statistics.median(r[metric] / b[metric] for r, b in zip(own, bare, strict=True)), 3)
        if direct is not None and name != "direct" and all(metric in d for d in direct):
            made[f"added_{metric}"] = round(statistics.median(r[metric] - d[metric] for r, d in zip(own, direct, strict=True)), 3)
    family = [sum(cpu for child, cpu, _ in r["cost"] if child) * 1000 / r["served"] for r in own]
    if name not in ("direct",):
        made["children_cpu_ms"] = round(statistics.median(family), 3)
        made["rss_mb"] = round(max((rss for r in own for child, _, rss in r["cost"] if not child), default=0.0), 1)
    return made


# --- the parts ------------------------------------------------------------------------------------


def cost(bench: Bench, rounds: int) -> dict[str, Cell]:
    cells = {}
    for kb, scheme in itertools.product((5, 60, 400), ("http", "https")):
        load = bench.load(kb=kb, requests=160 if kb < 400 else 100)
        cells[f"{kb} kB {scheme}"] = bench.cell(("direct", "bare", "same", "script", "lean"), scheme, load, rounds)
        said(f"cost: {kb} kB {scheme}", cells[f"{kb} kB {scheme}"])
    return cells


def stream(bench: Bench, rounds: int) -> dict[str, Cell]:
    cells = {}
    bench.schedule(100, 10, 20)
    for scheme, workers, requests in (("http", 1, 4), ("https", 16, 32)):
        load = bench.load(kb=60, stream=True, requests=requests, concurrency=workers, warmup=1, ttft_ms=100, itl_ms=10)
        name = f"60 kB {scheme}, {workers} at a time"
        cells[name] = bench.cell(("direct", "bare", "script", "lean"), scheme, load, rounds)
        said(f"stream: {name}", cells[name])
    bench.schedule(0, 0, 16)
    return cells


def crowd(bench: Bench, rounds: int) -> dict[str, Cell]:
    cells = {}
    for kb, scheme, workers in ((60, "https", 16), (60, "http", 64), (400, "https", 16)):
        load = bench.load(kb=kb, requests=256 if kb < 400 else 96, concurrency=workers, warmup=2)
        name = f"{kb} kB {scheme}, {workers} at a time"
        cells[name] = bench.cell(("direct", "bare", "same", "script", "lean"), scheme, load, rounds)
        said(f"crowd: {name}", cells[name])
    return cells


def skills(bench: Bench, rounds: int) -> dict[str, Cell]:
    for count in SIZES:
        if count != 1_000:
            bench.start(f"lean-{count}", skills_home(bench.folder, count))
    names = ("bare", *("lean" if count == 1_000 else f"lean-{count}" for count in SIZES))
    cell = bench.cell(names, "http", bench.load(kb=60, requests=160), rounds)
    said("skills", cell)
    return {"60 kB http": {name if name != "lean" else "lean-1000": row for name, row in cell.items()}}


def busy(bench: Bench, rounds: int) -> dict[str, Cell]:
    """Each round: a proxy whose worker only takes in what is recorded, one whose worker is at work, the first one again. The
    second look at the idle one shows the noise."""
    llm = bench.stack.enter_context(BusyLLM())
    bench.start("idle", skills_home(bench.folder, BUILT_IN, name="idle"))
    cells = {}
    for case in BUSY:
        if (lacks := case.missing()) is not None:
            print(f"# busy: {case.name} is left out: {lacks}", file=sys.stderr, flush=True)
            continue
        try:
            with beside(bench, case) as engine:
                cells[case.name] = busy_case(bench, case, llm, engine, rounds)
        except NotBusy as e:
            print(f"# busy: {e}", file=sys.stderr, flush=True)
    return cells


def beside(bench: Bench, case: Busy) -> AbstractContextManager[TinyEngine | None]:
    if case.engine is None:
        return nullcontext()
    folder = bench.folder / f"engine-{case.name}"
    folder.mkdir()
    return case.engine(folder)


def busy_case(bench: Bench, case: Busy, llm: BusyLLM, engine: TinyEngine | None, rounds: int) -> Cell:
    home = bench.folder / f"home-{case.name}"
    home.mkdir(mode=0o700)
    (home / "config.yaml").write_text(config(case.settings(llm.port, engine)))
    skills_home(bench.folder, BUILT_IN, home=home)
    case.fill(home)
    name = f"busy-{case.name}"
    bench.start(name, home)
    variant = bench.variants[name]
    load = bench.load(kb=60, requests=case.requests)
    halves: dict[str, list[dict[str, Any]]] = {"idle": [], "busy": [], "idle again": []}
    with variant.awake():
        wait_for(f"the worker's first {case.name}", lambda: case.progress(home) > 0, 120)
    if engine is not None:
        engine.sleep()
    done = 0
    for number in range(rounds):
        order = ("idle", "busy", "idle again")
        for half in order if number % 2 == 0 else reversed(order):
            before = case.progress(home)
            result = measured_with(bench, variant, load, engine) if half == "busy" else measured_with(bench, bench.variants["idle"], load)
            halves[half].append(result)
            done += case.progress(home) - before if half == "busy" else 0
    rows: Cell = {}
    for half, results in halves.items():
        row: dict[str, Any] = {"rounds": rounds, "errors": sum(r["errors"] for r in results)}
        for metric in ("p50_ms", "p99_ms", "cpu_ms"):
            row[metric] = round(statistics.median(r[metric] for r in results), 3)
            if half != "idle":
                # The busy round stands between two idle ones; the later of these is compared with the earlier.
                between = [("idle", "idle again") if half == "busy" else ("idle",)] * rounds
                beside = [statistics.mean(halves[other][n][metric] for other in others) for n, others in enumerate(between)]
                row[f"x_{metric.removesuffix('_ms')}"] = round(statistics.median(r[metric] / b for r, b in zip(results, beside, strict=True)), 3)
        rows[half] = row
    rows["busy"]["done"] = done
    meanwhile = f"{done} {case.unit} meanwhile"
    if engine is not None:
        rows["busy"]["engine_share"] = share = round(statistics.mean(r["engine_share"] for r in halves["busy"]), 2)
        meanwhile += f", the engine on {share:.0%} of a core"
    said(f"busy: {case.name} ({meanwhile})", rows)
    return rows


def measured_with(bench: Bench, variant: Any, load: Any, engine: TinyEngine | None = None) -> dict[str, Any]:
    """A round of one proxy with its children, and its engine; what they had put off while they slept is not the round's."""
    import asyncio

    target = variant.target("http", bench.compare.DIALECTS[load.api].host, bench.upstream)
    with variant.awake(), engine.awake() if engine is not None else nullcontext():
        time.sleep(0.3)
        before = sum(variant.process.cpu_times()[:2])
        began, engine_before = time.monotonic(), engine.cpu_seconds() if engine is not None else 0.0
        result: dict[str, Any] = asyncio.run(bench.compare.measure(target, load))
        time.sleep(0.1)
        result["cpu_ms"] = 1000 * (sum(variant.process.cpu_times()[:2]) - before) / result["served"]
        if engine is not None:
            result["engine_share"] = (engine.cpu_seconds() - engine_before) / (time.monotonic() - began)
    return result


class NotBusy(Exception):
    """The worker does not do what was to be measured beside it."""


def wait_for(what: str, check: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            raise NotBusy(f"{what} did not happen in {seconds:.0f} s")
        time.sleep(0.1)


# --- report ---------------------------------------------------------------------------------------


BEGAN = time.monotonic()


def said(what: str, cell: Cell) -> None:
    rows = "; ".join(f"{name} {row.get('x_cpu', '-')}/{row.get('x_p50', '-')}" for name, row in cell.items() if "x_p50" in row)
    print(f"# {time.monotonic() - BEGAN:4.0f} s  {what}: CPU/p50 × {rows}", file=sys.stderr, flush=True)


def verdicts(parts: dict[str, dict[str, Cell]]) -> list[dict[str, Any]]:
    """Each bar in each of its cells: {"bar", "cell", "value", "limit", "held"}."""
    out: list[dict[str, Any]] = []
    for metric, variant, (part, *sizes), limit in BARS:
        for name, cell in parts.get(str(part), {}).items():
            if int(name.split()[0]) in sizes:
                out.append(_verdict(f"{variant} {metric}", name, cell[variant].get(metric), limit))
    for case in BUSY if "busy" in parts else ():
        if case.name not in parts["busy"] and case.missing() is None:
            out.append(_verdict("p99 busy / idle", case.name, None, BUSY_BAR))
    for name, cell in parts.get("busy", {}).items():
        out.append(_verdict("p99 busy / idle", name, cell["busy"]["x_p99"], BUSY_BAR))
    for part, cells in parts.items():
        out += [_verdict("errors", f"{part} {name} {v}", row["errors"], 0) for name, cell in cells.items() for v, row in cell.items() if row["errors"]]
    return out


def _verdict(bar: str, cell: str, value: float | None, limit: float) -> dict[str, Any]:
    return {"bar": bar, "cell": cell, "value": value, "limit": limit, "held": value is not None and value <= limit}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds of each")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--readme", action="store_true", help=f"write {JSON.relative_to(ROOT)} and the table in README.md")
    args = parser.parse_args()
    bench_folder = harness()
    if bench_folder is None:
        print("The harness is not here: ../shared/bench/compare.py (or METACLAW_SHARED).", file=sys.stderr)
        return 2
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(bench_folder))
    import compare
    import load

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))  # unwind: no sleeping proxy is left behind
    rounds = Rounds(2, 2, 2, 2, 2) if args.quick else Rounds()
    began, load_before = time.monotonic(), os.getloadavg()
    parts: dict[str, dict[str, Cell]] = {}
    with ExitStack() as stack:
        bench = Bench(compare, load.Load, stack)
        bench.start("bare")
        bench.start("same")
        bench.start("script", skills_home(bench.folder, 1_000, name="script"), lean=False)
        bench.start("lean", skills_home(bench.folder, 1_000))
        for part in PARTS:
            if part in args.only:
                parts[part] = globals()[part](bench, getattr(rounds, part))
    version = subprocess.run([bench.args.mitmdump, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    about = {
        "mitmproxy": version,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load_before": load_before,
        "load_after": os.getloadavg(),
        "seconds": round(time.monotonic() - began),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    report = {"about": about, "parts": parts, "bars": verdicts(parts)}
    text = json.dumps(report, indent=1) + "\n"
    for file in [*([args.json] if args.json else []), *([JSON] if args.readme else [])]:
        file.write_text(text, encoding="utf-8")
    from bench_table import table

    print(table(report))
    print(f"{about['seconds']} s; load {load_before[0]:.1f} → {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", file=sys.stderr)
    for verdict in report["bars"]:
        print("ok  " if verdict["held"] else "FAIL", "{bar} in {cell}: {value}, limit {limit}".format(**verdict), file=sys.stderr)
    if args.readme:
        subprocess.run([sys.executable, str(SCRIPTS / "readme.py")], check=True)
    return 0 if all(verdict["held"] for verdict in report["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
