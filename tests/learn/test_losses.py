"""Weights, guards and the inputs of the losses, against values worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rl_tools import sample

from metaclaw_core.learn.batch import Datum, LeftOut, build, with_advantages
from metaclaw_core.learn.losses import Call, Inputs, Metrics, compare, prepare

LOG2 = float(np.log(2.0))


def datum(turn: int, logprobs: list[float], advantage: float | list[float]) -> Datum:
    tokens = list(range(10, 10 + len(logprobs)))
    [made] = build([sample(turn, [1, 2], tokens, logprobs=logprobs, session=f"s-{turn}")])
    return with_advantages(made, {turn: np.array(advantage)})


def present(one: Datum, *logprobs: float) -> np.ndarray[Any, Any]:
    """Logprobs of the present weights: -9 on the prompt, whose values must not matter."""
    values = np.full(one.targets.shape, -9.0, dtype=np.float32)
    values[one.parts[0].span] = logprobs
    return values


def the_call(datums: list[Datum], now: list[np.ndarray[Any, Any]], **options: Any) -> Call:
    call = prepare(datums, now, **options)
    assert call is not None
    return call


def test_the_truncated_ratio_is_folded_into_the_advantage() -> None:
    # Ratios ½, 1, 1.5, 4: all but the last count in full where the advantage is positive.
    one = datum(1, [-1.0, -2.0, -3.0, -4.0], 1.0)
    now = present(one, -1.0 - LOG2, -2.0, -3.0 + float(np.log(1.5)), -4.0 + 2 * LOG2)
    call = the_call([one], [now])
    [inputs] = call.inputs
    assert (call.loss, dict(call.config), call.tokens, call.clipped) == ("importance_sampling", {}, 4, 0.25)
    assert inputs.advantages == pytest.approx([0, 0.5 / 4, 1 / 4, 1.5 / 4, 2 / 4])
    assert inputs.logprobs == pytest.approx([0, *now[1:].tolist()])
    assert inputs.input_ids.tolist() == [1, 2, 10, 11, 12]
    assert inputs.targets.tolist() == [2, 10, 11, 12, 13]
    assert (inputs.advantages.dtype, inputs.logprobs.dtype) == (np.float32, np.float32)


def test_a_bad_token_that_became_likelier_is_not_pushed_down_harder() -> None:
    one = datum(1, [-1.0, -2.0, -3.0, -4.0], -1.0)
    call = the_call([one], [present(one, -1.0 - LOG2, -2.0, -3.0 + LOG2, -4.0 + 2 * LOG2)])
    assert call.inputs[0].advantages == pytest.approx([0, -0.5 / 4, -1 / 4, -1 / 4, -1 / 4])
    assert call.clipped == 0.5


def test_the_sign_counts_token_by_token() -> None:
    one = datum(1, [-1.0, -1.0], [1.0, -1.0])
    call = the_call([one], [present(one, -1.0 + LOG2, -1.0 + LOG2)])
    assert call.inputs[0].advantages == pytest.approx([0, 2 / 2, -1 / 2])


def test_the_scale_is_one_constant_over_all_tokens_of_the_step() -> None:
    short, long = datum(1, [-1.0], 1.0), datum(2, [-1.0, -1.0, -1.0], -1.0)
    call = the_call([short, long], [present(short, -1.0), present(long, -1.0, -1.0, -1.0)], scale=2.0)
    assert call.inputs[0].advantages.tolist() == [0, 0.5]
    assert call.inputs[1].advantages.tolist() == [0, -0.5, -0.5, -0.5]


@pytest.mark.parametrize(
    ("loss", "config"),
    [
        ("cispo", {"clip_low_threshold": 0.0, "clip_high_threshold": 2.0}),
        ("ppo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    ],
)
def test_cispo_and_ppo_get_the_sampler_s_logprobs_and_plain_advantages(loss: Any, config: dict[str, float]) -> None:
    one = datum(1, [-1.0, -2.0], -1.0)
    call = the_call([one], [present(one, -1.0 + LOG2, -3.0)], loss=loss)
    assert (call.loss, dict(call.config)) == (loss, config)
    assert call.inputs[0].logprobs.tolist() == [0, -1.0, -2.0]
    assert call.inputs[0].advantages.tolist() == [0, -0.5, -0.5]


def test_a_masked_turn_sends_nothing_and_a_batch_without_signal_makes_no_call() -> None:
    kept, masked = datum(1, [-1.0], 1.0), with_advantages(datum(2, [-1.0], 1.0), {})
    call = the_call([kept, masked], [present(kept, -1.0), present(masked, float("nan"))])
    assert len(call.inputs) == 1
    assert call.inputs[0].advantages.tolist() == [0, 1.0]
    nothing = datum(3, [-1.0], 0.0)
    assert prepare([nothing, masked], [present(nothing, -1.0), present(masked, -1.0)]) is None
    assert prepare([], []) is None


def test_within_a_merged_datum_only_the_turn_that_is_left_out_is_masked() -> None:
    first = sample(1, [1], [7, 8], logprobs=[-1.0, -1.0])
    second = sample(2, [1, 7, 8, 3], [9], logprobs=[-2.0])
    [both] = build([first, second])
    now = np.array([-30.0, -1.0, -9.0, -2.0], dtype=np.float32)
    found = compare([both], [now])
    assert [(t.turn, t.left_out) for t in found.turns] == [(1, LeftOut.VETO), (2, None)]
    call = the_call([with_advantages(both, {2: 1.0})], [now])
    assert call.inputs[0].advantages.tolist() == [0, 0, 0, 1.0]
    assert call.inputs[0].logprobs.tolist() == [0, 0, 0, -2.0]
    plain = the_call([with_advantages(both, {2: 1.0})], [now], loss="cispo")
    assert plain.inputs[0].logprobs.tolist() == [0, 0, 0, -2.0]


def loss_of(inputs: list[Inputs], moved: dict[int, float]) -> float:
    """importance_sampling as a server sums it, with each target's logprob moved from the present one."""
    total = 0.0
    for one in inputs:
        shift = np.array([moved.get(int(t), 0.0) for t in one.targets])
        total -= float((np.exp(shift) * one.advantages).sum())
    return total


