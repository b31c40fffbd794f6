"""What one adjustment of ranks takes, how that grows with modules, ranks and processes, and whether it stays flat."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dynrank_ds.bench.adjusting import Adjusting, Adjustment, read_adjustments
from dynrank_ds.bench.figures import Figure, median_interval
from dynrank_ds.bench.models import write_random
from dynrank_ds.bench.sides import Side
from dynrank_ds.errors import RecipeError
from dynrank_ds.recipe import Recipe
from dynrank_ds.recipe_sections import LLAMA_LINEARS
from dynrank_ds.training.attention import with_attention

MIB = 2**20
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
"""Of the random LLaMA; its layers follow from the number of modules."""


@dataclass(frozen=True)
class Point:
    """One place of the grid."""

    processes: int
    modules: int
    """A multiple of 7: the linears of so many layers."""
    rank: int

    def __str__(self) -> str:
        return f"{self.processes} processes, {self.modules} modules, rank {self.rank}"


@dataclass(frozen=True)
class Grid:
    """What is measured: along modules at the lowest rank, and along ranks with the fewest modules."""

    processes: tuple[int, ...]
    modules: tuple[int, ...]
    ranks: tuple[int, ...]
    in_a_row: int
    """Adjustments, of the first point, of which the first and the last are compared."""
    compared: int
    """So many of both."""

    def lines(self, processes: int) -> list[tuple[str, list[Point]]]:
        """Return (what grows, points) for so many processes."""
        return [
            ("modules", [Point(processes, modules, self.ranks[0]) for modules in self.modules]),
            ("rank", [Point(processes, self.modules[0], rank) for rank in self.ranks]),
        ]


FULL = Grid((2, 4), (56, 140, 280, 560), (4, 16, 64), in_a_row=200, compared=20)
QUICK = Grid((2,), (56, 112), (4, 16), in_a_row=24, compared=10)
REPETITIONS = 6
"""Adjustments of a point after its first, which is not counted."""


def measure_adjustment(recipe: Recipe, quick: bool) -> Iterator[Figure]:
    """Yield every point of the grid, how time, collectives and bytes grow along it, and adjustments in a row.

    Of the recipe are taken method, data and DeepSpeed's configuration; the model is a random LLaMA 128 wide in fp32,
    of which the method adapts all linears. A step has one short sample a process, and always the same number in the
    run, so that the method decides alike every time.

    Raises:
        RecipeError: the benchmark was started in several processes, or the recipe's method never adjusts ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        yield from _figures(AdjustingRuns(recipe, Path(folder)), QUICK if quick else FULL)


def _figures(runs: AdjustingRuns, grid: Grid) -> Iterator[Figure]:
    for processes in grid.processes:
        measured: dict[Point, Figure] = {}
        for what, points in grid.lines(processes):
            for point in points:
                if point not in measured:
                    measured[point] = figure_of(point, runs.adjust(point, 1 + REPETITIONS))
                    yield measured[point]
            yield growth(what, points, measured)
    first = Point(grid.processes[0], grid.modules[0], grid.ranks[0])
    yield from in_a_row(first, runs.adjust(first, grid.in_a_row), grid.compared)


