"""What a study is: the methods compared, the grid on which each is tuned, and the problems that decide.

A study is a YAML file. Each arm is a recipe with overrides and a grid; it is trained at every point of its grid and
scored on the tuning problems, then trained with the final seeds at its best point and scored on the final problems.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from dynrank_ds.composing import read_mapping
from dynrank_ds.errors import RecipeError
from dynrank_ds.recipe import Recipe, load_recipe
from dynrank_ds.section import Section, inconsistent

Value = bool | int | float | str | list[Any] | dict[str, Any] | None

TUNING: Literal["tuning"] = "tuning"
FINAL: Literal["final"] = "final"
Split = Literal["tuning", "final"]


class ResizeSection(Section):
    """What `dynrank resize` makes of an adapter before it is scored; exactly one key."""

    rank: int | None = Field(default=None, ge=1)
    """Mean rank of a module."""
    parameters: int | None = Field(default=None, ge=1)
    """At most so many elements of all factors."""
    keep: float | None = Field(default=None, gt=0, le=1)
    """Share of the squared norm of all updates that stays."""

    @model_validator(mode="after")
    def _refuse_none_or_several(self) -> ResizeSection:
        if len(self.options()) != 2:
            raise inconsistent("a resize needs exactly one of the keys rank, parameters, keep")
        return self

    def options(self) -> list[str]:
        """Return the options of `dynrank resize`."""
        given = self.model_dump(exclude_none=True)
        return [word for key, value in given.items() for word in (f"--{key}", str(value))]


class ArmSection(Section):
    """One of the methods compared."""

    recipe: str
    """Name of a shipped recipe, a YAML file, or parts MODEL+DATA+METHOD."""
    overrides: dict[str, Value] = Field(default_factory=dict)
    """Overrides, over those of the study."""
    grid: dict[str, list[Value]] = Field(min_length=1)
    """The values that are tried, by key: every combination is a point."""
    resize: ResizeSection | None = None


class SplitSection(Section):
    """Problems, and the seeds of the runs that are scored on them."""

    tasks: list[str] = Field(min_length=1)
    data_dir: str | None = None
    skip: int = Field(default=0, ge=0)
    """Problems of each task that are left out, its first ones."""
    limit: int | None = Field(default=None, ge=1)
    """Problems of each task that are scored, from there on."""
    seeds: list[int] = Field(min_length=1)
    """train.seed of each run."""


class BudgetSection(Section):
    """What runs must have in common to be compared."""

    by: Literal["parameters", "steps", "seconds"] = "parameters"
    """parameters: elements of all factors of the adapter that is scored."""
    tolerance: float = Field(default=0.02, ge=0, lt=1)
    """Share by which an arm may differ from the reference."""


class DesignSection(Section):
    """What is expected before any run, from which follows the difference that the study can detect."""

    score: float = Field(default=0.4, gt=0, lt=1)
    """Of the final problems."""
    correlation: float = Field(default=0.5, ge=0, lt=1)
    """Of the verdicts of two runs on the same problem."""
    seed_deviation: float = Field(default=0.02, ge=0)
    """Standard deviation of a score over seeds."""


class Study(Section):
    """A whole study."""

    about: str
    output: str
    """Folder for runs and adapters."""
    results: str
    """Folder for one JSON file a run."""
    processes: int = Field(default=1, ge=1)
    """That train one run."""
    overrides: dict[str, Value] = Field(default_factory=dict)
    """Overrides for all runs."""
    scoring: list[str] = Field(default_factory=list)
    """Options of `dynrank-eval run`."""
    timed: bool = True
    """Whether each run has its machine to itself, so that its time can be reported."""
    budget: BudgetSection = BudgetSection()
    design: DesignSection = DesignSection()
    reference: str
    """The arm that all others are compared with."""
    arms: dict[str, ArmSection] = Field(min_length=2)
    tuning: SplitSection
    final: SplitSection

    @model_validator(mode="after")
    def _refuse_a_reference_that_is_no_arm(self) -> Study:
        if self.reference not in self.arms:
            raise inconsistent(f"reference is {self.reference}: give one of {', '.join(self.arms)}")
        return self

    @model_validator(mode="after")
    def _refuse_keys_that_the_study_sets(self) -> Study:
        for name, arm in self.arms.items():
            for key in (*self.overrides, *arm.overrides, *arm.grid):
                if key in ("output.dir", "train.seed"):
                    raise inconsistent(f"{key} is given for {name}: a study sets it itself")
        return self

    def split(self, name: Split) -> SplitSection:
        """Return the problems and seeds of a split."""
        return self.tuning if name == TUNING else self.final


@dataclass(frozen=True)
class Point:
    """A method at one point of its grid."""

    arm: str
    values: Mapping[str, Value]
    """Of the grid, by key."""

    @property
    def label(self) -> str:
        """The values as text, such as `learning_rate=0.003`."""
        return ",".join(f"{key.split('.')[-1]}={_text(value)}" for key, value in self.values.items())


@dataclass(frozen=True)
class Run:
    """One training of a study."""

    point: Point
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and of its file of results."""
        return f"{self.point.arm}-{self.point.label}-seed{self.seed}"


def points(study: Study, arm: str) -> list[Point]:
    """Return the points of an arm's grid."""
    grid = study.arms[arm].grid
    return [Point(arm, dict(zip(grid, values, strict=True))) for values in product(*grid.values())]


def tuning_runs(study: Study, arm: str) -> list[Run]:
    """Return the runs that tune an arm."""
    return [Run(point, seed) for point in points(study, arm) for seed in study.tuning.seeds]


def overrides_of(study: Study, run: Run) -> dict[str, Value]:
    """Return what the recipe of a run is changed by, but for its folder."""
    arm = study.arms[run.point.arm]
    return {**study.overrides, **arm.overrides, **run.point.values, "train.seed": run.seed}


def recipe_of(study: Study, run: Run, directory: Path) -> tuple[Recipe, list[str]]:
    """Return the recipe of a run in `directory`, and the overrides that make it, as train.py takes them.

    Raises:
        RecipeError: naming the arm.
    """
    values: dict[str, Value] = {**overrides_of(study, run), "output.dir": str(directory)}
    texts = [f"{key}={_text(value)}" for key, value in values.items()]
    try:
        return load_recipe(study.arms[run.point.arm].recipe, texts), texts
    except RecipeError as error:
        raise RecipeError(f"{run.point.arm}: {error}") from error


def load_study(path: Path) -> Study:
    """Return the study of a YAML file, every recipe of it checked.

    Raises:
        RecipeError: what is wrong with it, in one sentence.
    """
    try:
        study = Study.model_validate(read_mapping(path, str(path)))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        mistakes = [
            f"{'.'.join(map(str, one['loc']))}: {one['msg']}".removeprefix(": ") for one in error.errors()
        ]
        raise RecipeError(f"{path}: {'; '.join(mistakes)}") from error
    for run in _every_tuning_run(study):
        recipe_of(study, run, Path(study.output))
    return study


def _every_tuning_run(study: Study) -> Iterator[Run]:
    for arm in study.arms:
        yield from tuning_runs(study, arm)


def _text(value: Value) -> str:
    return value if isinstance(value, str) else json.dumps(value)
