"""``metaclaw turns``, ``sessions``, ``store verify`` and ``import`` as people and scripts use them, mistakes included."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from e2e_tools import ROOT, environment

TOOL = str(Path(sys.executable).with_name("metaclaw"))
ANTHROPIC, OLLAMA = (str(ROOT / "tests" / "captures" / f"{name}.mitm") for name in ("anthropic-messages-native", "ollama"))


@pytest.fixture
def recorded(cli, metaclaw_home):
    """The home of this test with two recordings in it."""
    ran = cli("import", ANTHROPIC, OLLAMA)
    assert ran.code == 0
    assert ran.out == (
        f"{ANTHROPIC}: 7 new exchanges, 0 known already, 0 other flows.\n{OLLAMA}: 3 new exchanges, 0 known already, 0 other flows.\n"
    )
    assert ran.err == ""
    return metaclaw_home


def test_a_turn_as_json_has_the_promised_fields(recorded, cli):
    rows = [json.loads(line) for line in cli("turns", "--json").out.splitlines()]
    assert len(rows) == 10
    expected = {
        "flow_id": "879f1723-7202-4442-b74e-bf19af35b9e4",
        "session_id": "8e4856f4-e274-4b3e-8df6-6418c4c116ba",
        "agent": "openclaw",
        "kind": "tool",
        "dialect": "anthropic",
        "host": "api.anthropic.com",
        "model": "claude-opus-4-6",
        "user_text": 'Read my notes. TOOL:read {"path":"notes.txt"} END',
        "assistant_text": "Tool finished. The task is done.",
        "tool_calls": None,
        "stop_reason": "stop",
        "usage": {
            "input_tokens": 14985,
            "output_tokens": 12,
            "cached_tokens": 0,
            "cache_write_tokens": 0,
            "reasoning_tokens": None,
        },
        "status_code": 200,
        "injected": None,
        "state": "captured",
        "reason": None,
        "started_at": 1795466343.3304482,
        "duration_ms": pytest.approx(29.893, abs=0.001),
    }
    assert {name: rows[2][name] for name in expected} == expected
    assert [(call["name"], call["arguments"]) for call in rows[1]["tool_calls"]] == [("read", '{"path": "notes.txt"}')]
    assert rows[1]["turn_id"] == rows[2]["turn_id"] != rows[3]["turn_id"]
    assert {(row["host"], len(row["principal"])) for row in rows} == {("api.anthropic.com", 32), ("127.0.0.1", 32)}
    assert len({row["principal"] for row in rows}) == 2


def test_sessions_as_json_have_the_promised_fields(recorded, cli):
    rows = [json.loads(line) for line in cli("sessions", "--json").out.splitlines()]
    names = ("session_id", "agent", "turns", "first_at", "last_at", "kinds")
    assert [[row[name] for name in names] for row in rows] == [
        ["8e4856f4-e274-4b3e-8df6-6418c4c116ba", "openclaw", 7, 1795466336.9728012, 1795466353.8729541, {"main": 4, "tool": 3}],
        ["cce767c6-018e-481b-ad4b-b0fe4539f2ca", "openclaw", 3, 1795467630.751923, 1795467633.9418244, {"main": 2, "tool": 1}],
    ]


def test_filters_choose_rows_and_it_is_said_where_none_fits(recorded, cli):
    def kinds(*filters: str) -> list[str]:
        return [json.loads(line)["kind"] for line in cli("turns", "--json", *filters).out.splitlines()]

    assert kinds("--session", "cce767c6-018e-481b-ad4b-b0fe4539f2ca") == ["main", "main", "tool"]
    assert kinds("--kind", "tool", "--limit", "2") == ["tool", "tool"]
    assert kinds("--session", "\udcff") == kinds("--session", "x' OR 1=1 --") == []
    assert cli("turns", "--session", "nobody's").out == "No recorded exchange is like that.\n"


def test_an_empty_home_says_how_to_begin(cli):
    assert cli("turns").out.startswith("No exchange has been recorded yet.")
    assert cli("sessions").out == "No session has been recorded yet.\n"
    assert cli("turns", "--json").out == ""
    assert cli("store", "verify").out == "0 messages and 0 turns checked, 0 problems.\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("turns --kind humans", "'humans' is not one of 'main', 'tool',"),
        ("turns --state done", "'done' is not one of 'captured', 'scored',"),
        ("turns --limit 0", "0 is not in the range"),
        ("turns --limit 99999999999999999999999", "is not in the range"),
        ("turns --bogus", "No such option '--bogus'."),
        ("tuns", "There is no command 'tuns'. Did you mean turns?"),
        ("import", "Missing argument 'FILES...'."),
        ("import /", "metaclaw: / can't be read: Is a directory.\n"),
        ("import /dev/null", "metaclaw: /dev/null holds no flow.\n"),
        ("import /nowhere", "metaclaw: /nowhere can't be read: No such file or directory.\n"),
    ],
)
def test_a_mistake_is_answered_with_a_sentence(cli, words, sentence):
    ran = cli(*words.split())
    assert ran.code in (1, 2)
    assert sentence in ran.err


def test_a_file_of_which_mitmproxy_quotes_everything_is_no_wall_of_text(cli, tmp_path):
    file = tmp_path / "long.mitm"
    file.write_bytes(b"100000:" + b"x" * 100_000 + b",")
    ran = cli("import", str(file))
    assert ran.code == 1
    assert ran.err.startswith(f"metaclaw: {file} is neither a mitmproxy capture nor a HAR file (Invalid flow: loaded=b'xxx")
    assert len(ran.err) < 400


def test_a_store_of_a_newer_version_is_refused_and_left_alone(recorded, cli):
    with contextlib.closing(sqlite3.connect(recorded / "store.db")) as store, store:
        store.execute("INSERT INTO metaclaw_migrations VALUES ('m9999_from_tomorrow', 0)")
    before = (recorded / "store.db").read_bytes()
    for words in (("turns",), ("sessions", "--json"), ("import", OLLAMA), ("store", "verify")):
        ran = cli(*words)
        assert (ran.code, ran.out) == (1, "")
        assert ran.err == (
            f"metaclaw: sqlite:///{recorded}/store.db was written by a newer MetaClaw (it has m9999_from_tomorrow); "
            "upgrade MetaClaw, or set METACLAW_HOME to another folder.\n"
        )
    assert (recorded / "store.db").read_bytes() == before


def test_a_reader_that_stops_early_gets_no_traceback(recorded):
    line = f"{TOOL} turns --json | head -n 1"
    result = subprocess.run(line, shell=True, env=environment(recorded), capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["kind"] == "main"


def on_a_terminal(home: Path, width: int, *arguments: str) -> str:
    """What the command prints on a terminal of that width, without colours and in an ASCII locale."""
    ours, its = pty.openpty()
    more = {"COLUMNS": str(width), "TERM": "xterm", "NO_COLOR": "1", "LANG": "C", "LC_ALL": "C"}
    process = subprocess.Popen([TOOL, *arguments], env=environment(home) | more, stdin=its, stdout=its, stderr=its)
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while data := os.read(ours, 65536):
            shown += data
    os.close(ours)
    assert process.wait(60) == 0
    return shown.decode()


@pytest.mark.parametrize("width", [10, 200])
def test_a_row_takes_one_line_however_wide_the_terminal(recorded, width):
    shown = on_a_terminal(recorded, width, "turns")
    assert len(shown.splitlines()) == 11
    assert "\x1b[3" not in shown


def test_the_help_answers_in_under_half_a_second():
    took = []
    for _ in range(5):
        start = time.perf_counter()
        result = subprocess.run([TOOL, "--help"], capture_output=True, text=True, timeout=30)
        took.append(time.perf_counter() - start)
        assert "Record captured flows" in result.stdout
    assert min(took) < 0.5