class AdjustingRuns:
    """Runs of one recipe on random models, each in processes of its own."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise RecipeError(
                "the benchmarks adjustment and scale start their own processes: start them in one"
            )
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        self._recipe, self._folder = recipe, folder
        self._count = 0

    def adjust(self, point: Point, adjustments: int) -> list[list[Adjustment]]:
        """Return so many adjustments of every process."""
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        shape = {**SHAPE, "num_hidden_layers": point.modules // len(LLAMA_LINEARS)}
        recipe = random_recipe(self._recipe, shape, point.rank, point.processes, folder)
        contender = Adjusting(str(point), recipe, folder)
        with Side(contender, point.processes, folder) as side:
            side.first_step()
            for _ in range(adjustments - 1):
                side.step()
        return read_adjustments(folder)


def random_recipe(recipe: Recipe, shape: dict[str, int], rank: int, samples: int, folder: Path) -> Recipe:
    """Return `recipe` with a random LLaMA of `shape` in fp32, all linears adapted, and so many samples a step."""
    path = write_random(recipe.model.path, shape, folder / "model")
    train = {"global_batch_size": samples, "micro_batch_size": 1, "held_out_interval": None}
    sections: dict[str, Any] = {
        "model": recipe.model.model_copy(update={"path": str(path), "quantisation": None}),
        "data": recipe.data.model_copy(update={"held_out": 0}),
        "adapter": recipe.adapter.model_copy(update={"rank": rank, "targets": LLAMA_LINEARS}),
        "train": recipe.train.model_copy(update=train),
        "output": recipe.output.model_copy(update={"dir": str(folder / "run")}),
    }
    return with_attention(recipe.model_copy(update=sections).with_dtype("fp32"), torch.device("cpu"))


def figure_of(point: Point, found: Sequence[Sequence[Adjustment]]) -> Figure:
    """Return the figure of a point from the adjustments of its processes, of which the first is not counted."""
    counted = [process[1:] for process in found]
    times = _of_the_slowest(counted)
    seconds = median_interval(times)
    parts = {
        part: statistics.median(
            max(a.seconds[part] for a in together) for together in zip(*counted, strict=True)
        )
        for part in counted[0][0].seconds
    }
    collectives = statistics.median(sum(a.collectives.values()) for a in counted[0])
    kinds = sorted({kind for a in counted[0] for kind in a.collectives})
    received = statistics.median(a.received for a in counted[0])
    changed = statistics.median(a.changed for a in counted[0])
    values = {
        "processes": point.processes,
        "modules": point.modules,
        "rank": point.rank,
        "seconds": seconds.median,
        "interval_95": [seconds.low, seconds.high],
        "parts": parts,
        "collectives": collectives,
        "by_kind": {k: statistics.median(a.collectives.get(k, 0) for a in counted[0]) for k in kinds},
        "bytes": received,
        "changed_modules": changed,
        "adjustments": len(times),
    }
    text = (
        f"{seconds.median:.3f} [{seconds.low:.3f}, {seconds.high:.3f}] s (resize {parts['resize']:.3f}), "
        f"{collectives:g} collectives, {received / MIB:.2f} MiB, {changed:g} modules changed"
    )
    return Figure(str(point), text, values)


def growth(what: str, points: Sequence[Point], measured: dict[Point, Figure]) -> Figure:
    """Return by how much the last point of a line takes more than the first."""
    first, last = (measured[point].values or {} for point in (points[0], points[-1]))
    factors = {key: last[key] / first[key] for key in (what, "seconds", "collectives", "bytes")}
    return Figure(
        f"{points[0].processes} processes, {what} x {factors[what]:g}",
        f"seconds x {factors['seconds']:.2f}, collectives x {factors['collectives']:.2f}, "
        f"bytes x {factors['bytes']:.2f}",
        {"processes": points[0].processes, "grows": what, "factors": factors},
    )


def in_a_row(point: Point, found: Sequence[Sequence[Adjustment]], compared: int) -> Iterator[Figure]:
    """Yield how the last `compared` adjustments differ from the first in time, memory and hooks.

    The very first is not counted; memory is that after the last adjustments of both, of the process that grew most.
    """
    counted = [process[1:] for process in found]
    times = _of_the_slowest(counted)
    ratio = median_interval([b / a for a, b in zip(times[:compared], times[-compared:], strict=True)])
    grown = max(process[-1].resident - process[compared - 1].resident for process in counted)
    hooks = sorted({adjustment.hooks for process in counted for adjustment in process})
    row = f"{len(found[0])} in a row"
    values: dict[str, Any] = {"processes": point.processes, "modules": point.modules, "rank": point.rank}
    yield Figure(
        f"{row}: seconds, last {compared} / first",
        f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
        {**values, "ratio": ratio.median, "interval_95": [ratio.low, ratio.high]},
    )
    yield Figure(
        f"{row}: memory grown after the first {compared}",
        f"{grown / MIB:+.1f} MiB of {counted[0][-1].resident / MIB:.0f}",
        {**values, "grown_bytes": grown},
    )
    yield Figure(
        f"{row}: hooks of the model",
        f"always {hooks[0]}" if len(hooks) == 1 else f"{hooks[0]} to {hooks[-1]}",
        {**values, "hooks": hooks},
    )


def _of_the_slowest(processes: Sequence[Sequence[Adjustment]]) -> list[float]:
    """Return the seconds of every adjustment, of the process that took longest."""
    return [max(sum(a.seconds.values()) for a in together) for together in zip(*processes, strict=True)]
