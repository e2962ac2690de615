"""A fake home with a gateway's unit in it, and a `systemctl` that only writes down what it is told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from metaclaw_core.cli.main import group
from metaclaw_core.errors import MetaClawError
from metaclaw_core.wiring.units import GATEWAY, unit_folder

UNIT = "[Unit]\nDescription=OpenClaw Gateway\n\n[Service]\nExecStart=/usr/bin/node gateway\n{environment}\n[Install]\nWantedBy=default.target\n"


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(metaclaw_home: Path) -> Callable[..., Ran]:
    """``cli("wire", "openclaw")`` → Ran, with nobody at the terminal."""

    def run(*words: str) -> Ran:
        result = CliRunner().invoke(group, list(words), prog_name="metaclaw")
        if isinstance(result.exception, MetaClawError):
            return Ran(1, result.stdout, f"{result.stderr}metaclaw: {result.exception}\n")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def user_home(metaclaw_home: Path) -> Path:
    return metaclaw_home.parent / "home"


@pytest.fixture
def gateway(user_home: Path) -> Path:
    """The gateway's unit as `openclaw gateway install` writes it."""
    file = unit_folder(user_home) / GATEWAY
    file.parent.mkdir(parents=True)
    file.write_text(UNIT.format(environment='Environment="HOME=%h"'))
    return file


@pytest.fixture
def service_file(user_home: Path) -> Path:
    """A service of ours that is installed."""
    file = unit_folder(user_home) / "metaclaw.service"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("[Service]\nExecStart=/bin/true\n")
    return file


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Calls of systemctl so far, `--user` left out. It answers like a manager that knows no metaclaw.service, or that
    one runs after `enable --now`."""
    calls, state, folder = tmp_path / "calls", tmp_path / "state", tmp_path / "bin"
    folder.mkdir()
    script = f"""#!{sys.executable}
import pathlib, sys
calls, state = pathlib.Path({str(calls)!r}), pathlib.Path({str(state)!r})
words = [word for word in sys.argv[1:] if word != "--user"]
if words[0] == "show":
    if state.exists():
        print("ActiveState=active\\nSubState=running\\nUnitFileState=enabled\\nMainPID=1\\nNRestarts=0")
    else:
        print("ActiveState=inactive\\nUnitFileState=\\nVersion=252")
    raise SystemExit
with calls.open("a") as file:
    print(*words, file=file)
if words[:2] == ["enable", "--now"]:
    state.touch()
if words[:2] == ["disable", "--now"]:
    state.unlink(missing_ok=True)
"""
    (folder / "systemctl").write_text(script)
    (folder / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "platform", "linux")

    def said() -> list[str]:
        return calls.read_text().splitlines() if calls.exists() else []

    return said
