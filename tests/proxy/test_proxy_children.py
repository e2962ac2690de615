import asyncio
import json
import os
import time
from pathlib import Path

import pytest

from metaclaw_core.proxy.children import Child, child_environment

# A module that tells what it got, then follows its stdin as the worker does.
PROBE = """
import json, os, sys
keys = ("METACLAW_HOME", "PROBE", "HTTPS_PROXY", "https_proxy")
with open(os.environ["PROBE_FILE"], "a") as file:
    file.write(json.dumps({"pid": os.getpid(), "cwd_on_path": "" in sys.path or os.getcwd() in sys.path,
        **{k: os.environ.get(k) for k in keys}}) + "\\n")
print("a word", file=sys.stderr)
if os.environ.get("PROBE") == "dies":
    sys.exit(3)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "probe.py").write_text(PROBE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    monkeypatch.setenv("PROBE_FILE", str(tmp_path / "told"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return tmp_path


@pytest.fixture
async def start(folder):
    """A child that is started now and gone after the test."""
    children = []

    def new(home: str = "mc", **environment: str) -> Child:
        child = Child("probe", folder / home, environment=environment)
        children.append(child)
        child.start()
        return child

    yield new
    for child in children:
        child.stop()
        if child.pid is not None:
            await ended(child.pid)
    await asyncio.sleep(0.05)  # asyncio closes its pipes


async def told(folder, count: int) -> list[dict[str, object]]:
    file = folder / "told"
    deadline = time.monotonic() + 15
    while not file.exists() or file.read_text().count("\n") < count:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    return [json.loads(line) for line in file.read_text().splitlines()]


async def ended(pid: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{pid} is still there")


async def test_a_child_gets_home_and_variables_but_no_proxy_and_nothing_from_the_current_folder(folder, start):
    child = start(PROBE="x")
    (first,) = await told(folder, 1)
    assert first["METACLAW_HOME"] == str(folder / "mc")
    assert first["PROBE"] == "x"
    assert first["HTTPS_PROXY"] is first["https_proxy"] is None
    assert first["cwd_on_path"] is False
    assert child.pid == first["pid"]
    child.stop()
    await ended(first["pid"])
    log = folder / "mc" / "logs" / "probe.log"
    assert log.read_text() == "a word\n"
    assert log.stat().st_mode & 0o777 == 0o600


async def test_a_child_that_dies_comes_back_and_says_so_once(folder, start, caplog):
    child = start(PROBE="dies")
    await told(folder, 3)
    assert child.restarts >= 2
    assert child.last_exit == 3
    assert caplog.text.count("the probe ended (status 3); starting it again") == 1


async def test_a_child_that_is_renewed_starts_again_at_once_with_the_new_variables(folder, start, caplog):
    child = start(PROBE="a")
    await told(folder, 1)
    child.renew({"PROBE": "b"})
    first, second = await told(folder, 2)
    assert (first["PROBE"], second["PROBE"]) == ("a", "b")
    await ended(first["pid"])
    assert child.restarts == 0
    assert caplog.text == ""


@pytest.mark.parametrize("wait", [0.0, 0.001, 0.02])
async def test_a_child_that_is_stopped_while_it_starts_does_not_stay(start, wait):
    child = start()
    await asyncio.sleep(wait)
    child.stop()
    await asyncio.sleep(0.1)
    if child.pid is not None:
        await ended(child.pid)
    assert child.restarts == 0


async def test_a_command_that_can_not_be_started_is_named_and_traffic_goes_on(folder, start, caplog):
    (folder / "file").touch()  # no folder for the log
    start("file")
    await asyncio.sleep(0.05)
    assert "the probe can't be started" in caplog.text


def test_the_package_is_found_from_a_checkout_too(tmp_path):
    path = Path(child_environment(tmp_path)["PYTHONPATH"].split(os.pathsep)[0])
    assert (path / "metaclaw_core").is_dir()
