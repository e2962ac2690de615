"""``metaclaw skills`` as people use it, mistakes included."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

ZEBRA = "---\nname: zebra\ndescription: Feed the zebra and the quokka at noon.\n---\n\nCarrots first.\n"


def folder(parent: Path, name: str, text: str | bytes = ZEBRA) -> Path:
    made = parent / name
    made.mkdir(parents=True)
    (made / "SKILL.md").write_bytes(text.encode() if isinstance(text, str) else text)
    return made


def test_a_skill_is_added_found_shown_archived_and_brought_back(cli, tmp_path):
    added = cli("skills", "add", str(folder(tmp_path, "zebra")))
    assert (added.code, added.out) == (0, "zebra is in your skills (generation 1).\n")
    (hit, *_) = [json.loads(line) for line in cli("skills", "search", "feed the zebra", "--json").out.splitlines()]
    assert hit["name"] == "zebra"
    assert "Carrots first." in cli("skills", "show", "zebra").out
    assert cli("skills", "archive", "zebra").out == "zebra is archived (generation 2).\n"
    assert cli("skills", "search", "feed the zebra", "--json").out == ""
    assert cli("skills", "rollback", "1").out == "Your skills are those of generation 1 again (as generation 3).\n"
    assert [line.split()[2] for line in cli("skills", "rollback").out.splitlines()[1:]] == ["add", "archived", "rollback"]
    assert "zebra" in [json.loads(line)["name"] for line in cli("skills", "list", "--json").out.splitlines()]


def test_a_skill_that_is_too_long_to_be_injected_is_added_and_says_so(cli, tmp_path):
    ran = cli("skills", "add", str(folder(tmp_path, "zebra", ZEBRA + "zebra paint. " * 2500)))
    assert (ran.code, ran.out) == (0, "zebra is in your skills (generation 1).\n")
    assert ran.err == "It is too long to be injected: skills.max_injected_tokens is 2,000.\n"


@pytest.mark.parametrize("words", [".", "SKILL.md", "../zebra", "../zebra/"])
def test_a_skill_may_be_named_from_within_its_folder(cli, tmp_path, monkeypatch, words):
    monkeypatch.chdir(folder(tmp_path, "zebra"))
    assert cli("skills", "validate", words).code == 0
    assert cli("skills", "add", words).code == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"\xff\xfe", "SKILL.md is not UTF-8"),
        ("hello", "there is no YAML front matter between two lines of '---'"),
        (ZEBRA.replace("zebra", "Zebra", 1), "the name 'Zebra' may hold only lower-case letters, digits and hyphens"),
        (ZEBRA.replace("zebra", "horse", 1), "the name 'horse' is not that of its folder 'zebra'"),
        (ZEBRA + "x" * (1 << 20), "SKILL.md has 1048664 bytes, at most 1048576 are read"),
    ],
)
def test_what_is_no_skill_is_refused_with_its_reason_and_skipped_in_the_library(cli, tmp_path, metaclaw_home, text, reason):
    path = folder(tmp_path, "zebra", text)
    added = cli("skills", "add", str(path))
    assert (added.code, added.out) == (1, "")
    assert added.err.startswith(f"metaclaw: {path} is not a valid skill: {reason}")
    checked = cli("skills", "validate", str(path))
    assert checked.code == 1
    assert checked.out.startswith(f"{path}: {reason}")
    path.rename(folder(metaclaw_home / "skills", "other").with_name("zebra"))
    listed = cli("skills", "list")
    assert listed.code == 0
    assert "git-rebase-conflicts" in listed.out
    assert f"skipped: {metaclaw_home / 'skills' / 'zebra' / 'SKILL.md'}: {reason}" in listed.err


def test_a_folder_without_a_skill_and_a_pipe_are_named_and_not_waited_for(cli, tmp_path):
    empty, pipe = tmp_path / "empty", tmp_path / "pipe"
    empty.mkdir()
    pipe.mkdir()
    os.mkfifo(pipe / "SKILL.md")
    for path in (empty, pipe):
        ran = cli("skills", "add", str(path))
        assert (ran.code, ran.err) == (1, f"metaclaw: {path} is not a valid skill: there is no file SKILL.md.\n")
        assert cli("skills", "validate", str(path)).out.startswith(f"{path}: there is no file SKILL.md\n")


def test_a_folder_of_skill_folders_has_each_of_them_checked(cli, tmp_path):
    bank = tmp_path / "bank"
    bank.mkdir()
    folder(bank, "zebra")
    folder(bank, "horse", "hello")
    folder(bank, ".hidden", "hello")
    (bank / "notes").mkdir()
    ran = cli("skills", "validate", str(bank))
    assert (ran.code, ran.out) == (
        1,
        f"{bank}/horse: there is no YAML front matter between two lines of '---'\n2 checked, 1 not valid.\n",
    )
    rows = [json.loads(line) for line in cli("skills", "validate", "--json", str(bank), str(bank / "zebra")).out.splitlines()]
    assert [(row["path"], bool(row["problems"])) for row in rows] == [(f"{bank}/horse", True), (f"{bank}/zebra", False)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show", "nope"), "metaclaw: There is no skill 'nope'; see `metaclaw skills list --all`.\n"),
        (("rollback", "9"), "metaclaw: There is no generation 9; there are 0 to 0.\n"),
        (("approve", "nope"), "metaclaw: There is no candidate 'nope'; see `metaclaw skills review`.\n"),
        (("reject", "nope"), "metaclaw: 'nope' is neither a candidate nor quarantined; see `metaclaw skills review`.\n"),
        (("diff", "nope"), "metaclaw: There is no candidate 'nope'; see `metaclaw skills review`.\n"),
    ],
)
def test_a_name_that_is_not_there_is_one_sentence(cli, words, message):
    ran = cli("skills", *words)
    assert (ran.code, ran.out, ran.err) == (1, "", message)
