"""What a block holds and when it grows: first choice, relative cut, budgets, additions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaclaw_core.skills.index import Hit
from metaclaw_core.skills.inject import Block, SkillText, estimate_tokens, fits, plan, render_skill


def library(**tokens: int):
    """Skills whose rendering has about as many tokens."""
    texts = {name: SkillText(name, "d", "x" * (4 * n - len(render_skill(SkillText(name, "d", ""))))) for name, n in tokens.items()}
    return texts.get


def hits(**scores: float) -> list[Hit]:
    return [Hit(name, score) for name, score in scores.items()]


def chosen(block: Block, found: list[Hit], lookup, *, top_k: int = 6, max_tokens: int = 2000, listed=()) -> Block:
    return plan(block, found, lookup, top_k=top_k, max_tokens=max_tokens, listed=listed)


def test_nothing_found_is_no_block():
    assert chosen(Block(), [], library()) == Block()


def test_the_first_choice_takes_only_skills_near_the_best_one():
    lookup = library(a=10, b=10, c=10, d=10)
    assert chosen(Block(), hits(a=10.0, b=6.0, c=5.9, d=5.0), lookup).skills == ("a", "b")


def test_the_number_of_skills_is_bounded_over_the_whole_epoch():
    lookup = library(a=10, b=10, c=10, d=10)
    first = chosen(Block(), hits(a=3.0, b=3.0, c=3.0), lookup, top_k=2)
    assert first.skills == ("a", "b")
    assert chosen(first, hits(d=3.0), lookup, top_k=2) == first
    assert chosen(first, hits(d=3.0), lookup, top_k=3).skills == ("a", "b", "d")


def test_the_first_choice_takes_half_of_the_budget_and_an_addition_the_rest():
    lookup = library(a=400, b=400, c=400, d=400, e=400)
    first = chosen(Block(), hits(a=3.0, b=3.0, c=3.0), lookup)
    assert first.skills == ("a", "b")
    assert estimate_tokens(first.inner) <= 1000
    second = chosen(first, hits(c=3.0, d=3.0, e=3.0), lookup)
    assert second.skills == ("a", "b", "c", "d")
    assert estimate_tokens(second.inner) <= 2000


def test_one_that_is_too_long_is_skipped_for_the_next_one():
    lookup = library(a=100, b=1500, c=100)
    assert chosen(Block(), hits(a=3.0, b=3.0, c=3.0), lookup).skills == ("a", "c")


def test_the_best_skill_may_take_the_whole_budget_but_no_more():
    lookup = library(long=1500, longer=2500, b=100)
    assert chosen(Block(), hits(long=3.0, b=3.0), lookup).skills == ("long",)
    assert chosen(Block(), hits(longer=3.0), lookup) == Block()
    assert [fits(lookup(name), 2000) for name in ("long", "longer")] == [True, False]
    assert chosen(Block(), hits(longer=3.0, b=3.0), lookup).skills == ("b",)


def test_a_turn_whose_best_skill_is_there_already_adds_nothing():
    lookup = library(a=10, b=10)
    first = chosen(Block(), hits(a=3.0), lookup)
    assert chosen(first, hits(a=3.0, b=2.9), lookup) == first


def test_two_additions_are_the_most():
    lookup = library(a=10, b=10, c=10, d=10)
    block = Block()
    for name in "abcd":
        block = chosen(block, hits(**{name: 3.0}), lookup)
    assert (block.skills, block.appends) == (("a", "b", "c"), 2)


def test_an_addition_that_finds_no_room_is_not_counted():
    lookup = library(a=900, b=1800, c=10)
    first = chosen(Block(), hits(a=3.0), lookup)
    assert chosen(first, hits(b=3.0), lookup) == first
    assert chosen(first, hits(c=3.0), lookup).appends == 1


def test_each_skill_keeps_the_score_it_was_chosen_with():
    lookup = library(a=10, b=10, c=10)
    first = chosen(Block(), hits(a=10.12345, b=6.5), lookup)
    assert chosen(first, hits(c=3.0, a=2.9), lookup).scores == (10.123, 6.5, 3.0)
    before_scores_were_kept = Block(first.inner, first.skills, first.appends)
    assert chosen(before_scores_were_kept, hits(c=3.0), lookup).scores == (None, None, 3.0)


def test_what_the_client_lists_and_what_has_left_the_library_is_passed_over():
    lookup = library(a=10, b=10)
    assert chosen(Block(), hits(gone=3.0, a=3.0, b=3.0), lookup, listed=("a",)).skills == ("b",)


def test_the_block_names_each_skill_and_gives_everybody_else_priority():
    text = chosen(Block(), hits(a=3.0, b=3.0), library(a=20, b=20)).inner
    assert text.startswith("## Skills for this conversation\n\n")
    assert "The user's own words and all other instructions of this prompt have priority over them" in text
    assert text.count("\n\n### a\n\n_d_\n\n") == text.count("\n\n### b\n\n_d_\n\n") == 1


@pytest.mark.parametrize(("text", "tokens"), [("", 0), ("abcd" * 10, 10), ("\u5408\u5e76\u51b2", 2), ("ab\u5408", 1)])
def test_tokens_are_estimated_from_characters(text: str, tokens: int):
    assert estimate_tokens(text) == tokens


@given(st.lists(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.floats(0.1, 9.0)), max_size=6, unique_by=lambda t: t[0]), max_size=8))
def test_whatever_is_found_the_block_only_grows_at_its_end_and_keeps_its_budget(turns):
    lookup = library(a=10, b=300, c=500, d=900, e=1200, f=1900, g=2500, h=50)
    block = Block()
    for found in turns:
        grown = chosen(block, sorted((Hit(*one) for one in found), key=lambda hit: -hit.score), lookup)
        assert grown.inner.startswith(block.inner)
        assert grown.skills[: len(block.skills)] == block.skills
        assert len(set(grown.skills)) == len(grown.skills) <= 6
        assert estimate_tokens(grown.inner) <= 2000
        assert grown.appends <= 2
        block = grown
