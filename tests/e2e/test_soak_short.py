"""The short form of the soak: every fault once beside real traffic, then the store is compared with what the clients saw.

And damaged bodies in numbers, which needs no process: 1,000 of each dialect through the hooks as mitmproxy calls them.
"""

from __future__ import annotations

import bisect
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from mitmproxy import http
from mitmproxy.test import taddons, tflow

from metaclaw_core.proxy.addon import MetaClaw
from metaclaw_core.store.db import open_store
from metaclaw_core.store.drain import drain_spools

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

from soak_load import HEADERS, captured_bodies, damaged, path_of  # noqa: E402

pytestmark = pytest.mark.slow

DIALECTS = ("openai_chat", "openai_responses", "anthropic", "gemini", "ollama")
FAULTS = {
    *("proxy killed", "worker or other child killed", "disk full", "folders read-only", "store locked", "clock jumps"),
    *("no file descriptors", "worker stopped", "64 MB body"),
}


def test_nothing_is_lost_or_doubled_or_answered_otherwise_while_everything_goes_wrong(tmp_path):
    # The margin is for a machine on which others run their tests, too.
    command = [sys.executable, str(SCRIPTS / "soak.py"), "--short", "--json", str(tmp_path / "found.json"), "--margin", "1", "--keep", str(tmp_path / "soak")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["faults"]) >= FAULTS
    assert (found["lost"], found["duplicated"], found["wrong_count"], found["dropped"], found["store"]) == ([], {}, 0, 0, [])
    assert found["served"] > 100


def is_inserted_into(longer: bytes, body: bytes) -> bool:
    """Is it `body` with one run of bytes more?"""
    start = bisect.bisect_left(range(len(body)), True, key=lambda end: longer[: end + 1] != body[: end + 1])
    return len(longer) > len(body) and longer[start + len(longer) - len(body) :] == body[start:]


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_thousand_damaged_bodies_are_passed_on_and_recorded(metaclaw_home, dialect):
    """Each arrives as it was sent, or with one run of bytes more; each is in the store once, in whatever state."""
    bodies = captured_bodies(ROOT / "tests" / "captures")[dialect]
    chance = random.Random(f"damaged {dialect}")
    answers = (b'data: {"choices":[]}\n\n', b"[1, 2", b"\xff\xfe\x00", b"data: [DONE]\n\n", b"", b'{"error": 3}')
    addon = MetaClaw(worker=False)
    with taddons.context(addon, loadcore=False) as context:
        context.options.server = False  # neither children nor a control socket
        addon.running()
        assert addon._runtime is not None
        addon._make_rewriter(addon.settings, addon._runtime)
        for n in range(1_000):
            body = damaged(chance.choice(bodies), chance)
            flow = tflow.tflow(resp=True)
            flow.live = True
            path = path_of(dialect, chance.random() < 0.5)
            flow.request = http.Request.make("POST", f"https://api.example.com{path}{'&' if '?' in path else '?'}id=d-{n}", body, HEADERS)
            flow.response = None
            addon.requestheaders(flow)
            await addon.request(flow)
            sent = flow.request.raw_content
            assert sent == body or is_inserted_into(sent, body), n
            flow.response = http.Response.make(200, damaged(chance.choice(answers) * 3, chance), {"content-type": "text/event-stream"})
            addon.responseheaders(flow)
            addon.response(flow)
        current = addon._runtime
        assert current.spool.flush(60)
        assert (current.spool.written, current.spool.dropped) == (1_000, 0)
        assert {name: n for name, n in current.counters.items() if "failed" in name} == {}
        current.close()
    with open_store(metaclaw_home / "store.db") as store:
        report = drain_spools(store, metaclaw_home / "spool")
        assert (report.stored, report.problems) == (1_000, ())
        rows = list(store.turns())
        assert [row["reason"] for row in rows if "internal error" in (row["reason"] or "")] == []
        assert sorted(row["path"].partition("id=")[2] for row in rows) == sorted(f"d-{n}" for n in range(1_000))
        assert store.verify().problems == ()
