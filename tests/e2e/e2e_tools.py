"""Real processes for end-to-end tests: mitmdump with our script, behind a scripted LLM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "addons" / "metaclaw.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Proxy:
    process: subprocess.Popen[bytes]
    port: int
    home: Path
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(15)


def environment(home: Path) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("METACLAW_")}
    return {**keep, "METACLAW_HOME": str(home), "HOME": str(home.parent)}


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on {port}:\n{log.read_text(errors='replace')}")


@contextmanager
def running_proxy(folder: Path, *arguments: str, command: str = "mitmdump") -> Iterator[Proxy]:
    """mitmdump with our script (or another command) on a free loopback port."""
    home = folder / "metaclaw"
    home.mkdir(exist_ok=True)
    port = free_port()
    log = folder / f"proxy-{port}.log"
    tool = Path(sys.executable).with_name(command)
    line = [str(tool), "--listen-host", "127.0.0.1", "-p", str(port), "--set", f"confdir={folder / 'mitmproxy'}"]
    with log.open("wb") as out:
        process = subprocess.Popen([*line, *arguments], stdout=out, stderr=subprocess.STDOUT, env=environment(home))
    proxy = Proxy(process, port, home, log)
    try:
        wait_for_port(port, process, log)
        yield proxy
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def metaclaw(tmp_path: Path):  # type: ignore[no-untyped-def]
    """The command line with this test's home: ``metaclaw("turns", "--json")`` → CompletedProcess."""
    home = tmp_path / "metaclaw"
    home.mkdir(exist_ok=True)

    def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        tool = Path(sys.executable).with_name("metaclaw")
        result = subprocess.run([str(tool), *arguments], env=environment(home), capture_output=True, text=True, timeout=120)
        assert not check or result.returncode == 0, result.stderr
        return result

    return run
