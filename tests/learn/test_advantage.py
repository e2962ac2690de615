"""The value tracker and the groups, against values worked out by hand and real outcomes of an agent."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rl_tools import tau_outcomes

from metaclaw_core.learn.advantage import Tracker, grpo, key_of, single
from metaclaw_core.learn.cluster import OTHER, Clusters

# --- single -----------------------------------------------------------------------------------------------------------


def test_a_new_key_is_expected_to_do_as_all_others_do() -> None:
    tracker = Tracker()
    assert tracker.value("a") == 0.5
    tracker = tracker.seen("a", 1.0)
    assert tracker.mean == pytest.approx(2 / 3)
    assert tracker.value("b") == pytest.approx(2 / 3)
    assert tracker.value("a") == pytest.approx((2 * 2 / 3 + 1) / 3)


def test_what_is_known_of_a_key_outweighs_the_mean_of_all_as_it_grows() -> None:
    tracker = Tracker()
    for _ in range(3):
        tracker = tracker.seen("good", 1.0).seen("bad", 0.0)
    # α of "good": 0.96² + 0.96 + 1 = 2.8816. The mean of all: six rewards that fade by .99 each.
    alpha = sum(0.99**n for n in (1, 3, 5))
    mean = (alpha + 1) / (sum(0.99**n for n in range(6)) + 2)
    assert tracker.value("good") == pytest.approx((2 * mean + 2.8816) / (2 + 2.8816))
    assert tracker.value("bad") == pytest.approx(2 * mean / (2 + 2.8816))
    assert tracker.value("good", k0=8.0) == pytest.approx((8 * mean + 2.8816) / (8 + 2.8816))


@pytest.mark.parametrize(("distance", "kept"), [(0.0, 0.96), (0.006, 0.9330), (0.06, 0.875), (1.0, 0.875)])
def test_a_key_forgets_as_far_as_the_policy_has_moved_within_bounds(distance: float, kept: float) -> None:
    tracker = Tracker().seen("a", 1.0).moved(distance).seen("a", 0.0)
    assert tracker.keys["a"].alpha == pytest.approx(kept, abs=5e-5)
    assert tracker.keys["a"].beta == 1.0


def test_advantages_are_what_was_earned_less_what_was_expected_over_half_at_first() -> None:
    advantages, after = single(Tracker(), ["a", "b"], [1.0, 0.0])
    assert advantages is not None
    assert advantages.tolist() == [1.0, -1.0]
    assert after.rewards == 2
    # a, then b: expected .5 and 2/3, so the mean square is (1/4 + 4/9) / 2.
    assert after.square == pytest.approx((1 / 4 + 4 / 9) / 2)


def test_all_of_a_batch_is_measured_by_the_state_before_it() -> None:
    before = Tracker().seen("a", 1.0).seen("b", 0.0)
    one, _ = single(before, ["a", "b", "a", "a"], [0.0, 1.0, 1.0, 0.0])
    other, _ = single(before, ["a", "a", "a", "b"], [1.0, 0.0, 0.0, 1.0])
    assert one is not None
    assert other is not None
    assert one.tolist() == other[[1, 3, 0, 2]].tolist()


def test_the_running_scale_counts_from_the_64th_reward_and_has_a_floor() -> None:
    tracker = Tracker()
    for _ in range(63):
        tracker = tracker.seen("a", 1.0)
    assert tracker.scale == 0.5
    assert tracker.seen("a", 1.0).scale == pytest.approx(0.1)
    noisy = Tracker()
    for n in range(64):
        noisy = noisy.seen("a", float(n % 2))
    assert noisy.scale == pytest.approx(math.sqrt(noisy.square))
    assert 0.45 < noisy.scale < 0.6


def test_an_advantage_is_clipped_at_3() -> None:
    tracker = Tracker()
    for _ in range(200):
        tracker = tracker.seen("a", 1.0)
    advantages, _ = single(tracker, ["a"], [0.0])
    assert advantages is not None
    assert advantages.tolist() == [-3.0]


def test_a_batch_that_went_as_expected_has_no_signal_but_is_seen() -> None:
    advantages, after = single(Tracker(), ["a"], [0.5])
    assert advantages is None
    assert after.rewards == 1
    assert single(Tracker(), [], [])[0] is None


def test_rewards_out_of_range_and_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="0 to 1"):
        Tracker().seen("a", -1.0)
    with pytest.raises(ValueError, match="zip"):
        single(Tracker(), ["a", "a"], [1.0])
    with pytest.raises(ValueError, match="distance"):
        Tracker().moved(float("nan"))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1), st.floats(0, 0.2)), max_size=40))
def test_values_stay_between_0_and_1_and_the_state_survives_json(seen: list[tuple[str, float, float]]) -> None:
    tracker = Tracker()
    for key, reward, distance in seen:
        tracker = tracker.moved(distance).seen(key, reward)
    assert all(0 < tracker.value(key) < 1 for key in "abcd")
    assert Tracker.from_json(json.loads(json.dumps(tracker.to_json()))) == tracker


def test_seeing_gives_a_new_tracker_and_leaves_the_old_one() -> None:
    before = Tracker().seen("a", 1.0)
    saved = before.to_json()
    before.seen("a", 0.0).moved(1.0)
    assert before.to_json() == saved


@pytest.mark.slow
def test_on_real_outcomes_seen_once_the_tracker_takes_a_seventh_of_the_variance() -> None:
    episodes = [(str(task), reward) for task, row in enumerate(tau_outcomes()) for reward in row]
    rng = np.random.default_rng(0)
    squares = {"tracker": 0.0, "ema": 0.0, "raw": 0.0}
    for _ in range(500):
        tracker, ema = Tracker(), 0.5
        for n in rng.permutation(len(episodes)):
            key, reward = episodes[n]
            squares["tracker"] += (2 * (reward - tracker.value(key))) ** 2  # in ±1
            squares["ema"] += (2 * (reward - ema)) ** 2
            squares["raw"] += (2 * reward - 1) ** 2
            tracker = tracker.seen(key, reward)
            ema += 0.05 * (reward - ema)
    assert squares["tracker"] <= 0.86 * squares["raw"]
    assert squares["tracker"] <= 0.86 * squares["ema"]


# --- grpo ---------------------------------------------------------------------------------------------------------------


def test_siblings_are_centred_on_their_mean_and_not_divided() -> None:
    assert grpo([[1.0, 0.0, 0.0, 1.0], [1.0, 0.5, 0.0]]) == [[0.5, -0.5, -0.5, 0.5], [0.5, 0.0, -0.5]]


def test_an_abstention_is_left_out_of_the_mean() -> None:
    assert grpo([[1.0, None, 0.0]]) == [[0.5, None, -0.5]]


def test_groups_without_signal_are_dropped() -> None:
    assert grpo([[1.0, 1.0], [0.0, 0.0, 0.0], [1.0], [1.0, None], [None, None], []]) == [None] * 6


# --- clusters -----------------------------------------------------------------------------------------------------------


def keys_of(*texts: str) -> tuple[list[str], Clusters]:
    clusters, keys = Clusters(), []
    for text in texts:
        key, clusters = clusters.place(text)
        keys.append(key)
    return keys, clusters


def test_tasks_that_share_most_words_are_one_cluster() -> None:
    keys, _ = keys_of(
        "Fix the failing test in parser.py",
        "please fix a failing test in lexer.py",
        "Write a poem about the sea",
        "fix the failing tests of the parser",
        "What is the weather in Berlin?",
    )
    assert keys == ["0", "0", "1", "0", "2"]


def test_a_text_keeps_its_key_and_one_without_words_has_none_of_its_own() -> None:
    texts = ["Fix the failing test", "Write a poem", "yes", "…"]
    keys, clusters = keys_of(*texts)
    assert keys == ["0", "1", OTHER, OTHER]
    assert [clusters.place(text) for text in texts] == [(key, clusters) for key in keys]


def test_clusters_survive_json_and_hold_no_readable_word() -> None:
    _, clusters = keys_of("Rotate the canary secret zanzibar", "Write a poem")
    text = json.dumps(clusters.to_json())
    assert Clusters.from_json(json.loads(text)) == clusters
    assert "zanzibar" not in text


def test_the_number_of_clusters_is_bounded() -> None:
    keys, clusters = keys_of(*(f"alpha{n} beta{n} gamma{n}" for n in range(300)), "alpha7 delta epsilon zeta eta")
    assert len(clusters.leaders) == 256
    assert keys[255] == "255"
    assert keys[256] == OTHER
    assert keys[-1] == "7"


def test_the_tracker_s_key_tells_agents_apart() -> None:
    assert key_of("1", "openclaw") != key_of("1", "codex")
