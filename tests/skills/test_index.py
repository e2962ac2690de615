from __future__ import annotations

import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaclaw_core.skills import Hit, Index, Skill, Status, build_index


def test_what_people_ask_finds_the_skill_it_takes(index: Index, asked: dict[str, str]) -> None:
    first = {text: index.search(text, 1, cutoff=0)[0].name for text in asked}
    assert {text for text in asked if first[text] != asked[text]} == {"users should log in with OAuth"}
    assert index.search("users should log in with OAuth", cutoff=0)[1].name == "oauth-login"
    assert (
        sum(bool(index.search(text)) for text in asked) == 23
    )  # of 26; each of the others shares two words with its skill


@pytest.mark.parametrize(
    "text",
    [
        "hi",
        "thanks!",
        "yes please",
        "sounds good",
        "who are you?",
        "谢谢",
        "早上好",
        "ありがとうございます",
        "고마워요",
        "Danke, das war's",
    ],
)
def test_small_talk_finds_nothing(index: Index, text: str) -> None:
    assert index.search(text) == []


def test_hits_come_best_first_and_not_more_than_asked_for(index: Index) -> None:
    hits = index.search("review the pull request and resolve the merge conflicts of the rebase", 3)
    assert [hit.name for hit in hits][:2] == ["merge-conflicts", "pull-request-review"]
    assert len(hits) == 3
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    assert index.search("review the pull request", 0) == []


def test_scores_are_those_of_the_formula() -> None:
    index = build_index([Skill("a", "apple pie", "oven"), Skill("b", "pear", "oven oven"), Skill("c", "plum", "")])
    # head: idf(apple) = ln(1 + 2.5/1.5); tf 1, length 5 of ("a" is dropped) apple, pie, "apple pie" = 3, mean 5/3
    hit = index.search("apple", 1, cutoff=0)[0]
    assert hit.name == "a"
    assert hit.score == pytest.approx(0.980829 * 2 / (1 + (0.6 + 0.4 * 3 / (5 / 3))), rel=1e-4)
    # body: idf(oven) = ln(1 + 1.5/2.5); lengths 1, 2, 0, mean 1
    assert index.search("oven", 3, cutoff=0) == [
        Hit("b", pytest.approx(0.470004 * 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 2)), rel=1e-4)),
        Hit("a", pytest.approx(0.470004 * 1 * 2.2 / (1 + 1.2), rel=1e-4)),
    ]


def test_equal_scores_keep_the_order_of_the_library() -> None:
    index = build_index([Skill(name, "quokka husbandry", "feed it") for name in ("third", "first", "second")])
    assert [hit.name for hit in index.search("quokka", cutoff=0)] == ["third", "first", "second"]


def test_the_cutoff_is_about_the_weight_of_the_word_that_says_most_of_a_skill() -> None:
    def cutoff(skills: int, body: str) -> float:
        return round(build_index([Skill(f"name{i}", "thing", f"name{i} {body}") for i in range(skills)]).cutoff, 2)

    assert cutoff(0, "") == 0.0
    assert cutoff(1, "") == 0.27
    assert cutoff(44, "") == 4.6  # two fields, each with a word of its own: 0.68 · 2 · 3.4
    assert cutoff(1000, "") == 11.49
    assert build_index([Skill(f"name{i}", "thing") for i in range(44)]).cutoff == pytest.approx(2.3, abs=0.02)


def test_an_added_skill_is_found_at_once_and_the_generation_moves(index: Index) -> None:
    before = index.generation
    assert index.search("knit a pullover from merino wool") == []
    assert index.add(Skill("knitting", "Knit a pullover or socks.", "Merino wool, needles of 4 mm.")) is index
    assert index.search("knit a pullover from merino wool")[0].name == "knitting"
    assert index.generation == before + 1
    assert len(index) == 37


def test_adding_gives_the_scores_of_a_full_build(skills: tuple[Skill, ...], asked: dict[str, str]) -> None:
    grown = build_index(skills[:30])
    for skill in skills[30:]:
        grown.add(skill)
    built = build_index(skills)
    for text in asked:
        assert [h.name for h in grown.search(text)][:1] == [h.name for h in built.search(text)][:1]
        for one, other in zip(grown.search(text, 3), built.search(text, 3), strict=True):
            assert one.score == pytest.approx(other.score, rel=0.05)  # the mean length is that of the first thirty


