"""The page in a real browser: the printed address gets in, data runs nothing, and what is shown can be read.

With SCREENSHOTS_TO=docs/screenshots the pictures of the documentation are taken anew.
"""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import pytest
from judge_tools import exchange, user

from metaclaw_core.model import Injection
from metaclaw_core.store.db import open_store

pytestmark = pytest.mark.slow


def png_size(file: Path) -> tuple[int, int]:
    head = file.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def taken(browse, url: str, file: Path, height: int) -> None:
    browse(url, f"--screenshot={file}", f"--window-size=1280,{height}")
    assert png_size(file) == (1280, height)
    assert 20_000 < file.stat().st_size < 200_000  # smaller: next to nothing is on it
    if folder := os.environ.get("SCREENSHOTS_TO"):
        shutil.copy(file, Path(folder) / file.name)


def test_the_sessions_are_on_the_page(recorded, serve, browse, tmp_path):
    with serve(recorded) as page:
        taken(browse, page.url, tmp_path / "sessions.png", 760)


def test_a_session_is_on_its_page(recorded, serve, browse, tmp_path):
    with open_store(recorded / "store.db") as store:
        (session,) = {row["session"] for row in store.turns() if row["injected"]}
    with serve(recorded) as page:
        taken(browse, page.at(f"/session/{session}?token={page.token}"), tmp_path / "session.png", 420)


def test_the_address_moves_on_to_one_without_the_token_and_the_script_runs(recorded, serve, browse):
    with serve(recorded) as page:
        shown = browse(page.url, "--dump-dom")
        assert "The address works once" not in shown
        assert page.token not in shown
        assert "<h1>Sessions</h1>" in shown
        assert '<span id="live" role="status" class="on">live</span>' in shown
        second = browse(page.url, "--dump-dom")
        assert "This link was used already" in second


def test_nothing_that_was_said_runs(metaclaw_home, serve, browse):
    hostile = "</p></td></table><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script><svg onload=document.title='owned'>"
    with open_store(metaclaw_home / "store.db") as store:
        store.ingest([exchange(1, [user(hostile)], hostile, injection=Injection(hostile, (hostile,), 1))])
        (row,) = store.turns()
    for path in ("/", f"/session/{row['session']}", f"/turn/{row['id']}", "/skills"):
        with serve(metaclaw_home) as page:
            shown = browse(page.at(f"{path}?token={page.token}"), "--dump-dom")
        assert "· MetaClaw</title>" in shown
        assert "onerror=" in shown  # as text
        assert "<img" not in shown
        assert "<svg" not in shown
        assert "owned'</script>" not in shown


def test_a_page_that_was_rebound_to_our_address_gets_nothing_and_costs_nothing(recorded, serve, browse):
    with serve(recorded) as page:
        evil = page.url.replace("127.0.0.1", "evil.example")
        shown = browse(evil, "--dump-dom", "--host-resolver-rules=MAP evil.example 127.0.0.1")
        assert "only reached under its own address" in shown
        assert "<h1>Sessions</h1>" in browse(page.url, "--dump-dom")
