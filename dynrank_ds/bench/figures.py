"""What a benchmark yields, and how a ratio of paired times is stated."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """One measured figure: a printed line, and what `--json` keeps of it."""

    what: str
    text: str
    values: dict[str, Any] | None = None
    """None where the text says everything."""


class Interval(NamedTuple):
    """A median with the limits of its 95 % interval."""

    median: float
    low: float
    high: float


def median_interval(values: Sequence[float]) -> Interval:
    """Return the median and its 95 % interval by order statistics.

    The limits are the k-th smallest and k-th largest value with the largest k whose interval covers the median with a
    probability of at least 95 %, whatever the distribution (David and Nagaraja, Order Statistics, 2003, section 7.1).
    A mean with a normal interval would move with each pair that other work on the machine disturbed.

    Args:
        values: at least 6; of fewer even the whole range covers the median with less than 95 %.
    """
    n = len(values)
    assert n >= 6, n
    k = 0
    outside = 0.0  # the probability that fewer than k values lie on one side of the median
    while outside + math.comb(n, k) / 2**n <= 0.025:
        outside += math.comb(n, k) / 2**n
        k += 1
    ordered = sorted(values)
    return Interval(statistics.median(ordered), ordered[k - 1], ordered[n - k])
