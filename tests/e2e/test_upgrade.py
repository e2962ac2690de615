"""A newer version is installed over the one that runs: `metaclaw restart`, and the agent goes on."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from e2e_tools import environment, free_port
from retrying_agent import Agent, block
from wheel_tools import build_wheel, install, scratch_python

from metaclaw_core.proxy.control import running_proxies
from metaclaw_core.testing import Received, Script, ScriptedLLM

pytestmark = pytest.mark.slow

MIGRATION = '''"""What a later version needs."""

from sqlalchemy import Connection, text


def m9000_later(connection: Connection) -> None:
    connection.execute(text("CREATE TABLE later (id INTEGER)"))
'''


def newer(source: Path) -> None:
    """The next version: another number, and a migration more."""
    for name, old in (("pyproject.toml", 'version = "0.'), ("metaclaw_core/__init__.py", '__version__ = "0.')):
        file = source / name
        text = file.read_text()
        assert text.count(old) == 1
        file.write_text(text.replace(old, old.replace("0.", "9.")))
    folder = source / "metaclaw_core" / "store" / "migrations"
    (folder / "m9000_later.py").write_text(MIGRATION)
    init = folder / "__init__.py"
    text = init.read_text()
    more = "from metaclaw_core.store.migrations.m9000_later import m9000_later\n\nMIGRATIONS = (*MIGRATIONS, m9000_later)\n\n"
    init.write_text(text.replace("migrations = Table(", more + "migrations = Table(", 1))


@pytest.fixture
def python(tmp_path: Path, metaclaw_home: Path) -> Iterator[Path]:
    yield scratch_python(tmp_path / "venv")
    for proxy in running_proxies(metaclaw_home):
        os.kill(proxy.pid, signal.SIGKILL)


def test_an_upgrade_under_a_session_costs_no_turn_and_keeps_what_was_recorded(tmp_path: Path, metaclaw_home: Path, python: Path) -> None:
    def metaclaw(*words: str) -> str:
        done = subprocess.run(
            [str(python.with_name("metaclaw")), *words], env=environment(metaclaw_home), cwd=tmp_path, capture_output=True, text=True, timeout=90
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status() -> dict[str, object]:
        found: dict[str, object] = json.loads(metaclaw("status", "--json"))
        return found

    install(python, build_wheel(tmp_path / "old"))
    port = free_port()
    metaclaw("start", "-d", "--port", str(port))
    before = status()
    where = subprocess.run([str(python), "-P", "-c", "import metaclaw_core as m; print(m.__file__)"], capture_output=True, text=True, check=True)
    assert where.stdout.startswith(str(tmp_path / "venv"))  # and not the checkout

    def answer(received: Received) -> Script:
        return Script(text="word " * 20, pieces=20, every=0.1) if b'"stream"' in received.body else Script(text="done")

    with ScriptedLLM(answer) as llm, Agent(f"http://127.0.0.1:{port}", llm.url) as agent:
        agent.say("How do I resolve a git rebase conflict in two files?")
        first = block(llm.received[-1])
        assert "git-rebase-conflicts" in first
        assert "git rebase" in metaclaw("turns")  # the old version's worker has made the store

        streamed: list[str] = []

        def stream() -> None:
            body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "Tell me a story."}]}
            url = f"{llm.url}/v1/chat/completions"
            with httpx.Client(proxy=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client, client.stream("POST", url, json=body) as answer:
                streamed.extend(line for line in answer.iter_lines() if line)

        install(python, build_wheel(tmp_path / "new", newer))
        other = threading.Thread(target=stream)
        other.start()
        while not streamed and other.is_alive():
            time.sleep(0.02)
        restart = threading.Thread(target=metaclaw, args=("restart",))
        restart.start()
        while restart.is_alive():  # an agent that talks all the time meets each moment of the change
            assert agent.say("And how do I go on after that?") == "done"
        restart.join()
        other.join(30)
        agent.say("Thank you. And what is left to do with the two files?")
        assert agent.retries > 0  # it did meet the moment without a proxy
        assert streamed[-1] == "data: [DONE]"  # what was open was let through to its end
        assert {block(one)[: len(first)] for one in llm.received if b"rebase" in one.body} == {first}

    after = status()
    assert (str(before["version"])[0], str(after["version"])[0]) == ("0", "9")
    assert (after["listen"], after["pid"] != before["pid"]) == ([f"127.0.0.1:{port}"], True)
    rows = [json.loads(line) for line in metaclaw("turns", "--json").splitlines()]
    mine = [row for row in rows if row["user_text"] != "Tell me a story."]
    assert len({row["session_id"] for row in mine}) == 1
    assert len(mine) == len([one for one in llm.received if b"rebase" in one.body])
    with closing(sqlite3.connect(metaclaw_home / "store.db")) as db:
        assert db.execute("SELECT count(*) FROM metaclaw_migrations WHERE name = 'm9000_later'").fetchone() == (1,)
        assert db.execute("SELECT count(*) FROM later").fetchone() == (0,)
    assert " problems." in metaclaw("store", "verify")
    assert "Traceback" not in (metaclaw_home / "logs" / "proxy.log").read_text()
    metaclaw("stop")
