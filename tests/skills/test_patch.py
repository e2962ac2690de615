from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from metaclaw_core.jobs import IndexKeeper
from metaclaw_core.settings import Settings, Skills
from metaclaw_core.skills import Index, Library, Skill, Status, build_index, load_index, save_index
from metaclaw_core.skills.build import INDEX_FILE, library_fingerprint, needs_build, publish
from metaclaw_core.skills.indexfile import read_origin
from metaclaw_core.skills.patch import patch_file, patched


def test_an_index_made_from_nothing_scores_as_a_build_does(skills: tuple[Skill, ...], asked: dict[str, str]) -> None:
    made, built = patched(Index(), skills), build_index(skills)
    assert made is not None
    assert made.cutoff == pytest.approx(built.cutoff)
    for text in asked:
        assert [(h.name, pytest.approx(h.score, rel=1e-4)) for h in made.search(text)] == built.search(text)


def test_what_is_new_changed_or_gone_is_put_right_in_one_generation(skills: tuple[Skill, ...]) -> None:
    before = build_index(skills, generation=7)
    changed = Skill("meal-plan", "Plan dinners with lentils.")
    new = Skill("knots", "Tie a bowline or a clove hitch.")
    resting = Skill("csv-cleaning", "Clean a CSV file.", status=Status.ARCHIVED)
    rest = [s for s in skills if s.name not in ("meal-plan", "csv-cleaning", "bike-repair")]
    after = patched(before, [*rest, changed, new, resting])
    assert after is not None
    assert set(after.names) == {s.name for s in skills} - {"csv-cleaning", "bike-repair"} | {"knots"}
    assert after.search("how to tie a bowline?")[0].name == "knots"
    assert after.search("something with lentils", cutoff=0)[0].name == "meal-plan"
    assert (before.generation, after.generation) == (7, 8)
    assert "bike-repair" in before  # it is left as it was


def test_an_unchanged_library_is_the_same_index(skills: tuple[Skill, ...]) -> None:
    before = build_index(skills)
    after = patched(before, skills)
    assert after is not None
    assert after.state is before.state


def test_more_differences_than_allowed_are_no_matter_of_a_patch(skills: tuple[Skill, ...]) -> None:
    assert patched(Index(), skills, most=len(skills) - 1) is None
    assert patched(build_index(skills), skills[3:], most=2) is None
    assert patched(build_index(skills), skills[2:], most=2) is not None


async def test_a_patched_file_asks_for_a_build_which_then_counts_anew(tmp_path: Path, skills: tuple[Skill, ...]) -> None:
    path = tmp_path / INDEX_FILE
    await publish(skills[:-1], path, origin="old")
    mean = load_index(path).state.head.mean_length
    patch_file(path, skills, "new")
    assert load_index(path).names == tuple(s.name for s in skills)
    assert (read_origin(path), needs_build(tmp_path, "new")) == ("new~", True)
    assert load_index(path).state.head.mean_length == mean
    index = await publish(skills, path, origin="new")
    assert (index.generation, needs_build(tmp_path, "new")) == (3, False)
    assert load_index(path).state.head.mean_length == build_index(skills).state.head.mean_length != mean


def test_a_damaged_file_and_an_empty_library_are_left_to_a_build(tmp_path: Path, skills: tuple[Skill, ...]) -> None:
    path = tmp_path / INDEX_FILE
    assert patch_file(path, (), "x") is None
    path.write_bytes(b"METACLAW-SKILLS\n garbage")
    assert patch_file(path, skills, "x") is None
    assert path.read_bytes() == b"METACLAW-SKILLS\n garbage"


class Slow:
    """An embedder that lets somebody else write the file while it works."""

    model = "slow"

    def __init__(self, path: Path, meanwhile: Index) -> None:
        self._path, self._meanwhile = path, meanwhile

    async def embed(self, texts: object, timeout: float) -> object:
        import numpy as np

        save_index(self._meanwhile, self._path)
        return np.ones((len(texts), 2), np.float32)  # type: ignore[arg-type]

    async def aclose(self) -> None:
        pass


async def test_a_build_leaves_a_file_that_was_patched_meanwhile(tmp_path: Path, skills: tuple[Skill, ...]) -> None:
    path = tmp_path / INDEX_FILE
    newer = build_index(skills)
    found = await publish(skills[:-1], path, origin="x", embedder=Slow(path, newer))  # type: ignore[arg-type]
    assert found.names == newer.names == load_index(path).names


def settings_for(tmp_path: Path, count: int) -> Settings:
    library = tmp_path / "mine"
    for n in range(count):
        (library / f"own-{n:04}").mkdir(parents=True)
        text = f"---\nname: own-{n:04}\ndescription: Frobnicate zorp number{n}.\n---\n\nTurn quux{n % 7}.\n"
        (library / f"own-{n:04}" / "SKILL.md").write_text(text)
    return Settings(skills=Skills(dir=str(library)))


async def until_built(keeper: IndexKeeper, home: Path, settings: Settings) -> None:
    async with asyncio.timeout(60):
        while needs_build(home, library_fingerprint(settings)):
            await keeper.refresh()
            await asyncio.sleep(0.02)
    await keeper.aclose()


@pytest.mark.slow
async def test_a_fresh_home_is_patched_first_and_what_is_added_during_the_build_too(
    metaclaw_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path, 1)
    monkeypatch.setenv("METACLAW_SKILLS_DIR", settings.skills.dir)
    keeper = IndexKeeper(settings, metaclaw_home)
    first = await keeper.refresh()
    assert (first.built, first.skills) == (True, len(load_index(metaclaw_home / INDEX_FILE)))
    assert "own-0000" in load_index(metaclaw_home / INDEX_FILE)
    assert not (await keeper.refresh()).built  # the build has begun
    Library(Path(settings.skills.dir)).add(Skill("knots", "Tie a bowline."))
    assert (await keeper.refresh()).built
    assert load_index(metaclaw_home / INDEX_FILE).search("a bowline, please", cutoff=0)[0].name == "knots"
    await until_built(keeper, metaclaw_home, settings)
    index = load_index(metaclaw_home / INDEX_FILE)
    assert {"knots", "own-0000"} <= set(index.names)
    assert read_origin(metaclaw_home / INDEX_FILE) == library_fingerprint(settings)


@pytest.mark.slow
async def test_of_a_library_too_large_for_a_patch_every_skill_is_in_the_first_build(
    metaclaw_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path, 620)
    monkeypatch.setenv("METACLAW_SKILLS_DIR", settings.skills.dir)
    keeper = IndexKeeper(settings, metaclaw_home)
    assert not (await keeper.refresh()).built
    await until_built(keeper, metaclaw_home, settings)
    index = load_index(metaclaw_home / INDEX_FILE)
    assert {f"own-{n:04}" for n in range(620)} <= set(index.names)
    assert index.search("number619", cutoff=0)[0].name == "own-0619"