def test_the_step_is_the_same_however_the_batch_is_split_or_merged() -> None:
    rng = np.random.default_rng(0)
    samples, prompt = [], [1, 2]
    for turn in range(6):
        tokens = rng.integers(10, 90, size=turn + 1).tolist()
        samples.append(sample(turn, list(prompt), tokens, logprobs=(-rng.random(turn + 1) - 0.5).tolist()))
        prompt += [*tokens, 3]
    advantages = {turn: float(a) for turn, a in enumerate(rng.normal(size=6))}
    now = {s.turn: s.logprobs + rng.normal(0, 0.3, s.tokens.size).astype(np.float32) for s in samples}
    moved = {token: float(rng.normal(0, 0.1)) for token in range(100)}

    def inputs(groups: list[list[int]]) -> list[Inputs]:
        datums = [with_advantages(d, advantages) for group in groups for d in build([samples[n] for n in group])]
        logprobs = []
        for one in datums:
            logprobs.append(np.zeros_like(one.logprobs))
            for part in one.parts:
                logprobs[-1][part.span] = now[part.sample.turn]
        return list(the_call(datums, logprobs).inputs)

    merged, apart = inputs([[0, 1, 2, 3, 4, 5]]), inputs([[0], [1], [2], [3], [4], [5]])
    assert (len(merged), len(apart)) == (1, 6)
    whole = loss_of(merged, moved)
    assert loss_of(apart, moved) == pytest.approx(whole, rel=1e-6)
    for cut in range(1, 6):
        assert loss_of(apart[:cut], moved) + loss_of(apart[cut:], moved) == pytest.approx(whole, rel=1e-6)


