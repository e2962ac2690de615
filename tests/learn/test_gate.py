"""The gate: single e-values by hand, and its promises over many simulated lines."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rl_tools import tau_outcomes

from metaclaw_core.learn.gate import Judgement, Line, judge_line, paired, smallest_drop, spent, unpaired

LOG20 = np.log(20)


# --- e-values by hand ---------------------------------------------------------------------------------------------------


def test_a_fortune_after_one_pair_is_the_mean_over_the_stakes() -> None:
    # The stakes are .1 to .8, .45 on average.
    assert np.exp(paired([1.0])).tolist() == pytest.approx([1.45])
    assert np.exp(paired([-1.0])).tolist() == pytest.approx([0.55])
    assert np.exp(paired([0.0, 0.5])).tolist() == pytest.approx([1.0, 1.225])
    assert np.exp(paired([1.0, -1.0]))[1] == pytest.approx(np.mean([1 - (n / 10) ** 2 for n in range(1, 9)]))
    assert paired([]).tolist() == []


def test_seven_wins_in_a_row_show_an_improvement_and_six_do_not() -> None:
    assert (paired([1.0] * 10) >= LOG20).tolist().index(True) == 6


def test_without_scores_of_both_there_is_no_evidence() -> None:
    assert unpaired([], [0.0] * 50, better=False) == 0.0
    assert unpaired([1.0] * 50, [], better=False) == 0.0


def test_better_is_worse_in_the_mirror() -> None:
    a, b = [0.0, 0.2, 0.4], [1.0, 0.9, 0.5, 0.8]
    turned = unpaired([1 - x for x in a], [1 - x for x in b], better=False)
    assert unpaired(a, b, better=True) == pytest.approx(turned)


@given(st.lists(st.floats(0, 1), max_size=20), st.lists(st.floats(0, 1), max_size=20), st.booleans())
def test_the_order_of_scores_does_not_matter(a: list[float], b: list[float], better: bool) -> None:
    found = unpaired(a, b, better=better)
    assert unpaired(a[::-1], sorted(b), better=better) == pytest.approx(found)
    assert np.isfinite(found)


@pytest.mark.parametrize("bad", [[1.1], [-0.1], [float("nan")]])
def test_scores_out_of_range_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="a score is 0 to 1"):
        unpaired([0.5], bad, better=True)
    with pytest.raises(ValueError, match="a score is 0 to 1"):
        Line(1, history=tuple(bad))
    with pytest.raises(ValueError, match="-1 to 1"):
        paired([2 * x + 3 for x in bad])


def test_alpha_is_spent_over_the_candidates() -> None:
    assert [spent(0.05, n) for n in (1, 2, 3)] == pytest.approx([0.025, 0.05 / 6, 0.05 / 12])
    assert sum(spent(0.05, n) for n in range(1, 10_000)) == pytest.approx(0.05, rel=1e-3)


# --- a line ---------------------------------------------------------------------------------------------------------------


def line(
    history: str = "", control: str = "", working: str = "", replay: tuple[float, ...] = (), candidate: int = 1
) -> Line:
    """Scores as digits 0 and 1; versions are parted by blanks."""
    versions = tuple((n, tuple(map(float, part))) for n, part in enumerate(working.split(), 2))
    return Line(candidate, tuple(map(float, history)), tuple(map(float, control)), versions, replay)


GOOD, BAD = "1111011110" * 3, "0001000010" * 3  # .8 and .2


def verdict(one: Line) -> str:
    return judge_line(one).verdict


def test_nothing_seen_decides_nothing() -> None:
    assert judge_line(line()).verdict == "undecided"
    assert verdict(line(history=GOOD, control="1")) == "undecided"


def test_a_fall_is_seen_against_what_the_stable_weights_did_before() -> None:
    assert verdict(line(GOOD, "1", GOOD)) == "undecided"
    found = judge_line(line(GOOD, "1", BAD))
    assert found.verdict == "rollback"
    assert found.reason.startswith("the scores fell: evidence ")


def test_a_fall_after_a_long_good_time_is_seen_from_the_version_that_brought_it() -> None:
    versions = [GOOD[:10]] * 10
    assert verdict(line(GOOD, "1111011110", " ".join(versions))) == "undecided"
    assert verdict(line(GOOD, "1111011110", " ".join([*versions, BAD]))) == "rollback"


def test_where_the_world_has_changed_the_old_scores_are_not_held_against_the_line() -> None:
    found = judge_line(line(GOOD, BAD, BAD * 3))
    assert (found.verdict, found.history_used) == ("undecided", False)


def test_a_fall_is_also_seen_against_the_control_sessions_alone() -> None:
    assert verdict(line("", GOOD, BAD)) == "rollback"


def test_a_rise_needs_the_control_sessions_and_not_the_history() -> None:
    assert verdict(line(BAD, "", GOOD * 4)) == "undecided"
    assert verdict(line("", BAD, GOOD)) == "promote"


def test_replayed_tasks_count_with_the_live_ones() -> None:
    assert verdict(line(replay=(1.0,) * 9)) == "promote"
    assert verdict(line(replay=(1.0,) * 7, control=GOOD, working=GOOD[:10])) == "undecided"


def test_a_later_candidate_needs_more() -> None:
    assert verdict(line(replay=(1.0,) * 9, candidate=1)) == "promote"
    assert verdict(line(replay=(1.0,) * 9, candidate=3)) == "undecided"


def test_a_line_whose_latest_sessions_are_bad_is_not_promoted() -> None:
    one = line("", BAD, GOOD * 3 + " " + "00000" * 4)
    assert judge_line(one).better > np.log(40)
    assert verdict(one) == "undecided"


def test_a_line_survives_json() -> None:
    one = line(GOOD, "10", "111 000", (0.5, -1.0), 4)
    assert Line.from_json(json.loads(json.dumps(one.to_json()))) == one


# --- what the traffic can show ---------------------------------------------------------------------------------------------


def test_the_smallest_drop_shrinks_with_the_sessions_on_both_sides() -> None:
    stable = (1.0,) * 24 + (0.0,) * 6
    found = [smallest_drop(stable, 27), smallest_drop(stable, 300), smallest_drop(stable * 10, 300)]
    assert found == sorted(found, key=float, reverse=True)  # type: ignore[arg-type]
    assert found == [0.39, 0.33, 0.13]
    assert smallest_drop((1.0,), 3) is None
    assert smallest_drop((0.0,) * 50, 50) is None
    assert smallest_drop((), 50) is None


def test_the_drop_that_is_named_shows_about_half_of_the_time() -> None:
    rng = np.random.default_rng(3)
    stable = (1.0,) * 80 + (0.0,) * 20
    drop = smallest_drop(stable, 100)
    assert drop is not None
    runs = [rng.random(100) < 0.8 - drop for _ in range(300)]
    seen = np.mean([unpaired(stable, run.astype(float), better=False) >= LOG20 for run in runs])
    assert 0.35 < seen < 0.65


# --- promises over many runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pass_rates() -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array(tau_outcomes()).mean(axis=1)


@pytest.mark.parametrize(("effect", "least"), [(0.2, {100: 0.70, 200: 0.95}), (0.3, {50: 0.70}), (0.1, {400: 0.70})])
def test_paired_replays_of_real_tasks_show_an_improvement(
    pass_rates: np.ndarray[tuple[int], np.dtype[np.float64]], effect: float, least: dict[int, float]
) -> None:
    first = accepted(pass_rates, effect)
    for n, share in least.items():
        assert (first <= n).mean() >= share


@pytest.mark.parametrize(("effect", "most"), [(0.0, 0.05), (-0.1, 0.005)])
def test_paired_replays_of_real_tasks_show_no_improvement_that_is_not_there(
    pass_rates: np.ndarray[tuple[int], np.dtype[np.float64]], effect: float, most: float
) -> None:
    assert (accepted(pass_rates, effect) <= 400).mean() <= most


def accepted(
    rates: np.ndarray[tuple[int], np.dtype[np.float64]], effect: float, runs: int = 1_000
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """After how many pairs each run is accepted at α = .05, looking after each; 10,000: not within 400."""
    rng = np.random.default_rng(11)
    first = []
    for _ in range(runs):
        task = rates[rng.integers(0, rates.size, 400)]
        new = rng.random(400) < np.clip(task + effect, 0, 1)
        enough = paired(new.astype(float) - (rng.random(400) < task)) >= LOG20
        first.append(int(np.argmax(enough)) + 1 if enough.any() else 10_000)
    return np.array(first)


def lived(rng: np.random.Generator, old: float, new: float, sessions: int, look: int) -> tuple[Judgement, int]:
    """A line that is looked at after every `look` sessions, a tenth of which stay with the stable weights; a new version
    each eight. The last judgement and the number of sessions until then."""
    history = tuple((rng.random(30) < old).astype(float))
    control: list[float] = []
    working: dict[int, list[float]] = {}
    for n in range(1, sessions + 1):
        stays = rng.random() < 0.1
        score = float(rng.random() < (old if stays else new))
        (control if stays else working.setdefault(2 + n // 8, [])).append(score)
        if n % look == 0:
            versions = tuple((v, tuple(s)) for v, s in working.items())
            found = judge_line(Line(1, history, tuple(control), versions))
            if found.verdict != "undecided":
                break
    return found, n


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_weights_that_are_no_different_are_rarely_rolled_back_or_promoted(rate: float) -> None:
    rng = np.random.default_rng(5)
    verdicts = Counter(lived(rng, rate, rate, 80, 4)[0].verdict for _ in range(1_000))
    assert verdicts["rollback"] <= 50
    assert verdicts["promote"] <= 50


@pytest.mark.slow
def test_a_fall_from_8_to_2_in_ten_is_rolled_back_within_30_sessions() -> None:
    rng = np.random.default_rng(6)
    runs = [lived(rng, 0.8, 0.2, 30, 1) for _ in range(300)]
    assert np.mean([found.verdict == "rollback" for found, _ in runs]) >= 0.93
    assert np.median([sessions for _, sessions in runs]) <= 12
