from __future__ import annotations

import threading
from pathlib import Path

import pytest

from metaclaw_core.errors import SkillError
from metaclaw_core.settings import Skills
from metaclaw_core.skills import Library, Skill, Status
from metaclaw_core.skills.library import bundled_folder, open_library


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "mine"


@pytest.fixture
def library(folder: Path, tmp_path: Path) -> Library:
    return Library(folder, extra=[tmp_path / "openclaw"], bundled=tmp_path / "bank")


def write(folder: Path, name: str, description: str = "d", body: str = "b", front: str = "") -> Path:
    path = folder / name / "SKILL.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"---\nname: {name}\ndescription: {description}\n{front}---\n\n{body}\n", encoding="utf-8")
    return path


def described(library: Library) -> dict[str, str]:
    return {skill.name: skill.description for skill in library.skills()}


def test_the_users_skill_wins_over_the_extra_folders_and_those_over_the_bank(
    library: Library, folder: Path, tmp_path: Path
) -> None:
    for place, names in (("bank", "abc"), ("openclaw", "bc"), ("mine", "c")):
        for name in names:
            write(tmp_path / place, name, f"from {place}")
    assert described(library) == {"a": "from bank", "b": "from openclaw", "c": "from mine"}


def test_an_invalid_skill_is_reported_by_name_and_reason_and_skipped(library: Library, folder: Path) -> None:
    write(folder, "good")
    write(folder, "bad", "x" * 1100)
    (folder / "worse").mkdir()
    (folder / "worse" / "SKILL.md").write_bytes(b"---\nname: \xff\n")
    scan = library.scan()
    assert [skill.name for skill in scan.skills] == ["good"]
    assert [(p.name, p.reason) for p in scan.problems] == [
        ("bad", "the description has 1100 characters, at most 1024 are allowed"),
        ("worse", "SKILL.md is not UTF-8"),
    ]


def test_an_invalid_skill_of_the_user_does_not_hide_the_banks(library: Library, folder: Path, tmp_path: Path) -> None:
    write(folder, "a", "' '")
    write(tmp_path / "bank", "a", "sound")
    assert described(library) == {"a": "sound"}


def test_extra_folders_are_searched_six_deep_and_hidden_ones_not(library: Library, tmp_path: Path) -> None:
    write(tmp_path / "openclaw/1/2/3/4/5", "deep")
    write(tmp_path / "openclaw/1/2/3/4/5/6", "deeper")
    write(tmp_path / "openclaw/.git", "hidden")
    assert set(described(library)) == {"deep"}


def test_a_missing_folder_is_an_empty_library(tmp_path: Path) -> None:
    library = Library(tmp_path / "none")
    assert library.skills() == ()
    assert library.generation == 0
    assert library.history() == []


def test_an_edited_file_is_read_again(library: Library, folder: Path) -> None:
    write(folder, "a", "old")
    assert described(library) == {"a": "old"}
    write(folder, "a", "newer")
    assert described(library) == {"a": "newer"}


def test_an_added_skill_is_a_folder_like_any_other(library: Library, folder: Path) -> None:
    assert library.add(Skill("a", "d", "see {baseDir}/x")) == 1
    path = folder / "a" / "SKILL.md"
    assert path.read_text(encoding="utf-8") == "---\nname: a\ndescription: d\n---\n\nsee {baseDir}/x\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert Library(folder).get("a") == Skill("a", "d", "see {baseDir}/x", source=folder / "a")


def test_an_invalid_skill_is_not_written(library: Library, folder: Path) -> None:
    with pytest.raises(SkillError, match=r"The skill '\.\./a' can't be written: the name '\.\./a' may hold only"):
        library.add(Skill("../a", "d"))
    assert not folder.exists()


def test_adding_again_replaces_the_text_and_keeps_the_other_files(library: Library, folder: Path) -> None:
    library.add(Skill("a", "one"))
    (folder / "a" / "script.sh").write_text("echo")
    assert library.add(Skill("a", "two")) == 3  # 2 is the script that was put there by hand
    assert described(library) == {"a": "two"}
    assert (folder / "a" / "script.sh").read_text() == "echo"


