"""Where the lean proxy, which runs under ``python -O``, keeps what that compiles."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from metaclaw_core.cli.optimised import compiled_folder


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "kept_or_not"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return folder


def test_beside_the_sources_where_they_can_be_written(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert compiled_folder("kept_or_not", ()) == ""


def test_beside_the_sources_where_it_is_already(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    kept = Path(importlib.util.cache_from_source(str(package / "__init__.py"), optimization=1))
    kept.parent.mkdir()
    kept.touch()
    assert compiled_folder("kept_or_not", (package,)) == ""


def test_else_in_the_first_folder_that_can_be_written(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    read_only = Path("/proc/self")  # nobody can write there, root neither
    assert compiled_folder("kept_or_not", (read_only, tmp_path / "new")) == tmp_path / "new" / "metaclaw-compiled"
    assert compiled_folder("kept_or_not", (read_only,)) is None


def test_nowhere_for_a_package_that_is_not_there(tmp_path: Path) -> None:
    assert compiled_folder("no_such_package_at_all", (tmp_path,)) is None
