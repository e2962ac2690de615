from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from metaclaw_core.settings import Settings, Skills
from metaclaw_core.skills import Library, Skill, load_index
from metaclaw_core.skills.build import INDEX_FILE, build_from_settings, library_fingerprint, needs_build, publish
from metaclaw_core.skills.embedding import EmbeddingError


class ScriptedEmbedder:
    model = "scripted"
    fails = False

    async def embed(self, texts: Sequence[str], timeout: float) -> np.ndarray:
        if self.fails:
            raise EmbeddingError("It is down.")
        return np.full((len(texts), 2), 0.7071, np.float32)

    async def aclose(self) -> None:
        pass


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return tmp_path / "mine"


@pytest.fixture
def configured(mine: Path) -> Settings:
    return Settings(skills=Skills(dir=str(mine)))


async def test_an_unchanged_library_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "home" / "index"
    first = await publish([Skill("a", "d")], path, origin="x")
    inode = path.stat().st_ino
    again = await publish([Skill("a", "d")], path, origin="x")
    assert (first.generation, again.generation, path.stat().st_ino) == (1, 1, inode)
    changed = await publish([Skill("a", "e")], path, origin="y")
    assert changed.generation == 2
    assert path.stat().st_ino != inode


async def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "index"
    path.write_bytes(b"garbage")
    await publish([Skill("a", "d")], path)
    assert load_index(path).names == ("a",)


async def test_a_failing_model_leaves_an_index_without_vectors_and_is_tried_again_later(tmp_path: Path) -> None:
    path, embedder = tmp_path / INDEX_FILE, ScriptedEmbedder()
    embedder.fails = True
    with pytest.raises(EmbeddingError):
        await publish([Skill("a", "d")], path, origin="x", embedder=embedder)
    assert load_index(path).state.vectors is None
    assert not needs_build(tmp_path, "x")  # not at once: the next try is ten minutes away
    assert load_index(path).state.origin.startswith("x!")
    embedder.fails = False
    index = await publish([Skill("a", "d")], path, origin="x", embedder=embedder)
    assert index.state.vectors is not None
    assert load_index(path).state.origin == "x"
    generation = index.generation
    assert (await publish([Skill("a", "d")], path, origin="x", embedder=embedder)).generation == generation


async def test_a_change_of_the_library_asks_for_a_build(mine: Path, configured: Settings, metaclaw_home: Path) -> None:
    Library(mine).add(Skill("a-skill-of-this-test", "d"))
    assert needs_build(metaclaw_home, library_fingerprint(configured))
    index, problems = await build_from_settings(configured, metaclaw_home)
    assert "a-skill-of-this-test" in index
    assert problems == []
    assert not needs_build(metaclaw_home, library_fingerprint(configured))
    Library(mine).archive("a-skill-of-this-test")
    assert needs_build(metaclaw_home, library_fingerprint(configured))
    index, _ = await build_from_settings(configured, metaclaw_home)
    assert "a-skill-of-this-test" not in index


async def test_what_could_not_be_read_is_reported(mine: Path, configured: Settings, metaclaw_home: Path) -> None:
    (mine / "bad").mkdir(parents=True)
    (mine / "bad" / "SKILL.md").write_text("no front matter")
    _, problems = await build_from_settings(configured, metaclaw_home)
    assert problems == [f"{mine}/bad/SKILL.md: there is no YAML front matter between two lines of '---'"]


def test_the_build_runs_as_a_process_of_its_own_and_prints_a_report(metaclaw_home: Path) -> None:
    out = subprocess.run(
        [sys.executable, "-m", "metaclaw_core.skills.build"], capture_output=True, text=True, check=True
    )
    report = json.loads(out.stdout)
    assert report == {
        "skills": len(load_index(metaclaw_home / INDEX_FILE)),
        "generation": 1,
        "problems": report["problems"],
    }
