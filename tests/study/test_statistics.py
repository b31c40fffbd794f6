"""Statistics of a study, against formulas, published examples and enumeration."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from dynrank_ds.study import statistics
from dynrank_ds.study.statistics import detectable_difference, difference, holm, mean_score, score_interval
from dynrank_eval.statistics import mcnemar_exact


def verdicts(
    seeds: int, problems: int, score: float, spread: float = 0.0, seed: int = 0
) -> NDArray[np.float64]:
    """(seeds, problems) 0 or 1, each seed with a chance of its own."""
    random = np.random.default_rng(seed)
    chances = np.clip(random.normal(score, spread, size=(seeds, 1)), 0, 1)
    return (random.random((seeds, problems)) < chances).astype(float)


def test_holm_gives_the_values_of_a_worked_example() -> None:
    # Of R's documentation style: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") is 0.03 0.06 0.06 0.02.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_interval_of_one_seed_is_that_of_a_proportion() -> None:
    shares = verdicts(1, 640, 0.4)
    low, high = score_interval({"task": shares})
    p = shares.mean()
    half = 1.96 * math.sqrt(p * (1 - p) / 640)
    assert (low, high) == pytest.approx((p - half, p + half), abs=0.004)


def test_interval_of_three_seeds_has_the_variance_of_their_mean() -> None:
    # Every problem alike, so that all variance is that over seeds: s^2 / 3, although the three differ by so much. Two
    # of three are drawn with replacement: every pair is one of nine.
    scores = [0.2, 0.4, 0.9]
    means = [(first + second) / 2 for first in scores for second in scores]
    assert np.std(means) == pytest.approx(np.std(scores, ddof=1) / math.sqrt(3))
    low, high = score_interval({"task": np.repeat(np.array(scores)[:, None], 50, axis=1)})
    assert (low, high) == pytest.approx((min(means), max(means)))


def test_verdicts_that_are_all_the_same_have_an_interval_nevertheless() -> None:
    nothing = {"task": np.zeros((3, 160))}
    assert score_interval(nothing) == pytest.approx((0, 0.0234), abs=1e-4)  # Wilson's, of 0 in 160
    change = difference(nothing, nothing)
    assert change.mean == 0 and change.low < 0 < change.high and change.p_value == 1


def test_tasks_count_alike_whatever_their_number_of_problems() -> None:
    assert mean_score({"one": np.ones((1, 10)), "two": np.zeros((1, 1000))}) == 0.5


def test_difference_of_paired_verdicts_has_mcnemars_p_value() -> None:
    reference = np.zeros((1, 400))
    reference[0, :150] = 1
    ours = reference.copy()
    ours[0, 150:180] = 1  # 30 gained
    ours[0, :14] = 0  # 14 lost
    change = difference({"task": ours}, {"task": reference})
    assert change.mean == pytest.approx(16 / 400)
    assert change.p_value == pytest.approx(mcnemar_exact(14, 30), abs=0.015)
    # Wald's interval of paired proportions.
    half = 1.96 * math.sqrt(44 - 16**2 / 400) / 400
    assert (change.low, change.high) == pytest.approx((0.04 - half, 0.04 + half), abs=0.004)


@pytest.mark.parametrize(("seeds", "least", "most"), [(1, 1, 12), (3, 0, 5)])
def test_equal_arms_are_told_apart_in_at_most_five_percent(
    monkeypatch: pytest.MonkeyPatch, seeds: int, least: int, most: int
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    found = 0
    for trial in range(100):
        ours, reference = (
            verdicts(seeds, 100, 0.4, 0.02 * (seeds > 1), 1000 * trial + arm) for arm in (1, 2)
        )
        found += difference({"task": ours}, {"task": reference}).p_value < 0.05
    assert least <= found <= most


def test_detectable_difference_is_found_with_the_power_that_it_states(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    change = detectable_difference(200, 1, 0.4, 0.0, 0.0)
    found = 0
    for trial in range(100):
        reference, ours = (
            verdicts(1, 200, 0.4 + sign * change / 2, 0.0, 2 * trial + (sign > 0)) for sign in (-1, 1)
        )
        found += difference({"task": ours}, {"task": reference}).p_value < 0.05
    assert 70 <= found <= 90


def test_detectable_difference_follows_the_formula_of_two_proportions() -> None:
    # Textbook: (1.96 + 0.8416) sqrt(2 * 0.4 * 0.6 / 1000) without correlation or variance over seeds.
    assert detectable_difference(1000, 1, 0.4, 0.0, 0.0) == pytest.approx(
        2.8016 * math.sqrt(0.48 / 1000), rel=1e-4
    )
    assert detectable_difference(640, 3, 0.4, 0.5, 0.02, 11) > detectable_difference(640, 3, 0.4, 0.5, 0.02)