# --- guards -------------------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_tokens() -> None:
    one, two = datum(1, [-1.0, -1.0], 1.0), datum(2, [-2.0], 1.0)
    found = compare([one, two], [present(one, -1.0 - LOG2, -1.0), present(two, -2.0 + LOG2)])
    assert [(t.turn, t.mean, t.left_out) for t in found.turns] == [
        (1, pytest.approx(0.75), None),
        (2, pytest.approx(2.0), None),
    ]
    m = found.metrics
    assert (m.turns, m.vetoed, m.tokens) == (2, 0, 3)
    assert m.kl_k1 == pytest.approx(0.0, abs=1e-7)
    assert m.kl_k2 == pytest.approx(LOG2**2 / 3)
    assert m.drift == pytest.approx(2 * LOG2 / 3)
    assert m.mean_ratio == pytest.approx(3.5 / 3)
    assert m.most_ratio == pytest.approx(2.0)
    assert m.ess == pytest.approx(3.5**2 / (3 * 5.25))


def test_one_token_that_is_hardly_possible_vetoes_its_turn_alone() -> None:
    one, two = datum(1, [-1.0, -1.0], 1.0), datum(2, [-1.0], 1.0)
    found = compare([one, two], [present(one, -10.3, -1.0), present(two, -10.2)])
    assert [t.left_out for t in found.turns] == [LeftOut.VETO, None]
    assert (found.metrics.vetoed, found.metrics.tokens) == (1, 1)


def test_a_present_logprob_that_is_not_finite_leaves_the_turn_out() -> None:
    one = datum(1, [-1.0, -1.0], 1.0)
    [turn] = compare([one], [present(one, float("nan"), -1.0)]).turns
    assert (turn.mean, turn.left_out) == (None, LeftOut.NOT_FINITE)


def test_logprobs_of_another_length_are_refused() -> None:
    one = datum(1, [-1.0], 1.0)
    with pytest.raises(ValueError, match=r"\(3,\) logprobs came back for a datum of \(2,\)"):
        compare([one], [np.zeros(3)])
    with pytest.raises(ValueError, match="zip"):
        compare([one], [])


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        ([0.0] * 20, None),
        ([0.1, -0.1] * 10, None),  # k2 = .005
        ([0.2, -0.2] * 10, "KL 0.0200, at most 0.01"),
        ([-0.02] * 20, "KL 0.0200, at most 0.01"),
    ],
)
def test_a_step_is_not_made_where_the_weights_moved_too_far(shift: list[float], expected: str | None) -> None:
    one = datum(1, [-1.0] * 20, 1.0)
    problem = compare([one], [present(one, *(-1.0 + s for s in shift))]).metrics.problem()
    assert problem is None if expected is None else expected in str(problem)


def metrics(**fields: Any) -> Metrics:
    values = {"turns": 10, "vetoed": 0, "tokens": 99, "kl_k1": 0.0, "kl_k2": 0.0, "drift": 0.0}
    return Metrics(**(values | {"mean_ratio": 1.0, "most_ratio": 1.0, "ess": 1.0} | fields))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"vetoed": 1}, None),
        ({"vetoed": 2}, "2 of 10 turns hold tokens"),
        ({"mean_ratio": 0.4}, "the mean ratio is 0.400, it must be 0.5 to 2"),
        ({"mean_ratio": 2.1}, "the mean ratio is 2.100"),
        ({"ess": 0.29}, "the effective share is 0.29, at least 0.3"),
        ({"turns": 0, "kl_k1": None}, "the batch is empty"),
    ],
)
def test_each_guard_says_why(fields: dict[str, Any], expected: str | None) -> None:
    problem = metrics(**fields).problem()
    assert problem is None if expected is None else expected in str(problem)


def test_an_empty_batch_has_no_metrics() -> None:
    assert compare([], []).metrics.problem() == "the batch is empty"


@given(
    st.lists(
        st.tuples(st.floats(-8, 0, width=32), st.floats(-8, 0, width=32), st.floats(-3, 3)), min_size=1, max_size=8
    )
)
def test_no_weight_is_above_its_limit_and_no_sign_changes(tokens: list[tuple[float, float, float]]) -> None:
    one = datum(1, [q for q, _, _ in tokens], [a for _, _, a in tokens])
    call = prepare([one], [present(one, *(p for _, p, _ in tokens))])
    if call is None:
        return
    for value, (_, _, a) in zip(call.inputs[0].advantages[1:] * call.tokens, tokens, strict=True):
        assert value * a >= 0
        assert abs(value) <= (1 if a < 0 else 2) * abs(a) * (1 + 1e-6) + 1e-30
