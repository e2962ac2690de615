"""Where the lean proxy, which runs under ``python -O``, keeps what that compiles."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from metaclaw_core.cli.optimised import compiled_folder
from metaclaw_core.proxy.startoptions import only_tcp as carries_no_quic


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


def test_not_in_a_folder_that_another_user_made(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies there is run."""
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    planted = tmp_path / "one" / "metaclaw-compiled"
    planted.mkdir(parents=True)
    os.chown(planted, 65534, 65534)
    assert compiled_folder("kept_or_not", (tmp_path / "one", tmp_path / "two")) == tmp_path / "two" / "metaclaw-compiled"


@pytest.mark.parametrize("beside", [True, False])
def test_folders_that_are_to_stay_clean_do(tmp_path: Path, beside: bool) -> None:
    """With PYTHONDONTWRITEBYTECODE: what is beside the sources is read and nothing added; what is kept elsewhere is written."""
    package = tmp_path / "mitmproxy"  # the first of its name on the path
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "other.py").touch()
    command = "from metaclaw_core.cli import optimised as o; o.environment_folder = lambda: o.Path('environment'); o.optimise([]); import mitmproxy.other"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "METACLAW_HOME": str(tmp_path / "home")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if beside:
        subprocess.run([sys.executable, "-O", "-c", "import mitmproxy"], env=environment, check=True)
    before = sorted(package.rglob("*.pyc"))
    line = [sys.executable, "-c", command + "; import os, sys; print(sys.flags.optimize, os.environ['PYTHONDONTWRITEBYTECODE'])"]
    ran = subprocess.run(line, env=environment | {"PYTHONDONTWRITEBYTECODE": "1"}, cwd=tmp_path, capture_output=True, text=True, check=True, umask=0o022)
    assert ran.stdout == "1 1\n"
    assert sorted(package.rglob("*.pyc")) == before
    assert len(before) == beside
    assert (tmp_path / "environment").exists() != beside
    if not beside:
        assert [(tmp_path / "environment" / name).stat().st_mode & 0o777 for name in ("", "metaclaw-compiled")] == [0o755, 0o700]
        assert list((tmp_path / "environment").rglob("other.*.pyc"))


@pytest.mark.parametrize(
    ("sets", "only_tcp"),
    [
        ([], True),
        (["metaclaw_mode=rl", "mode=regular"], True),
        (["mode=upstream:http://127.0.0.1:1"], True),
        (["mode=regular", "mode=local"], False),
        (["mode=reverse:https://llm.test"], False),  # HTTP/3 as well
        (["mode=nonsense"], False),
    ],
)
def test_not_where_quic_is_carried(sets: list[str], only_tcp: bool) -> None:
    """mitmproxy does a step of reading its first packet within an assertion."""
    assert carries_no_quic(sets) is only_tcp
