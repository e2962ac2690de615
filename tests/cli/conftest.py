"""The commands, run in this process: what was printed, and the exit status as `metaclaw` would give it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from metaclaw_core.cli.main import group
from metaclaw_core.errors import MetaClawError


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(metaclaw_home: Path) -> Callable[..., Ran]:
    """``cli("config", "show")`` → Ran; `input` is what the person types."""

    def run(*words: str, input: str | None = None) -> Ran:
        result = CliRunner().invoke(group, list(words), input=input, prog_name="metaclaw")
        if isinstance(result.exception, MetaClawError):
            return Ran(1, result.stdout, f"{result.stderr}metaclaw: {result.exception}\n")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def config(metaclaw_home: Path) -> Path:
    """Where config.yaml is, its folder made."""
    metaclaw_home.mkdir()
    return metaclaw_home / "config.yaml"
