"""Intervals and tests of a study: over its problems and over its seeds.

A run's verdicts on a task are a row of an array (seeds, problems); a score is the mean over tasks of its mean. Problems
and seeds are resampled independently of each other (Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics
1(2)), which counts what one run answers by chance in both: intervals over several seeds are rather too wide than too
narrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Shares = Mapping[str, NDArray[np.float64]]
"""By task: (seeds, problems), of each problem the share of its completions that are correct."""

RESAMPLES = 5000
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Difference:
    """A score minus the reference's, on the same problems."""

    mean: float
    low: float
    high: float
    p_value: float
    """Two-sided, by the bootstrap."""


def mean_score(shares: Shares) -> float:
    """Return the mean over tasks of the mean over seeds and problems."""
    return float(np.mean([values.mean() for values in shares.values()]))


def score_interval(shares: Shares, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a score over problems and seeds, the same at every call.

    It is the bootstrap's percentile interval, or Wilson's where all verdicts are the same, which resamples cannot vary.
    """
    from dynrank_eval.statistics import wilson_interval

    low, high = np.quantile(_resampled([shares], seed)[0], [0.025, 0.975])
    if low < high:
        return float(low), float(high)
    return wilson_interval(mean_score(shares) * _problems(shares), _problems(shares))


def difference(ours: Shares, reference: Shares, seed: int = 0) -> Difference:
    """Compare two arms that were scored on the same problems.

    Problems are resampled for both arms alike, seeds for each arm by itself; where no resample differs from another,
    the interval is Agresti and Min's of no difference.
    """
    from dynrank_eval.statistics import paired_interval

    first, second = _resampled([ours, reference], seed)
    changes = first - second
    low, high = np.quantile(changes, [0.025, 0.975])
    if low == high == 0:
        low, high = paired_interval([0.0] * _problems(ours))
    # Davison and Hinkley (1997), eq. 4.11: the observed value counts as one more resample.
    one_sided = (1 + min((changes <= 0).sum(), (changes >= 0).sum())) / (RESAMPLES + 1)
    return Difference(
        mean_score(ours) - mean_score(reference), float(low), float(high), min(1.0, 2 * float(one_sided))
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979): the chance of one false finding stays below 5 %."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected


def detectable_difference(
    problems: int, seeds: int, score: float, correlation: float, seed_deviation: float, comparisons: int = 1
) -> float:
    """Return the difference of two arms that a two-sided test at 5 % finds with a power of 80 %.

    The variance of a difference is 2 p (1 - p) (1 - rho) / problems, of verdicts with correlation rho on one problem,
    plus 2 sigma^2 / seeds.

    Args:
        comparisons: that are tested together, at 5 % / comparisons each (Bonferroni: the least that Holm's correction
            finds).
    """
    over_problems = 2 * score * (1 - score) * (1 - correlation) / problems
    over_seeds = 2 * seed_deviation**2 / seeds
    quantiles = _NORMAL.inv_cdf(1 - 0.025 / comparisons) + _NORMAL.inv_cdf(0.8)
    return quantiles * math.sqrt(over_problems + over_seeds)


def _problems(shares: Shares) -> int:
    return sum(values.shape[1] for values in shares.values())


def _resampled(arms: Sequence[Shares], seed: int) -> list[NDArray[np.float64]]:
    """Return of each arm (RESAMPLES,) scores, on the same resampled problems."""
    generator = np.random.default_rng(seed)
    seeds = [len(next(iter(shares.values()))) for shares in arms]
    # One fewer than there are: with n the variance over seeds would come out (n - 1) / n of what it is, which matters
    # for three (Rao and Wu 1988, Journal of the American Statistical Association 83, with m = n - 1).
    of_seeds = [_weights(generator, n, n - 1) if n > 1 else np.ones((RESAMPLES, 1)) for n in seeds]
    scores = [np.zeros(RESAMPLES) for _ in arms]
    for task, values in arms[0].items():
        of_problems = _weights(generator, values.shape[1], values.shape[1])
        for index, shares in enumerate(arms):
            scores[index] += ((of_seeds[index] @ shares[task]) * of_problems).sum(axis=1) / len(arms[0])
    return scores


def _weights(generator: np.random.Generator, n: int, draws: int) -> NDArray[np.float64]:
    """Return (RESAMPLES, n): of each of n the share that it has of so many draws with replacement."""
    return generator.multinomial(draws, np.full(n, 1 / n), size=RESAMPLES) / draws
