"""Wheels of this checkout, and a Python of their own to install them in."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_tools import ROOT


def build_wheel(folder: Path, change: Callable[[Path], None] = lambda source: None) -> Path:
    """The wheel of this checkout as it is, after `change` has edited a copy of it. Skips where there is no hatchling."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed (scripts/test installs it)")
    source, out = folder / "checkout", folder / "wheel"
    for name in ("metaclaw_core", "skills", "addons"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    change(source)
    _run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(out), str(source))
    (file,) = out.glob("*.whl")
    return file


def scratch_python(folder: Path) -> Path:
    """The interpreter of a new environment that has all that this one has but our own package (which is editable here)."""
    venv.create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def install(python: Path, wheel: Path) -> None:
    _run("-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--no-warn-script-location", "-q", str(wheel))


def _run(*words: str) -> None:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
