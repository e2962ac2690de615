from __future__ import annotations

import pytest

from metaclaw_core.skills import Index, Skill, build_index
from metaclaw_core.skills.retrieve import Options, create_retriever

_SKILLS = [
    Skill("state-assumptions", "Say what you assume.", category="general"),
    Skill("unit-tests", "Write unit tests first.", category="coding"),
    Skill("sql-joins", "Join tables in SQL.", category="coding"),
    Skill("find-papers", "Look for papers.", category="research"),
    Skill("no-guessing", "Don't guess file names.", category="common_mistakes"),
    Skill("prune-roses", "Prune roses in March.", category="rose_garden"),
    Skill("uncategorised", "Anything.", ""),
]


@pytest.fixture
def by_category() -> Index:
    return build_index(_SKILLS)


async def names(index: Index, *texts: str, k: int = 6, options: Options | None = None) -> list[str]:
    retrieval = await create_retriever("template", options).retrieve(texts, index, k)
    assert retrieval.mode == "template"
    assert all(hit.score == 1.0 for hit in retrieval.hits)
    return [hit.name for hit in retrieval.hits]


async def test_a_keyword_brings_general_skills_then_its_category_then_common_mistakes(by_category: Index) -> None:
    assert await names(by_category, "please debug this function") == [
        "state-assumptions",
        "unit-tests",
        "sql-joins",
        "no-guessing",
    ]
    assert await names(by_category, "which journal has papers on sleep?") == [
        "state-assumptions",
        "find-papers",
        "no-guessing",
    ]


async def test_inside_a_category_the_better_match_comes_first(by_category: Index) -> None:
    assert await names(by_category, "debug the SQL function that joins tables") == [
        *("state-assumptions", "sql-joins", "unit-tests", "no-guessing")
    ]


@pytest.mark.parametrize(
    "text", ["will it rain tomorrow", "the latest digital classic from the capital", "hello", "你好", ""]
)
async def test_a_keyword_inside_another_word_is_none(by_category: Index, text: str) -> None:
    assert await names(by_category, text) == []


async def test_the_newest_turn_that_names_a_kind_of_task_decides(by_category: Index) -> None:
    assert await names(by_category, "debug this function", "find papers on it", "ok thanks") == [
        *("state-assumptions", "find-papers", "no-guessing")
    ]


async def test_a_category_of_the_users_own_is_found_by_its_name(by_category: Index) -> None:
    assert await names(by_category, "help me with my garden") == ["state-assumptions", "prune-roses", "no-guessing"]


async def test_each_part_has_its_own_limit(by_category: Index) -> None:
    assert await names(by_category, "debug this function", k=0, options=Options(task_specific_top_k=1)) == [
        "unit-tests",
        "no-guessing",
    ]
