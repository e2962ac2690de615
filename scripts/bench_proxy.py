#!/usr/bin/env python
"""What the addon costs over bare mitmdump, by the shared harness: interleaved rounds, ratios within one run.

    scripts/bench_proxy.py             # cost, streaming and what reaches the LLM; about five minutes
    scripts/bench_proxy.py --quick     # one minute
    scripts/bench_proxy.py --only cost|stream|inject|memory

The harness lies beside the repository (``../shared/bench``); without it this says so and ends with status 2.
Bars (exit status 1 where one is broken): added p50 ≤ 0.5 ms at 60 kB and ≤ 1.5 ms at 400 kB, throughput ≥ 85 % of
bare; added time to first token ≤ 5 ms and added event delay ≤ 2 ms (300 ms, then 60 events 15 ms apart); all five
dialects injected, byte for byte; RSS of the proxy < 150 MB after 10,000 requests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "addons" / "metaclaw.py"


def harness() -> Path | None:
    for folder in (os.environ.get("METACLAW_SHARED"), ROOT.parent / "shared"):
        if folder and (Path(folder) / "bench" / "compare.py").exists():
            return Path(folder) / "bench"
    return None


def steps(quick: bool) -> dict[str, list[str]]:
    rounds = "3" if quick else "8"
    return {
        "inject": [
            *("--inject-check", "--kb", "60", "--bar", "injected>=1", "--bar", "intact>=1", "--bar", "headers>=1"),
            *("--bar", "auth>=1", "--bar", "answer>=1"),
        ],
        "cost": [
            *("--kb", "60", "400", "--concurrency", "1", "16", "--rounds", rounds, "--variant", "same="),
            *("--bar", "project/*-60k-c1:over_bare_p50_ms<=0.5", "--bar", "project/*-400k-c1:over_bare_p50_ms<=1.5"),
            *("--bar", "project/*-c16:x_bare_rps>=0.85"),
        ],
        "stream": [
            *("--stream", "--ttft-ms", "300", "--itl-ms", "15", "--chunks", "60", "--kb", "60", "--concurrency", "1"),
            *("--requests", "5", "--rounds", "2" if quick else "4", "--variant", "streamed=--set stream_large_bodies=1"),
            *("--bar", "added_ttft_p50_ms<=5", "--bar", "added_late_p50_ms<=2"),
        ],
        "memory": [
            *("--kb", "60", "--concurrency", "4", "--schemes", "http", "--rounds", "2"),
            *("--requests", "1000" if quick else "5000", "--bar", "rss_mb<=150"),
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--only", choices=list(steps(True)), help="one step")
    args, more = parser.parse_known_args()
    bench = harness()
    if bench is None:
        print("The harness is not here: ../shared/bench/compare.py (or METACLAW_SHARED).", file=sys.stderr)
        return 2
    worst = 0
    for name, arguments in steps(args.quick).items():
        if args.only in (None, name):
            print(f"\n== {name}", flush=True)
            line = [sys.executable, "-B", str(bench / "compare.py"), "--script", str(SCRIPT), *arguments, *more]
            worst = max(worst, subprocess.run(line, cwd=bench, check=False).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())