def test_a_candidate_waits_beside_the_active_one_and_replaces_it_when_promoted(library: Library) -> None:
    library.add(Skill("a", "one"))
    library.add(Skill("a", "two", status=Status.CANDIDATE))
    assert described(library) == {"a": "one"}
    assert [s.description for s in library.scan().candidates] == ["two"]
    library.set_status("a", Status.ACTIVE)
    assert described(library) == {"a": "two"}
    assert library.scan().candidates == ()


def test_a_rejected_candidate_leaves_the_active_one_alone(library: Library) -> None:
    library.add(Skill("a", "one"))
    library.add(Skill("a", "two", status=Status.CANDIDATE))
    library.add(Skill("b", "new", status=Status.CANDIDATE))
    library.reject("a", Status.QUARANTINED, note="asks for the key")
    library.reject("b")
    assert described(library) == {"a": "one"}
    assert library.get("b", Status.ARCHIVED) is not None
    assert [(c.action, c.note) for c in library.history()][-2:] == [
        ("quarantined", "asks for the key"),
        ("archived", "candidate b"),
    ]
    with pytest.raises(SkillError, match="There is no candidate 'a'"):
        library.reject("a")


def test_a_stale_skill_is_still_used_and_an_archived_one_is_not(library: Library) -> None:
    library.add(Skill("a", "d"))
    library.set_status("a", Status.STALE)
    assert described(library) == {"a": "d"}
    library.archive("a", note="not used in 60 days")
    assert described(library) == {}
    assert library.get("a", Status.ARCHIVED) is not None
    library.set_status("a", Status.ACTIVE)
    assert described(library) == {"a": "d"}


def test_archiving_a_skill_of_the_bank_hides_it_without_touching_the_bank(
    library: Library, folder: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "bank", "a", "shipped")
    library.archive("a")
    assert described(library) == {}
    assert path.exists()
    assert (folder / ".archived" / "a" / "SKILL.md").exists()
    library.rollback(0)
    assert described(library) == {"a": "shipped"}


def test_a_quarantined_skill_hides_the_one_below_it(library: Library, tmp_path: Path) -> None:
    write(tmp_path / "openclaw", "a", "poisoned")
    library.set_status("a", Status.QUARANTINED)
    assert described(library) == {}
    assert library.get("a").status is Status.QUARANTINED  # type: ignore[union-attr]


def test_an_unknown_skill_can_not_change_its_status(library: Library) -> None:
    with pytest.raises(SkillError, match="There is no skill 'nope'"):
        library.archive("nope")


def test_every_generation_can_be_restored(library: Library, folder: Path) -> None:
    library.add(Skill("a", "one"))
    library.add(Skill("b", "one"))
    library.add(Skill("a", "two"))
    library.archive("b")
    states = {1: {"a": "one"}, 2: {"a": "one", "b": "one"}, 3: {"a": "two", "b": "one"}, 4: {"a": "two"}, 0: {}}
    for number, (generation, state) in enumerate(states.items(), 5):
        assert library.rollback(generation) == number
        assert described(library) == state
    assert library.rollback(4) == 10
    assert library.get("b", Status.ARCHIVED) is not None
    assert [c.action for c in library.history()][:5] == ["add", "add", "add", "archived", "rollback"]
    assert list(folder.glob(".new-*")) == []


def test_whole_folders_come_back_with_what_may_be_executed(library: Library, folder: Path) -> None:
    write(folder, "a", "by hand")
    script = folder / "a" / "scripts" / "run.sh"
    script.parent.mkdir()
    script.write_text("echo")
    script.chmod(0o755)
    library.archive("a")
    library.rollback(1)
    assert script.read_text() == "echo"
    assert script.stat().st_mode & 0o777 == 0o700


def test_what_was_edited_by_hand_is_recorded_before_it_is_changed(library: Library, folder: Path) -> None:
    library.add(Skill("a", "one"))
    write(folder, "a", "by hand")
    library.add(Skill("a", "two"))
    assert [(c.generation, c.action) for c in library.history()] == [(1, "add"), (2, "edited"), (3, "add")]
    library.rollback(2)
    assert described(library) == {"a": "by hand"}
    assert library.generation == 4


