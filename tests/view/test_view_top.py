"""``metaclaw top`` in the terminal, with and without a proxy, and with hostile text in the store."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from e2e_tools import SCRIPT, environment, running_proxy
from judge_tools import exchange, user
from rich.console import Console

from metaclaw_core.model import Injection
from metaclaw_core.store.db import open_store
from metaclaw_core.view.frame import frame, gather

TOOL = str(Path(sys.executable).with_name("metaclaw"))


def once(home: Path) -> str:
    ran = subprocess.run([TOOL, "top", "--once"], env=environment(home), capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


def test_a_frame_of_an_empty_home_says_how_to_begin_and_makes_nothing(metaclaw_home):
    shown = once(metaclaw_home)
    assert "proxy     none is running: metaclaw start" in shown
    assert "Nothing has been recorded yet" in shown
    assert not metaclaw_home.exists()


def test_a_frame_has_queues_sessions_requests_skills_and_runs(recorded):
    shown = once(recorded)
    for piece in (
        "requests  46 captured · 2 scored · 4 skipped",
        "segments  1 done",
        "notice    ",
        "Skills are written with your agent's own key.",
        "My rebase onto main stopped with a conflict in app/routes.py.",
        "git-rebase-conflicts, release-n…",
        "→ exec",
        "13,433",
        "The LLM did not answer.",
    ):
        assert piece in shown
    used = [line.split()[:4] for line in shown.splitlines() if line.startswith(("git-rebase", "release-notes"))]
    assert used == [["git-rebase-conflicts", "2", "1", "+0.00"], ["release-notes-style", "1", "1", "-1.00"]]
    assert max(len(line) for line in shown.splitlines()) <= 160


def test_a_running_proxy_and_one_that_does_not_answer_are_in_the_frame(tmp_path, metaclaw_home):
    with running_proxy(tmp_path, "-s", str(SCRIPT)) as proxy:
        shown = once(metaclaw_home)
        assert f"pid {proxy.process.pid} · 127.0.0.1:{proxy.port} · skills_only · up 0h00m" in shown
        assert "0 exchanges, 0 with skills" in shown
        (metaclaw_home / "run" / "1.json").write_text(f'{{"pid": {os.getpid()}, "socket": "/nowhere"}}')
        assert f"pid {os.getpid()}: does not answer: " in once(metaclaw_home)


def test_nothing_that_was_said_reaches_the_terminal_as_a_command(metaclaw_home):
    hostile = "\x1b]0;owned\x07\x1b[2J\x9b31m[bold red]markup[/] \u202eevil\udc80"
    name = hostile.replace("\udc80", "")
    with open_store(metaclaw_home / "store.db") as store:
        store.ingest([exchange(1, [user(hostile)], hostile, injection=Injection("x", (name,), 1), status_code=200)])
    shown = once(metaclaw_home)
    assert not set("\x1b\x07\x9b\u202e") & set(shown)
    assert "[bold red]markup[/]" in shown


def test_a_damaged_store_is_said_in_the_frame(metaclaw_home):
    metaclaw_home.mkdir()
    (metaclaw_home / "store.db").write_bytes(b"no database" * 100)
    shown = once(metaclaw_home)
    assert "can't be opened" in shown
    assert "none is running" in shown


def test_without_a_terminal_it_says_what_to_use(metaclaw_home):
    ran = subprocess.run([TOOL, "top"], env=environment(metaclaw_home), capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert "This is no terminal: use --once." in ran.stderr


@pytest.mark.parametrize(("width", "height"), [(80, 24), (119, 40), (200, 60)])
def test_a_frame_fits_the_terminal_and_leaves_room_for_what_the_user_said(recorded, width, height):
    with open_store(recorded / "store.db") as store:
        seen = gather(store)
    console = Console(width=width, height=height)
    with console.capture() as captured:
        console.print(frame([], seen, [], width=width, height=height))
    lines = captured.get().splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert any("Great. Wr" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["q", "\x03", "signal"])
def test_on_a_terminal_it_goes_on_until_it_is_told_and_leaves_the_terminal_as_it_was(recorded, how):
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (40, 150))
    before = termios.tcgetattr(its)
    more = {"TERM": "xterm-256color"}
    process = subprocess.Popen(
        [TOOL, "top"], env=environment(recorded) | more, stdin=its, stdout=its, stderr=its, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    shown = b""
    deadline = time.monotonic() + 30
    while shown.count(b"metaclaw top") < 2 and time.monotonic() < deadline:
        shown += os.read(ours, 65536)
    assert shown.count(b"metaclaw top") >= 2
    if how == "signal":
        process.send_signal(signal.SIGINT)
    else:
        os.write(ours, how.encode())
    os.set_blocking(ours, False)
    while process.poll() is None and time.monotonic() < deadline:
        try:
            shown += os.read(ours, 65536)
        except BlockingIOError:
            time.sleep(0.02)
    assert process.wait(1) == 0
    assert b"Traceback" not in shown
    assert b"\x1b[?1049h" in shown  # the other screen, so that what was on the terminal comes back
    assert termios.tcgetattr(its) == before
    os.close(ours)
    os.close(its)
