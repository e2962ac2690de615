"""The built-in bank is checked as text: format, size, and that each skill can be acted on.

Whether a skill is good advice can't be tested here. What can be: that a stranger's validator accepts it, that it fits the
injection budget, that it is not the twin of another, that it holds steps and a way to check the result, and that it
carries nothing a reader should distrust (addresses, piped installers, hidden characters). The last test asks the real
index a dozen questions in the user's languages: it guards the trigger phrases, and is no measure of retrieval.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
from skills_ref import SkillProperties, validate
from skills_ref import read_properties as read_from_disk
from skills_ref.parser import parse_frontmatter

from metaclaw_core.skills.build import build_index
from metaclaw_core.skills.index import Index
from metaclaw_core.skills.inject import SkillText, estimate_tokens, render_skill
from metaclaw_core.skills.library import Library

BANK = Path(__file__).resolve().parents[2] / "skills"
FOLDERS = sorted(p for p in BANK.iterdir() if p.is_dir())
CATEGORIES = {
    "coding",
    "research",
    "data_analysis",
    "productivity",
    "security",
    "communication",
    "automation",
    "agentic",
}
FENCE = re.compile(r"^ *```.*?^ *```", re.M | re.S)

each_skill = pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)


@cache  # the reference parser takes milliseconds a file
def read_properties(folder: Path) -> SkillProperties:
    return read_from_disk(folder)


def text_of(folder: Path) -> str:
    return (folder / "SKILL.md").read_text(encoding="utf-8")


@cache
def body_of(folder: Path) -> str:
    body: str = parse_frontmatter(text_of(folder))[1]
    return body


def metadata_of(folder: Path) -> dict[str, str]:
    return read_properties(folder).metadata or {}


def triggers_of(folder: Path) -> list[str]:
    return [t.strip() for t in metadata_of(folder)["metaclaw-triggers"].split(",")]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)


def test_the_bank_holds_at_least_44_skills() -> None:
    assert len(FOLDERS) >= 44


def test_the_bank_folder_holds_only_skills() -> None:
    assert [p.name for p in BANK.rglob("*") if p.is_file() and p.name != "SKILL.md"] == []


def test_every_category_is_present_and_none_other() -> None:
    assert {metadata_of(f)["metaclaw-category"] for f in FOLDERS} == CATEGORIES


@each_skill
def test_the_reference_validator_has_no_complaint(folder: Path) -> None:
    assert validate(folder) == []


@each_skill
def test_the_front_matter_is_complete(folder: Path) -> None:
    properties = read_properties(folder)
    assert properties.name == folder.name
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", properties.name)
    assert len(properties.name) <= 64
    assert properties.license == "MIT"
    assert set(metadata_of(folder)) == {"metaclaw-category", "metaclaw-triggers"}


@each_skill
def test_the_description_says_what_and_when_in_one_line(folder: Path) -> None:
    description = read_properties(folder).description
    assert 100 <= len(description) <= 200
    assert "\n" not in description
    assert re.search(r"\bUse (when|for|at|after|before)\b", description)


@each_skill
def test_the_body_has_120_to_400_words(folder: Path) -> None:
    assert 120 <= len(body_of(folder).split()) <= 400


@each_skill
def test_the_body_has_numbered_steps_and_a_check(folder: Path) -> None:
    body = body_of(folder)
    assert re.search(r"^1\. ", body, re.M)
    assert re.search(r"^2\. ", body, re.M)
    assert re.search(r"^(#+ )?(Check|Verify|Done when)\b", body, re.M)


@each_skill
def test_numbered_steps_count_up_without_gaps(folder: Path) -> None:
    numbers = [int(n) for n in re.findall(r"^(\d+)\. ", FENCE.sub("", body_of(folder)), re.M)]
    assert numbers == list(range(1, len(numbers) + 1))


@each_skill
def test_code_fences_are_closed(folder: Path) -> None:
    assert len(re.findall(r"^ *```", body_of(folder), re.M)) % 2 == 0


@each_skill
def test_no_address_and_no_piped_installer(folder: Path) -> None:
    text = text_of(folder)
    assert "://" not in text
    assert not re.search(r"\b(curl|wget)\b[^\n]*\|\s*(sudo\s+)?(ba|z)?sh\b", text)


@each_skill
def test_no_invisible_characters(folder: Path) -> None:
    odd = [c for c in text_of(folder) if c != "\n" and unicodedata.category(c) in {"Cc", "Cf", "Co", "Cs"}]
    assert odd == []


@each_skill
def test_triggers_hold_twelve_phrases_chinese_and_japanese_among_them(folder: Path) -> None:
    triggers = triggers_of(folder)
    assert all(triggers), "an empty phrase"
    assert len(triggers) == len(set(triggers)), [t for t, n in Counter(triggers).items() if n > 1]
    joined = " ".join(triggers)
    assert re.search(r"[\u4e00-\u9fff]", joined), "no Chinese"
    assert re.search(r"[\u3040-\u30ff]", joined), "no Japanese kana"
    assert len(triggers) >= 12


def test_no_trigger_phrase_belongs_to_two_skills() -> None:
    owners = Counter(t.casefold() for f in FOLDERS for t in triggers_of(f))
    assert [t for t, n in owners.items() if n > 1] == []


def test_no_two_descriptions_are_near_duplicates() -> None:
    described = {f.name: words(read_properties(f).description) for f in FOLDERS}
    assert [(a, b) for a, b in combinations(described, 2) if jaccard(described[a], described[b]) >= 0.6] == []


def test_no_two_bodies_are_near_duplicates() -> None:
    bodies = {f.name: words(body_of(f)) for f in FOLDERS}
    assert [(a, b) for a, b in combinations(bodies, 2) if jaccard(bodies[a], bodies[b]) >= 0.5] == []


def test_our_own_library_reads_all_of_it_without_a_problem(tmp_path: Path) -> None:
    scan = Library(tmp_path / "none", bundled=BANK).scan()
    assert scan.problems == ()
    assert [s.name for s in scan.usable] == [f.name for f in FOLDERS]


@each_skill
def test_four_skills_fit_the_default_budget(folder: Path) -> None:
    properties = read_properties(folder)
    rendered = render_skill(SkillText(properties.name, properties.description, body_of(folder)))
    assert estimate_tokens(rendered) <= 500  # a quarter of skills.max_injected_tokens


@pytest.fixture(scope="module")
def index() -> Index:
    return build_index(Library(BANK / "none", bundled=BANK).skills())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("container exits immediately with code 137", "docker-debugging"),
        ("I did git reset --hard and my commits are gone", "git-recover-lost-work"),
        ("write a query for revenue per month and customer", "sql-query-writing"),
        ("anything urgent in my inbox?", "inbox-triage"),
        ("is the difference statistically significant?", "ab-test-statistics"),
        ("Die Festplatte ist voll", "disk-full"),
        ("Schreib mir bitte ein Protokoll der Besprechung", "meeting-minutes"),
        ("服务器磁盘满了怎么办", "disk-full"),
        ("帮我写一封邮件给客户", "write-email"),
        ("会議の議事録を作って", "meeting-minutes"),
        ("正規表現を書いてください", "regex-building"),
        ("el puerto 8080 está en uso", "process-and-port-diagnosis"),
        ("traduire ce texte en anglais", "translate-text"),
    ],
)
def test_a_plain_request_finds_its_skill_in_the_users_language(index: Index, text: str, name: str) -> None:
    assert [hit.name for hit in index.search(text, k=1)] == [name]


@pytest.mark.parametrize(
    "text", ["hello there", "thanks, that was great", "你好", "Danke dir", "今日の天気は", "tell me a joke"]
)
def test_small_talk_finds_nothing(index: Index, text: str) -> None:
    assert index.search(text) == []
