"""Eligibility, selection and the shapes of a datum, against values worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rl_tools import sample

from metaclaw_core.learn.batch import Datum, LeftOut, Sample, build, lags_of, select, why_left_out, with_advantages
from metaclaw_core.learn.evolve import is_support

LAGS = {5: 0, 4: 1, 3: 2, 2: 3}


def reason(one: Sample, **options: Any) -> LeftOut | None:
    return why_left_out(one, LAGS, **({"max_staleness": 2, "support_share": 0.0} | options))


def test_a_scored_sample_of_the_present_weights_may_train() -> None:
    assert reason(sample()) is None
    assert reason(sample(version=3)) is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"klass": "B"}, "not class A"),
        ({"klass": "C"}, "not class A"),
        ({"redacted": True}, "held a secret"),
        ({"prompt": []}, "no tokens"),
        ({"tokens": []}, "no tokens"),
        ({"logprobs": [-1.0]}, "ids and logprobs differ in length"),
        ({"logprobs": [-1.0, -1.0, 0.0]}, "ids and logprobs differ in length"),
        ({"logprobs": [-1.0, float("nan")]}, "a logprob is not finite"),
        ({"logprobs": [-1.0, float("-inf")]}, "a logprob is not finite"),
        ({"stop_reason": "length"}, "cut before its end"),
        ({"stop_reason": "context"}, "cut before its end"),
        ({"stop_reason": "aborted"}, "cut before its end"),
        ({"stop_reason": "length", "malformed": True}, "cut before its end"),
        ({"version": 2}, "sampled too many versions ago"),
        ({"version": 9}, "sampled from weights that the present ones do not descend from"),
        ({"reward": None}, "not scored"),
    ],
)
def test_each_rejection_has_its_reason(fields: dict[str, Any], expected: str) -> None:
    assert reason(sample(**fields)) == expected


def test_a_support_session_trains_nothing_by_the_same_hash_as_the_evolver_s() -> None:
    names = [f"client-{n}" for n in range(200)]
    left_out = [reason(sample(split_by=name), support_share=0.25) for name in names]
    assert [r is LeftOut.SUPPORT for r in left_out] == [is_support(name, 0.25) for name in names]
    assert {None, LeftOut.SUPPORT} == set(left_out)


def test_a_malformed_call_scores_0_whatever_the_judge_says() -> None:
    assert sample(malformed=True, reward=1.0).earned == 0.0
    assert sample(malformed=True, reward=None).earned == 0.0
    assert reason(sample(malformed=True, reward=None)) is None


def test_a_teacher_alone_needs_no_score() -> None:
    assert reason(sample(reward=None), scored=False) is None


def test_lags_follow_the_line_of_descent_and_skip_other_branches() -> None:
    parents = {1: None, 2: 1, 3: 2, 4: 2, 5: 4}
    assert lags_of(parents, 5) == {5: 0, 4: 1, 2: 2, 1: 3}


def turns(*sessions: str) -> list[Sample]:
    return [sample(n, session=name) for n, name in enumerate(sessions, 1)]


def numbers(chosen: tuple[Sample, ...] | None) -> list[int] | None:
    return None if chosen is None else [one.turn for one in chosen]


def test_the_oldest_turns_are_taken_and_half_of_a_batch_from_one_session() -> None:
    assert numbers(select(turns(*"aaaabcb"), batch_size=4, min_sessions=2)) == [1, 2, 5, 6]
    assert numbers(select(reversed(turns(*"aaaabcb")), batch_size=4, min_sessions=2)) == [1, 2, 5, 6]


def test_places_are_kept_for_the_sessions_that_are_still_missing() -> None:
    assert numbers(select(turns(*"aabbbcd"), batch_size=4, min_sessions=4)) == [1, 3, 6, 7]


def test_a_batch_waits_for_turns_and_for_sessions() -> None:
    assert select(turns(*"abc"), batch_size=4, min_sessions=2) is None
    assert select(turns(*"aaaaaab"), batch_size=4, min_sessions=2) is None
    assert select(turns(*"aabb"), batch_size=4, min_sessions=3) is None


def test_one_session_may_fill_the_batch_where_one_is_enough() -> None:
    assert numbers(select(turns(*"aaaaa"), batch_size=4, min_sessions=1)) == [1, 2, 3, 4]


@given(st.text(alphabet="abcdef", max_size=30), st.integers(1, 8), st.integers(1, 5))
def test_a_batch_is_found_exactly_where_there_is_one(sessions: str, size: int, least: int) -> None:
    chosen = select(turns(*sessions), batch_size=size, min_sessions=least)
    least = min(least, size)
    most = size if least == 1 else max(1, size // 2)
    possible = len(set(sessions)) >= least and sum(min(most, sessions.count(s)) for s in set(sessions)) >= size
    assert (chosen is not None) == possible
    if chosen is not None:
        names = [one.session for one in chosen]
        assert len(chosen) == size == len({one.turn for one in chosen})
        assert len(set(names)) >= least
        assert max(map(names.count, names)) <= most


def same(array: np.ndarray[Any, Any], expected: list[float]) -> bool:
    return array.tolist() == expected


def test_one_turn_is_a_datum_aligned_with_the_next_token() -> None:
    [datum] = build([sample(1, [1, 2, 3], [7, 8, 9], logprobs=[-0.5, -1.5, -2.5])])
    assert same(datum.input_ids, [1, 2, 3, 7, 8])
    assert same(datum.targets, [2, 3, 7, 8, 9])
    assert same(datum.logprobs, [0, 0, -0.5, -1.5, -2.5])
    assert same(datum.mask, [0, 0, 1, 1, 1])
    assert same(datum.advantages, [0, 0, 0, 0, 0])
    assert same(datum.full, [1, 2, 3, 7, 8, 9])
    assert (datum.input_ids.dtype, datum.targets.dtype, datum.logprobs.dtype) == (np.int32, np.int64, np.float32)


def test_a_turn_whose_prompt_goes_on_from_the_last_shares_its_datum() -> None:
    first = sample(1, [1, 2], [7, 8], logprobs=[-0.25, -0.5])
    second = sample(2, [1, 2, 7, 8, 3, 4], [9], logprobs=[-0.75])
    [datum] = build([second, first])
    assert same(datum.input_ids, [1, 2, 7, 8, 3, 4])
    assert same(datum.targets, [2, 7, 8, 3, 4, 9])
    assert same(datum.logprobs, [0, -0.25, -0.5, 0, 0, -0.75])
    assert same(datum.mask, [0, 1, 1, 0, 0, 1])
    assert [(part.sample.turn, part.start, part.stop) for part in datum.parts] == [(1, 1, 3), (2, 5, 6)]


@pytest.mark.parametrize(
    "second",
    [
        sample(2, [1, 2, 7, 6, 3], [9]),  # another token in the answer
        sample(2, [1, 5, 7, 8, 3], [9]),  # another in the prompt
        sample(2, [1, 2, 7], [9]),  # ends before the answer does
        sample(2, [1, 2, 7, 8, 3], [9], session="s-2"),
    ],
)
def test_a_turn_that_does_not_go_on_exactly_is_a_datum_of_its_own(second: Sample) -> None:
    datums = build([sample(1, [1, 2], [7, 8]), second])
    assert sorted(d.parts[0].sample.turn for d in datums) == [1, 2]


def test_two_turns_that_go_on_from_the_same_one_are_not_joined() -> None:
    base = sample(1, [1], [7])
    datums = build([base, sample(2, [1, 7, 3], [8]), sample(3, [1, 7, 3], [9])])
    assert sorted([part.sample.turn for part in datum.parts] for datum in datums) == [[1, 2], [3]]


def test_advantages_go_to_the_tokens_of_their_turn_and_the_rest_is_masked() -> None:
    [datum] = build(
        [sample(1, [1, 2], [7, 8]), sample(2, [1, 2, 7, 8, 3], [9, 6]), sample(3, [1, 2, 7, 8, 3, 9, 6], [5])]
    )
    given = with_advantages(datum, {1: -0.5, 2: np.array([0.25, 0.75])})
    assert same(given.advantages, [0, -0.5, -0.5, 0, 0.25, 0.75, 0])
    assert same(given.mask, [0, 1, 1, 0, 1, 1, 0])
    assert same(datum.advantages, [0] * 7)


def test_advantages_of_another_length_are_refused() -> None:
    [datum] = build([sample(1, [1], [7, 8])])
    with pytest.raises(ValueError, match="turn 1 has 2 tokens and advantages of shape"):
        with_advantages(datum, {1: np.array([1.0, 2.0, 3.0])})


def test_a_datum_of_class_c_can_t_be_made() -> None:
    with pytest.raises(ValueError, match="turn 1 is class C, which is never trained on"):
        build([sample(1, klass="C")])


def test_a_datum_with_something_on_a_prompt_position_can_t_be_made() -> None:
    [datum] = build([sample(1, [1, 2], [7])])
    for name in ("logprobs", "advantages", "mask"):
        with pytest.raises(ValueError, match=f"{name} is not 0"):
            replace(datum, **{name: np.ones(2, dtype=np.float32)})
    with pytest.raises(ValueError, match="float32 with one axis"):
        replace(datum, mask=np.zeros(2))
    with pytest.raises(ValueError, match="mask has 3 places, the input 2"):
        replace(datum, mask=np.zeros(3, dtype=np.float32))
    with pytest.raises(ValueError, match="are not the tokens of turn 1"):
        replace(datum, targets=np.array([2, 9]))


@st.composite
def sessions_of_turns(draw: st.DrawFn) -> list[Sample]:
    """Turns over three ids, so that some go on from others by chance."""
    ids = st.lists(st.integers(1, 3), min_size=1, max_size=5)
    made = []
    for turn in range(draw(st.integers(1, 6))):
        start = draw(st.sampled_from(made)) if made and draw(st.booleans()) else None
        head = [*start.prompt_ids.tolist(), *start.tokens.tolist()] if start else []
        made.append(sample(turn, head + draw(ids), draw(ids), session=draw(st.sampled_from("ab"))))
    return made


def tokens_of(datum: Datum) -> list[tuple[int, list[int], list[int]]]:
    return [
        (p.sample.turn, datum.full[: p.start + 1].tolist(), datum.full[p.start + 1 : p.stop + 1].tolist())
        for p in datum.parts
    ]


@given(sessions_of_turns())
def test_every_turn_is_in_one_datum_with_its_own_prompt_and_tokens(made: list[Sample]) -> None:
    datums = build(made)
    found = sorted(row for datum in datums for row in tokens_of(datum))
    assert found == sorted((s.turn, s.prompt_ids.tolist(), s.tokens.tolist()) for s in made)
    assert sum(int(d.mask.sum()) for d in datums) == sum(s.tokens.size for s in made)
