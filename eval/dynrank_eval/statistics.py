"""Intervals, tests and estimators for counts of solved problems."""

import math

_Z = 1.959963984540054


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927), inside [0, 1] and never empty."""
    assert 0 <= successes <= n and n > 0
    p = successes / n
    centre = (p + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
    half = _Z / (1 + _Z * _Z / n) * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))
    # At p = 0 and p = 1 one end is exact; floating point would leave it some 1e-17 away.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact p-value of McNemar's test on paired verdicts.

    Args:
        b: problems that only the first run solved.
        c: problems that only the second run solved.
    """
    n = b + c
    tail = sum(math.comb(n, i) for i in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_interval(b: int, c: int, n: int) -> tuple[float, float]:
    """The 95 % interval of the difference of two paired proportions, second minus first.

    Agresti and Min (2005), "Simple improved confidence intervals for comparing matched proportions": Wald's interval
    after adding one half to each of the four cells.

    Args:
        b, c: as in `mcnemar_exact`.
        n: problems.
    """
    assert b + c <= n and n > 0
    total, only_first, only_second = n + 2, b + 0.5, c + 0.5
    centre = (only_second - only_first) / total
    spread = (only_first + only_second) / total - centre * centre
    half = _Z * math.sqrt(spread / total)
    return max(-1.0, centre - half), min(1.0, centre + half)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased estimate that one of k samples is correct (Chen et al. 2021): 1 - C(n - c, k) / C(n, k)."""
    assert 0 <= correct <= n and 1 <= k <= n
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)
