"""What a study keeps of each run: a small JSON file, in which every problem has its verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from dynrank_ds.errors import RunError
from dynrank_ds.files import read_json, replace_text
from dynrank_ds.section import Section
from dynrank_ds.study.definition import TUNING, Point, Run, Split, Study, Value, overrides_of, points


class TaskScore(Section):
    """A task's verdicts."""

    protocol: str
    data_hash: str
    """Of the problems, in their order."""
    shares: list[float]
    """Of each problem the share of its completions that are correct; 0 or 1 where there is one."""


class Facts(Section):
    """What training left."""

    recipe_sha256: str
    """Of the recipe with every default spelled out, without its folder."""
    identity: dict[str, str]
    """SHA-256 hashes of base model, tokenizer and tokenised data."""
    environment: dict[str, Any]
    """Code revision, versions, number of processes."""
    machine: dict[str, Any]
    steps: int
    seconds: float
    """Of all steps, without start and checkpoints."""
    peak_parameters: int
    """The largest number of trainable parameters of any step."""
    parameters: int
    """Elements of all factors of the adapter that was scored."""
    ranks: dict[str, list[int]]
    """Of that adapter: by kind of linear, in the order of layers."""
    loss: float | None
    """Mean over the last tenth of the steps; None of a run that diverged."""
    diverged: str | None = None
    """Why training gave up, where loss or gradients were no longer finite: every score counts as 0."""


class Record(Section):
    """One run, and its scores so far."""

    arm: str
    point: dict[str, Value]
    seed: int
    recipe: str
    overrides: dict[str, Value]
    resize: dict[str, Value] | None
    facts: Facts
    scores: dict[Split, dict[str, TaskScore]] = Field(default_factory=dict)

    def is_done(self, split: Split) -> bool:
        """Return whether the run was scored on these problems, or never can be."""
        return split in self.scores or self.facts.diverged is not None

    def score(self, split: Split) -> float:
        """Return the mean over tasks of the share of problems solved, 0 of a run that diverged."""
        if self.facts.diverged is not None:
            return 0.0
        return float(np.mean([np.mean(task.shares) for task in self.scores[split].values()]))

    def shares(self, split: Split) -> Mapping[str, NDArray[np.float64]]:
        """Return each task's shares."""
        return {name: np.array(task.shares) for name, task in self.scores[split].items()}


def settings(study: Study, run: Run) -> dict[str, Any]:
    """Return what a record says of how its run is made."""
    arm = study.arms[run.point.arm]
    return {
        "arm": run.point.arm,
        "point": dict(run.point.values),
        "seed": run.seed,
        "recipe": arm.recipe,
        "overrides": overrides_of(study, run),
        "resize": arm.resize.model_dump(exclude_none=True) if arm.resize else None,
    }


def path_of(study: Study, run: Run) -> Path:
    """Return the file of a run's record."""
    return Path(study.results) / f"{run.name}.json"


def read_record(study: Study, run: Run) -> Record | None:
    """Return the record of a run, None where it has none yet.

    Raises:
        RunError: it is no record, or was made by another definition of the study.
    """
    path = path_of(study, run)
    if not path.is_file():
        return None
    try:
        record = Record.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RunError(f"{path} is no record of a study ({where}: {first['msg']}): move it away") from error
    expected = settings(study, run)
    found = record.model_dump(include=set(expected))
    for key, value in expected.items():
        if found[key] != value:
            raise RunError(
                f"{path} was made with {key} {json.dumps(found[key])}, the study says {json.dumps(value)}: move the "
                "file away, or give the study another folder for its results"
            )
    return record


def write_record(study: Study, run: Run, record: Record) -> None:
    """Write or replace the file of a run's record."""
    path = path_of(study, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.model_dump(mode="json").items()
    ]
    replace_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def tuned_scores(study: Study, arm: str) -> list[tuple[Point, float]] | None:
    """Return every point of an arm with its mean tuning score, None while one is missing."""
    found = []
    for point in points(study, arm):
        records = [read_record(study, Run(point, seed)) for seed in study.tuning.seeds]
        scores = [one.score(TUNING) for one in records if one and one.is_done(TUNING)]
        if len(scores) < len(records):
            return None
        found.append((point, sum(scores) / len(scores)))
    return found


def best_point(scored: Sequence[tuple[Point, float]]) -> Point:
    """Return the point with the highest score, of equal ones the first of the grid."""
    return max(scored, key=lambda one: one[1])[0]