def test_a_generation_that_never_was_is_refused(library: Library) -> None:
    library.add(Skill("a", "d"))
    with pytest.raises(SkillError, match="There is no generation 7; there are 0 to 1"):
        library.rollback(7)
    assert library.generation == 1


def test_a_line_that_a_crash_cut_short_is_no_generation(library: Library, folder: Path) -> None:
    library.add(Skill("a", "one"))
    journal = folder / ".history" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"generation": 2, "act')
    assert library.generation == 1
    assert library.add(Skill("b", "one")) == 2
    assert journal.read_bytes().count(b"\n") == 2


def test_a_crash_between_the_folder_and_the_journal_loses_nothing(library: Library, folder: Path) -> None:
    library.add(Skill("a", "one"))
    journal = folder / ".history" / "journal.jsonl"
    before = journal.read_bytes()
    library.add(Skill("a", "two"))
    journal.write_bytes(before)
    (folder / ".new-0123").mkdir()
    assert library.add(Skill("b", "one")) == 3
    assert [change.action for change in library.history()] == ["add", "edited", "add"]
    assert described(library) == {"a": "two", "b": "one"}
    assert not (folder / ".new-0123").exists()


def test_what_a_killed_writer_left_in_a_skills_folder_does_not_become_part_of_it(library: Library, folder: Path) -> None:
    library.add(Skill("a", "one"))
    library.add(Skill("c", "one", status=Status.CANDIDATE))
    for place in (folder / "a", folder / ".candidate" / "c"):
        (place / ".SKILL.md.0123456789ab.tmp").write_text("half a ski")
    (folder / "a" / ".notes.tmp").write_text("the user's own")
    assert library.add(Skill("b", "one")) == 4
    assert [change.action for change in library.history()] == ["add", "add", "edited", "add"]  # his own file is an edit
    assert list(folder.rglob(".SKILL.md.*")) == []
    assert (folder / "a" / ".notes.tmp").exists()


def test_a_damaged_journal_is_reported_with_its_line(library: Library, folder: Path) -> None:
    library.add(Skill("a", "one"))
    journal = folder / ".history" / "journal.jsonl"
    journal.write_text("garbage\n" + journal.read_text())
    with pytest.raises(SkillError, match=r"Line 1 of .*journal\.jsonl is damaged"):
        library.add(Skill("b", "one"))
    assert described(library) == {"a": "one"}


def test_concurrent_writers_each_get_a_generation_of_their_own(folder: Path) -> None:
    generations: list[int] = []

    def work(name: str) -> None:
        generations.extend(Library(folder).add(Skill(f"{name}{i}", "d")) for i in range(3))

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(generations) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert len(Library(folder).skills()) == 9


def test_a_linked_folder_is_read_and_archiving_it_removes_the_link_only(
    library: Library, folder: Path, tmp_path: Path
) -> None:
    real = write(tmp_path / "elsewhere", "a", "linked")
    folder.mkdir()
    (folder / "a").symlink_to(tmp_path / "elsewhere" / "a")
    assert described(library) == {"a": "linked"}
    library.archive("a")
    assert not (folder / "a").exists()
    assert real.exists()


def test_a_skill_its_author_hides_from_the_model_is_not_used(library: Library, folder: Path) -> None:
    write(folder, "a", front="disable-model-invocation: true\n")
    assert library.skills() == ()
    assert library.get("a") is not None


def test_the_settings_say_where_skills_are(tmp_path: Path) -> None:
    write(tmp_path / "mine", "my-own-skill-of-this-test")
    write(tmp_path / "more", "another-skill-of-this-test")
    library = open_library(Skills(dir=str(tmp_path / "mine"), extra_dirs=(str(tmp_path / "more"),)))
    assert {"my-own-skill-of-this-test", "another-skill-of-this-test"} <= set(described(library))


def test_the_bank_of_the_checkout_is_found() -> None:
    assert bundled_folder().name == "skills"
    assert bundled_folder().is_dir()
