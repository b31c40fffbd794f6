"""Intervals and tests for counts of solved problems."""

import math


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927), inside [0, 1] and never empty."""
    assert 0 <= successes <= n and n > 0
    z = 1.959963984540054
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
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
