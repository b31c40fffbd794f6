"""Intervals, tests and estimators for counts of solved problems.

Written out, not taken from scipy: scoring needs no scipy otherwise (an import of half a second), and each is a few
lines that tests hold against published tables, enumeration and scipy's own values.
"""

import math
import random
from collections.abc import Sequence
from itertools import product

_Z = 1.959963984540054


def wilson_interval(successes: float, n: float) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion (Wilson 1927), inside [0, 1] and never empty."""
    assert 0 <= successes <= n and n > 0
    p = successes / n
    centre = (p + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
    half = _Z / (1 + _Z * _Z / n) * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))
    # At p = 0 and p = 1 one end is exact; floating point would leave it some 1e-17 away.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def shares_interval(shares: Sequence[float], samples: int) -> tuple[float, float]:
    """Return the 95 % interval of a mean of shares, one for each problem: never empty, and Wilson's for one sample.

    Wilson's interval of as many independent verdicts as would have the shares' variance, as in surveys by clusters
    (effective sample size: Korn and Graubard 1998, Survey Methodology 24), at most as many as were drawn.

    Args:
        shares: pass@k of each problem.
        samples: completions per problem.
    """
    n = len(shares)
    mean = sum(shares) / n
    variance = sum((share - mean) ** 2 for share in shares) / n
    effective: float = n
    if samples > 1 and 0 < mean < 1:
        effective = n * max(1.0, min(samples, mean * (1 - mean) / variance if variance else samples))
    return wilson_interval(mean * effective, effective)


def mcnemar_exact(b: int, c: int) -> float:
    """Return the two-sided exact p-value of McNemar's test on paired verdicts.

    Args:
        b: problems that only the first run solved.
        c: problems that only the second run solved.
    """
    n = b + c
    tail = sum(math.comb(n, i) for i in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of paired differences in [-1, 1]; never empty.

    Agresti and Min (2005), "Simple improved confidence intervals for comparing matched proportions": Wald's interval
    after adding one half to each of the four cells of paired verdicts, which is two more problems with half a
    difference of 1, half a one of -1, and one of 0. Said so, it holds for shares of several completions too.
    """
    n = len(differences) + 2
    centre = sum(differences) / n
    spread = (sum(value * value for value in differences) + 1) / n - centre * centre
    half = _Z * math.sqrt(spread / n)
    return max(-1.0, centre - half), min(1.0, centre + half)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the unbiased estimate that one of k samples is correct (Chen et al. 2021): 1 - C(n - c, k) / C(n, k)."""
    assert 0 <= correct <= n and 1 <= k <= n
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def sign_flip_test(differences: Sequence[float], resamples: int = 20_000, seed: int = 0) -> float:
    """Return the two-sided p-value of paired differences under random signs (Fisher's permutation test).

    Exact up to 14 differences that are not 0, else over `resamples` draws, which count the observed one as well.
    """
    nonzero = [abs(value) for value in differences if value]
    observed = abs(sum(differences)) - 1e-12
    if len(nonzero) <= 14:
        choices = product((1, -1), repeat=len(nonzero))
        totals = (sum(s * v for s, v in zip(signs, nonzero, strict=True)) for signs in choices)
        sums = [abs(total) for total in totals]
        return sum(value >= observed for value in sums) / len(sums)
    draw = random.Random(seed)
    extreme = 0
    for _ in range(resamples):
        signs = draw.getrandbits(len(nonzero))
        flipped = sum(value if signs >> place & 1 else -value for place, value in enumerate(nonzero))
        extreme += abs(flipped) >= observed
    return (extreme + 1) / (resamples + 1)
