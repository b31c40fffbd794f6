"""Against published numbers and plain enumeration."""

import random
from itertools import combinations, product

import pytest

from dynrank_eval.statistics import (
    mcnemar_exact,
    paired_interval,
    pass_at_k,
    shares_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        # Newcombe 1998, "Two-sided confidence intervals for the single proportion", Table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_equals_newcombes_table(k: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(k, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_is_symmetric_and_exact_at_its_ends() -> None:
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0
    low, high = wilson_interval(2, 9)
    assert wilson_interval(7, 9) == pytest.approx((1 - high, 1 - low), abs=1e-15)


def test_interval_of_shares_is_wilsons_for_one_sample_and_never_empty() -> None:
    one = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    assert shares_interval(one, 1) == wilson_interval(3, 7)
    # Several alike completions of a problem say no more than one of them.
    assert shares_interval(one, 20) == pytest.approx(wilson_interval(3, 7))
    for shares in ([0.0] * 12, [1.0] * 12):
        assert shares_interval(shares, 3) == wilson_interval(sum(shares), 12)
    # Problems of the same difficulty: every completion counts.
    for shares in ([0.4, 0.6, 0.5, 0.5], [0.5] * 4):
        assert shares_interval(shares, 10) == wilson_interval(20, 40)


@pytest.mark.parametrize("a", [0.3, 2.0])
def test_interval_of_shares_covers_the_true_mean(a: float) -> None:
    """40 problems with chances from Beta(a, 3 a), 5 completions each; within 3 standard deviations of 1500 trials."""
    draw, trials, covered = random.Random(0), 1500, 0
    print("seed 0")
    for _ in range(trials):
        chances = [draw.betavariate(a, 3 * a) for _ in range(40)]
        low, high = shares_interval([sum(draw.random() < p for _ in range(5)) / 5 for p in chances], 5)
        covered += low <= 0.25 <= high
    assert 0.933 <= covered / trials <= 0.985, covered / trials


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 5), (5, 0), (3, 3), (4, 9), (7, 2)])
def test_mcnemar_equals_counting_all_coin_sequences(b: int, c: int) -> None:
    n = b + c
    sequences = list(product((0, 1), repeat=n))
    as_extreme = sum(abs(2 * sum(coins) - n) >= abs(b - c) for coins in sequences)
    assert mcnemar_exact(b, c) == as_extreme / len(sequences)


def test_mcnemar_holds_for_thousands_of_pairs() -> None:
    assert 0 < mcnemar_exact(900, 1200) < 1e-9
    assert mcnemar_exact(1000, 1000) == 1.0


@pytest.mark.parametrize(
    ("n", "correct", "k"), [(1, 0, 1), (1, 1, 1), (5, 2, 1), (5, 2, 3), (6, 0, 4), (6, 3, 4)]
)
def test_pass_at_k_equals_trying_every_choice(n: int, correct: int, k: int) -> None:
    solved = [place < correct for place in range(n)]
    choices = list(combinations(solved, k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, choices)) / len(choices))


@pytest.mark.parametrize(("p", "q"), [(0.05, 0.1), (0.2, 0.2), (0.02, 0.01)])
def test_paired_interval_covers_the_true_difference(p: float, q: float) -> None:
    """Drawn with known discordant shares p and q: 95 % within the error of 2000 trials (3 standard deviations)."""
    draw, n, trials = random.Random(0), 200, 2000
    print("seed 0")
    covered = 0
    for _ in range(trials):
        places = [draw.random() for _ in range(n)]
        low, high = paired_interval([(p <= x < p + q) - (x < p) for x in places])
        covered += low <= q - p <= high
    assert 0.935 <= covered / trials <= 0.985


def test_paired_interval_equals_a_hand_calculation() -> None:
    # (7.5 - 3.5) / 102 +- 1.96 sqrt((11 / 102 - (4 / 102)^2) / 102)
    differences = [-1.0] * 3 + [1.0] * 7 + [0.0] * 90
    assert paired_interval(differences) == pytest.approx((-0.02406, 0.10249), abs=1e-5)


def test_paired_interval_of_several_completions_is_never_empty() -> None:
    for each in (0.0, 0.25, 1.0):
        low, high = paired_interval([each] * 40)
        assert low < each <= high and high - low > 0.05


def test_paired_interval_covers_the_difference_of_shares() -> None:
    """60 problems, 4 completions of each model; as above, within 3 standard deviations of 1500 trials or wider."""
    draw, trials, covered = random.Random(0), 1500, 0
    print("seed 0")
    for _ in range(trials):
        differences = []
        for _ in range(60):
            chance = draw.betavariate(1, 2)
            shares = [sum(draw.random() < p for _ in range(4)) / 4 for p in (chance, (chance + 1) / 2)]
            differences.append(shares[1] - shares[0])
        low, high = paired_interval(differences)
        covered += low <= 1 / 3 <= high
    assert 0.933 <= covered / trials <= 0.999, covered / trials
