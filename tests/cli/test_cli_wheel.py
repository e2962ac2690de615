"""A wheel holds all it takes to run, and the addon works from it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from e2e_tools import ROOT, SCRIPT, environment
from wheel_tools import build_wheel

CAPTURE = ROOT / "tests" / "captures" / "openai-completions.mitm"


def test_addon_path_of_a_checkout_is_the_script(cli):
    assert cli("addon-path").out == f"{SCRIPT}\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_the_wheel_holds_skills_script_prompts_and_entry_points(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (points,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert {f"metaclaw_core/_bundled/skills/{p.parent.name}/SKILL.md" for p in (ROOT / "skills").glob("*/SKILL.md")} <= names
    assert "metaclaw_core/_bundled/metaclaw.py" in names
    data = [p for p in (ROOT / "metaclaw_core").rglob("*") if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts]
    assert {str(p.relative_to(ROOT)) for p in data} <= names
    assert "metaclaw = metaclaw_core.cli.main:main" in points
    for group in ("metaclaw.dialects", "metaclaw.agents", "metaclaw.retrievers"):
        assert f"[{group}]" in points
    assert not [name for name in names if name.startswith(("tests", "scripts", "shared", "requirements"))]


@pytest.mark.slow
def test_the_addon_works_from_an_unpacked_wheel_without_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    home = tmp_path / "metaclaw"
    env = environment(home) | {"PYTHONPATH": str(site)}

    def metaclaw(*words: str) -> str:
        line = [sys.executable, "-P", "-m", "metaclaw_core.cli.main", *words]
        result = subprocess.run(line, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        return result.stdout

    script = metaclaw("addon-path").strip()
    assert script == str(site / "metaclaw_core" / "_bundled" / "metaclaw.py")
    assert "git-rebase-conflicts" in metaclaw("skills", "list", "--json")
    mitmdump = str(Path(sys.executable).with_name("mitmdump"))
    result = subprocess.run([mitmdump, "-nr", str(CAPTURE), "-s", script], env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert len(metaclaw("turns", "--json").splitlines()) == 7
    probe = "import metaclaw_core; print(metaclaw_core.__file__)"
    where = subprocess.run([sys.executable, "-P", "-c", probe], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert where.stdout.strip() == os.fspath(site / "metaclaw_core" / "__init__.py")
