from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skills_ref.validator import validate as reference_validate

from metaclaw_core.errors import SkillError
from metaclaw_core.skills.skill import Provenance, Skill, Status, parse, render, validate

_FULL = Skill(
    name="merge-conflicts",
    description='Resolve conflicts: "theirs" or ours?',
    body="# Steps\n\n---\n\nSee {baseDir}/notes.md and 合并冲突.",
    metadata={"openclaw": {"emoji": "x"}},
    category="coding",
    triggers=("合并冲突", "conflict: what now"),
    provenance=Provenance(("s1", "s2"), "some-model", "2026-11-23T20:38:00+00:00", "0123456789abcdef"),
    extra={"license": "MIT", "user-invocable": False},
)


def test_what_is_written_is_read_back_the_same() -> None:
    assert parse(render(_FULL)) == _FULL


def test_our_own_data_lies_under_metadata_as_text() -> None:
    text = render(Skill("a", "b", "c", category="coding", triggers=("x", "y"), provenance=Provenance(model="m")))
    assert text == (
        "---\nname: a\ndescription: b\nmetadata:\n  metaclaw-category: coding\n  metaclaw-triggers: 'x\n\n    y'\n"
        "  metaclaw-model: m\n---\n\nc\n"
    )


def test_the_reference_validator_accepts_what_we_write(tmp_path: Path) -> None:
    folder = tmp_path / "merge-conflicts"
    folder.mkdir()
    plain = Skill(
        "merge-conflicts",
        _FULL.description,
        _FULL.body,
        category="coding",
        triggers=_FULL.triggers,
        provenance=_FULL.provenance,
    )
    (folder / "SKILL.md").write_text(render(plain), encoding="utf-8")
    assert reference_validate(folder) == []


def test_a_file_in_openclaws_manner_is_read() -> None:
    skill = parse(
        "\ufeff---\r\nname: weather\r\ndescription: Tells the weather.\r\nhomepage: https://example.org\r\n"
        'metadata: {"openclaw": {"requires": {"bins": ["curl"]}}, "metaclaw-triggers": ["天气", "Wetter"]}\r\n---\r\n\r\nBody\r\n'
    )
    assert (skill.name, skill.description, skill.body) == ("weather", "Tells the weather.", "Body")
    assert skill.triggers == ("天气", "Wetter")
    assert skill.metadata == {"openclaw": {"requires": {"bins": ["curl"]}}}
    assert skill.extra == {"homepage": "https://example.org"}
    assert skill.provenance is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("# no front matter", "there is no YAML front matter between two lines of '---'"),
        ("---\nname: a\ndescription: b", "the front matter is empty or not closed by a line of '---'"),
        ("---\n- a\n---\n", "the front matter is empty or not closed by a line of '---'"),
        ("---\nname: 7\ndescription: b\n---\n", "name is missing or not a text"),
        ("---\nname: a\n---\n", "description is missing or not a text"),
        ("---\nname: a\ndescription: ' '\n---\n", "the description is empty"),
        ("---\nname: Ab\ndescription: b\n---\n", "the name 'Ab' may hold only lower-case letters, digits and hyphens"),
        ("---\nname: a--b\ndescription: b\n---\n", "the name 'a--b' begins or ends with a hyphen or has two in a row"),
        ("---\nname: a\ndescription: b\nmetadata: [1]\n---\n", "metadata is not a mapping"),
        (f"---\nname: {'a' * 65}\ndescription: b\n---\n", "the name has 65 characters, at most 64 are allowed"),
        (
            f"---\nname: a\ndescription: {'b' * 1025}\n---\n",
            "the description has 1025 characters, at most 1024 are allowed",
        ),
        (
            f"---\nname: a\ndescription: b\ncompatibility: {'c' * 501}\n---\n",
            "compatibility is not a text of at most 500 characters",
        ),
    ],
)
def test_a_fault_is_named(text: str, fault: str) -> None:
    with pytest.raises(SkillError) as error:
        parse(text)
    assert str(error.value) == fault


def test_bad_yaml_is_a_fault_that_says_where() -> None:
    with pytest.raises(SkillError, match=r"not valid YAML \(mapping values are not allowed.*line 3"):
        parse("---\nname: a\ndescription: use when: this\n---\n")


def test_the_name_must_be_that_of_the_folder() -> None:
    with pytest.raises(SkillError, match="the name 'a' is not that of its folder 'b'"):
        parse("---\nname: a\ndescription: d\n---\n", source=Path("/x/b"))


def test_a_name_in_any_script_is_allowed() -> None:
    assert validate(Skill("会议纪要", "d")) == []


@pytest.mark.parametrize(
    ("written", "triggers"),
    [
        (">-\n    merge conflict, both modified,\n    合并冲突，解决冲突、変基", ("merge conflict", "both modified", "合并冲突", "解决冲突", "変基")),
        ("|\n    merge conflict\n    yes, do it", ("merge conflict", "yes, do it")),
        ("[merge conflict, 'yes, do it']", ("merge conflict", "yes, do it")),
        ("'one phrase'", ("one phrase",)),
        ("', ,'", ()),
        ("7", ()),
    ],
)
def test_triggers_are_a_list_or_lines_or_stand_between_commas(written: str, triggers: tuple[str, ...]) -> None:
    text = f"---\nname: a\ndescription: b\nmetadata:\n  metaclaw-triggers: {written}\n---\n\nc\n"
    assert parse(text).triggers == triggers


@pytest.mark.parametrize("triggers", [("yes, do it",), ("yes, do it", "合并、冲突"), ("plain",)])
def test_a_comma_within_a_phrase_survives_writing_and_reading(triggers: tuple[str, ...]) -> None:
    skill = Skill("a", "b", "c", triggers=triggers)
    assert parse(render(skill)) == skill


def test_the_hash_is_of_the_content_and_not_of_status_or_origin() -> None:
    one = Skill("a", "b", "c")
    assert one.content_hash == Skill("a", "b", "c", status=Status.STALE, provenance=Provenance(model="m")).content_hash
    assert one.content_hash != Skill("a", "b", "d").content_hash
    assert len(one.content_hash) == 16


_LINE = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp", "Zs")), min_size=1, max_size=30)


@settings(deadline=None)
@given(
    _LINE,
    st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\u2028\u2029\x85"), max_size=80),
    _LINE,
)
def test_any_printable_text_survives_writing_and_reading(description: str, body: str, trigger: str) -> None:
    skill = Skill("a", description, body.strip(), triggers=(trigger,))
    assert parse(render(skill)) == skill