def test_an_index_can_grow_from_nothing() -> None:
    index = Index()
    assert index.search("anything") == []
    index.add(Skill("only", "Paint a fence.", ""))
    index.add(Skill("other", "", "Mow the lawn."))
    assert [hit.name for hit in index.search("paint the fence", cutoff=0)] == ["only"]
    assert [hit.name for hit in index.search("mow it", cutoff=0)] == ["other"]


def test_a_skill_of_the_same_name_takes_the_place_of_the_old_one(index: Index) -> None:
    index.add(Skill("git-bisect", "Bake sourdough bread.", "Feed the starter."))
    assert len(index) == 36
    assert index.search("bake sourdough bread")[0].name == "git-bisect"
    assert all(hit.name != "git-bisect" for hit in index.search("which commit in the history broke it", cutoff=0))
    assert index.search("pod in CrashLoopBackOff")[0].name == "kubernetes-crashloop"


def test_a_removed_skill_is_gone_and_the_others_stay(index: Index, asked: dict[str, str]) -> None:
    index.remove("git-bisect").remove("no-such-skill")
    assert "git-bisect" not in index
    assert index.skill("git-bisect") is None
    for text, name in asked.items():
        if name != "git-bisect":
            assert name in [hit.name for hit in index.search(text, cutoff=0)]


def test_a_snapshot_does_not_see_later_changes(index: Index) -> None:
    snapshot = index.snapshot()
    index.remove("git-bisect")
    assert "git-bisect" in snapshot
    assert snapshot.generation == index.generation - 1


def test_an_added_skill_is_found_within_50_ms_in_a_library_of_1000() -> None:
    base = [
        Skill(f"s{i}", f"topic{i} in field{i % 90}", " ".join(f"w{(i * j) % 4000}" for j in range(300)))
        for i in range(1000)
    ]
    index = build_index(base)
    start = time.perf_counter()
    index.add(Skill("new", "Groom an alpaca.", "Brush the fleece."))
    assert index.search("groom my alpaca")[0].name == "new"
    assert time.perf_counter() - start < 0.05


def test_trigger_phrases_carry_a_skill_into_the_users_language() -> None:
    skills = [Skill(f"s{i}", f"subject{i} thing", "text") for i in range(40)]
    index = build_index(
        [
            *skills,
            Skill("minutes", "Meeting minutes", "Decisions first.", triggers=("整理会议纪要", "Protokoll schreiben")),
        ]
    )
    assert [h.name for h in index.search("帮我整理会议纪要")] == ["minutes"]
    assert [h.name for h in index.search("kannst du das Protokoll schreiben?")] == ["minutes"]


def test_only_active_and_stale_skills_are_indexed() -> None:
    index = build_index([Skill(str(status), "d", status=status) for status in Status])
    assert index.names == ("active", "stale")
    assert build_index([Skill("by-hand", "d", extra={"disable-model-invocation": True})]).names == ()


def test_an_index_gives_back_what_is_rendered() -> None:
    skill = Skill("n", "d", "b", category="coding", triggers=("x", "y z"), status=Status.STALE)
    assert build_index([skill]).skill("n") == skill


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(st.text(max_size=20), st.tuples(st.text(max_size=60), st.text(max_size=60)), max_size=6),
    st.text(max_size=60),
)
def test_any_strings_make_an_index_and_any_text_can_be_asked(texts: dict[str, tuple[str, str]], question: str) -> None:
    skills = [Skill(name, *rest) for name, rest in texts.items()]
    index = build_index(skills)
    index.add(Skill(question, question, question))
    index.remove(next(iter(texts), ""))
    for hit in index.search([question, question], 3, cutoff=0):
        found = index.skill(hit.name)
        assert found is not None
        assert found.name == hit.name


def test_searching_loads_no_heavy_library() -> None:
    code = (
        "import sys, metaclaw_core.skills as s\n"
        "from metaclaw_core.skills import Index, IndexWatcher, Query, Skill, load_index\n"
        "i = Index().add(Skill('a', 'paint fences'))\n"
        "assert i.search('paint a fence', cutoff=0)\n"
        "print(sorted(m for m in ('sklearn', 'scipy', 'yaml', 'frontmatter', 'httpx', 'torch') if m in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"
