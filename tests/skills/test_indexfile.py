from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaclaw_core.skills import Index, Skill, build_index, load_index, save_index
from metaclaw_core.skills.indexfile import IndexDamaged, read_origin


def test_an_index_comes_back_from_its_file_as_it_was(index: Index, asked: dict[str, str], tmp_path: Path) -> None:
    index.add(Skill("later", "Added after the build.", "b", category="coding", triggers=("später",)))
    path = tmp_path / "index"
    save_index(index, path)
    read = load_index(path)
    assert (read.generation, read.names, read.cutoff) == (2, index.names, index.cutoff)
    for text in asked:
        assert read.search(text) == index.search(text)
    assert read.skill("later") == index.skill("later")
    assert read.state.categories[-1] == "coding"
    assert path.stat().st_mode & 0o777 == 0o600
    read.add(Skill("even-later", "Groom an alpaca.", "Brush it."))
    assert read.search("groom the alpaca")[0].name == "even-later"


def test_vectors_travel_with_the_index(tmp_path: Path) -> None:
    vectors = np.array([[1, 0, 0], [0, 0.6, 0.8]], np.float32)
    index = Index(
        replace(build_index([Skill("a", "x"), Skill("b", "y")]).state, vectors=vectors, embedding_model="m", origin="o")
    )
    save_index(index, tmp_path / "index")
    state = load_index(tmp_path / "index").state
    assert state.embedding_model == "m"
    assert state.vectors is not None
    assert state.vectors.tolist() == vectors.tolist()
    assert read_origin(tmp_path / "index") == "o"


def test_an_empty_index_and_any_name_can_be_written(tmp_path: Path) -> None:
    save_index(Index(), tmp_path / "empty")
    assert len(load_index(tmp_path / "empty")) == 0
    names = ["", "a\nb", "\ud800 lone", "模", "x" * 500]
    save_index(build_index([Skill(name, "description", name) for name in names]), tmp_path / "odd")
    read = load_index(tmp_path / "odd")
    assert read.names == tuple(names)
    assert read.skill("\ud800 lone") == Skill("\ud800 lone", "description", "\ud800 lone")


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_index(tmp_path / "none")
    assert read_origin(tmp_path / "none") is None


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("index") / "index"
    save_index(build_index([Skill("a", "paint a fence", "brush"), Skill("b", "mow", "lawn")]), path)
    return path.read_bytes()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_cut_or_altered_file_is_refused(
    written: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("index") / "index"
    at = data.draw(st.integers(0, len(written) - 1))
    damaged = written[:at] if data.draw(st.booleans()) else written[:at] + bytes([written[at] ^ 1]) + written[at + 1 :]
    path.write_bytes(damaged)
    with pytest.raises(IndexDamaged):
        load_index(path)


def test_another_version_is_named(written: bytes, tmp_path: Path) -> None:
    path = tmp_path / "index"
    path.write_bytes(written[:16] + b"\x63" + written[17:])
    with pytest.raises(IndexDamaged, match="is a skill index of version 99; this program reads version 1"):
        load_index(path)
    assert read_origin(path) is None


@pytest.mark.parametrize(
    "change",
    [(b'"terms": 4', b'"terms": 9'), (b'"names": ["a", "b"]', b'"names": ["a", "a"]'), (b'"sections"', b'"sectionz"')],
)
def test_a_file_with_a_right_checksum_and_wrong_structure_is_refused(
    written: bytes, tmp_path: Path, change: tuple[bytes, bytes]
) -> None:
    assert change[0] in written
    whole = written[:-32].replace(*change)
    path = tmp_path / "index"
    path.write_bytes(whole + hashlib.blake2b(whole, digest_size=32).digest())
    with pytest.raises(IndexDamaged, match="does not have the structure of a skill index"):
        load_index(path)
