from __future__ import annotations

from pathlib import Path

from metaclaw_core.skills import IndexWatcher, Skill, build_index, save_index


def publish(path: Path, name: str, generation: int) -> None:
    save_index(build_index([Skill(name, "d")], generation=generation), path)


def test_a_watcher_is_empty_until_there_is_a_file_and_then_follows_it(tmp_path: Path) -> None:
    watcher = IndexWatcher(tmp_path / "index")
    assert not watcher.poll()
    assert len(watcher.current) == 0
    assert watcher.problem is None
    publish(tmp_path / "index", "one", 1)
    assert watcher.poll()
    first = watcher.current
    assert not watcher.poll()
    publish(tmp_path / "index", "two", 2)
    assert watcher.poll()
    assert (watcher.current.names, watcher.current.generation) == (("two",), 2)
    assert first.names == ("one",)


def test_a_damaged_file_keeps_the_old_index_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "index"
    watcher = IndexWatcher(path)
    publish(path, "one", 1)
    watcher.poll()
    path.write_bytes(path.read_bytes()[:100])  # in place, as no writer of ours does
    assert not watcher.poll()
    assert not watcher.poll()
    assert watcher.current.names == ("one",)
    assert watcher.current.search("one", cutoff=0)
    assert str(watcher.problem).startswith(f"{path} is damaged: its checksum does not fit")
    publish(path, "two", 2)
    assert watcher.poll()
    assert watcher.problem is None


def test_a_vanished_file_keeps_the_old_index(tmp_path: Path) -> None:
    path = tmp_path / "index"
    watcher = IndexWatcher(path)
    publish(path, "one", 1)
    watcher.poll()
    path.unlink()
    assert not watcher.poll()
    assert watcher.problem == f"{path} is gone"
    assert watcher.current.names == ("one",)
