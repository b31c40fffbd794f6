"""What the records of a study say: each arm at its best point, and its difference from the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynrank_ds.study.definition import FINAL, TUNING, Point, Run, Study, points
from dynrank_ds.study.records import Record, best_point, read_record, tuned_scores
from dynrank_ds.study.statistics import Difference, Shares, difference, holm


@dataclass(frozen=True)
class TuningScore:
    """An arm at one point of its grid."""

    point: Point
    records: Sequence[Record]
    """Of the tuning seeds, as far as they are there."""


@dataclass(frozen=True)
class ArmOutcome:
    """An arm that is tuned and was scored on the final problems with every seed."""

    best: Point
    is_at_edge: bool
    """Whether the best point has the first or last of several values of a key: a wider grid might hold a better one."""
    tuning_score: float
    final: Sequence[Record]
    shares: Shares

    def mean(self, fact: str) -> float:
        """Return the mean over seeds of one of the numbers in Facts, such as `parameters`, `steps` or `seconds`."""
        return float(np.mean([getattr(one.facts, fact) for one in self.final]))

    @property
    def seed_scores(self) -> list[float]:
        """The final score of each seed."""
        return [
            float(np.mean([values[i].mean() for values in self.shares.values()]))
            for i in range(len(self.final))
        ]


@dataclass(frozen=True)
class Comparison:
    """An arm against the reference."""

    difference: Difference
    corrected_p: float | None
    """By Holm's method over the arms with the reference's budget; None of an arm without it."""

    @property
    def is_significant(self) -> bool:
        """Whether the difference stands at 5 % after the correction."""
        return self.corrected_p is not None and self.corrected_p < 0.05


def tuning_scores(study: Study, arm: str) -> list[TuningScore]:
    """Return what there is of an arm's grid."""
    found = []
    for point in points(study, arm):
        records = [read_record(study, Run(point, seed)) for seed in study.tuning.seeds]
        found.append(TuningScore(point, [one for one in records if one and one.is_done(TUNING)]))
    return found


def arm_outcome(study: Study, arm: str) -> ArmOutcome | None:
    """Return an arm's outcome, None while a run of it is missing."""
    scored = tuned_scores(study, arm)
    if scored is None:
        return None
    best = best_point(scored)
    records = [read_record(study, Run(best, seed)) for seed in study.final.seeds]
    final = [one for one in records if one and one.is_done(FINAL)]
    if len(final) < len(records):
        return None
    grid = study.arms[arm].grid
    at_edge = any(
        len(grid[key]) > 1 and value in (grid[key][0], grid[key][-1]) for key, value in best.values.items()
    )
    tuning_score = next(score for point, score in scored if point is best)
    return ArmOutcome(best, at_edge, tuning_score, final, _final_shares(final))


def comparisons(study: Study, outcomes: dict[str, ArmOutcome]) -> dict[str, Comparison]:
    """Return how each finished arm differs from the reference; {} while that is not finished."""
    reference = outcomes.get(study.reference)
    if reference is None or not reference.shares:
        return {}
    others = {name: one for name, one in outcomes.items() if name != study.reference and one.shares}
    differences = {name: difference(one.shares, reference.shares) for name, one in others.items()}
    matched = [name for name, one in others.items() if has_budget_of(study, one, reference)]
    corrected = dict(zip(matched, holm([differences[name].p_value for name in matched]), strict=True))
    return {name: Comparison(differences[name], corrected.get(name)) for name in others}


def has_budget_of(study: Study, arm: ArmOutcome, reference: ArmOutcome) -> bool:
    """Return whether an arm differs from the reference in what runs are matched by, by no more than the tolerance."""
    ours, theirs = (one.mean(study.budget.by) for one in (arm, reference))
    return abs(ours - theirs) <= study.budget.tolerance * theirs


def _final_shares(records: Sequence[Record]) -> Shares:
    """Return (seeds, problems) by task, {} where every run diverged; one that diverged solved nothing."""
    scored = [one.shares(FINAL) for one in records if one.facts.diverged is None]
    nothing = {task: np.zeros_like(values) for task, values in scored[0].items()} if scored else {}
    rows = [nothing if one.facts.diverged else one.shares(FINAL) for one in records]
    return {task: np.stack([row[task] for row in rows]) for task in nothing}
