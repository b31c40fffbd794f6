"""What dynamic ranks add to a training step: steps with and without the method, timed in pairs."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from dynrank_ds.bench.figures import Figure
from dynrank_ds.bench.pairs import synchronise
from dynrank_ds.errors import RecipeError
from dynrank_ds.methods.base import Method
from dynrank_ds.recipe import Recipe
from dynrank_ds.training.loop import StepResult, Trainer
from dynrank_ds.training.run import set_up
from dynrank_ds.zero import processes

PARTS = {
    "on_backward": "inside backward: statistics, input energy, penalty",
    "observe": "in observation: statistics by optimizer step",
}
"""The method's functions that a step without adjustment calls, and what they are named in the figures."""
STEPS_BETWEEN_ADJUSTMENTS = 100
"""Over so many an adjustment's time is spread in the last figure."""


def measure_step(recipe: Recipe, quick: bool) -> Iterator[Figure]:
    """Yield (what, figure) of the recipe's method on one global batch.

    In 4 (quick) or 20 pairs of steps and 1 or 3 adjustments; intervals are of 95 %. Started in several processes, it
    times the first.

    Raises:
        RecipeError: the recipe's method never adjusts ranks.
    """
    pairs, adjustments = (4, 1) if quick else (20, 3)
    device = processes.start(recipe.deepspeed.timeout)
    with tempfile.TemporaryDirectory() as folder:
        sections = {
            "output": recipe.output.model_copy(update={"dir": f"{folder}/run"}),
            "data": recipe.data.model_copy(update={"held_out": 0}),
        }
        trainer = set_up(recipe.model_copy(update=sections), False, device)
        figures = _figures(Timing(trainer), pairs, adjustments)
    processes.stop()
    yield from figures


class Timing:
    """Steps of one trainer, with its method active or not, always on the first global batch."""

    def __init__(self, trainer: Trainer) -> None:
        self.adjusting = adjusting_steps(trainer)
        if not self.adjusting:
            raise RecipeError(
                f"method.name is {trainer.recipe.method.name}, which never adjusts ranks: give another"
            )
        self.quiet = quiet_step(trainer)
        engine = trainer.engine
        modules = {shape.name: module for shape, module in zip(engine.shapes, engine.modules, strict=True)}
        self._trainer, self._method = trainer, trainer.method
        self._at_rest = Method(trainer.recipe.method, modules, trainer.total_steps, trainer.device)
        self._method.attach()

    def seconds(self, steps: Sequence[tuple[int, bool]]) -> list[float]:
        """Return the seconds of steps, given as (number, whether the method is active)."""
        times: list[float] = []

        def after_step(result: StepResult) -> None:
            times.append(time.perf_counter() - began)
            result.stop = True

        for number, works in steps:
            trainer = self._trainer
            trainer.progress.step, trainer.progress.batch = number - 1, 0
            trainer.method = self._method if works else self._at_rest
            trainer.method.attach()
            began = time.perf_counter()
            trainer.train(after_step)
        return times

    def seconds_inside(self) -> dict[str, float]:
        """Return the seconds of the method's `on_backward` and `observe` in one step; the device is synchronised."""
        inside = _Inside(self._trainer.device)
        hooks = {name: inside.timed(name, getattr(self._method, name)) for name in PARTS}
        vars(self._method).update(hooks)
        self.seconds([(self.quiet, True)])
        for name in hooks:
            delattr(self._method, name)
        return inside.seconds


def adjusting_steps(trainer: Trainer) -> list[int]:
    """Return the steps of the run that end with an adjustment."""
    return [step for step in range(1, trainer.total_steps + 1) if trainer.method.adjusts_at(step)]


def quiet_step(trainer: Trainer) -> int:
    """Return the last step before an adjustment that is none itself; the run's last, where all before adjust."""
    adjusting = adjusting_steps(trainer)
    before = (step for step in range(1, max(adjusting, default=1)) if step not in adjusting)
    return max(before, default=trainer.total_steps)


class _Inside:
    """Adds up the seconds of calls, by name."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._device = device

    def timed(self, name: str, call: Callable[..., None]) -> Callable[..., None]:
        def timed(*arguments: Any) -> None:
            synchronise(self._device)
            began = time.perf_counter()
            call(*arguments)
            synchronise(self._device)
            self.seconds[name] += time.perf_counter() - began

        return timed


def _figures(timing: Timing, pairs: int, adjustments: int) -> list[Figure]:
    at_work, at_rest = (timing.quiet, True), (timing.quiet, False)
    timing.seconds([at_work, at_rest, at_work])  # DeepSpeed records the first
    times = timing.seconds([at_work, at_rest, at_rest, at_work] * (pairs // 2))
    worked, rested = times[0::4] + times[3::4], times[1::4] + times[2::4]
    ratios = [w / r - 1 for w, r in zip(worked, rested, strict=True)]
    added, half = statistics.mean(ratios), 1.96 * statistics.stdev(ratios) / len(ratios) ** 0.5
    step = statistics.median(rested)
    inside = [timing.seconds_inside() for _ in range(adjustments)]
    # The step after an adjustment is recorded anew, without prefetching.
    costs = [timing.seconds([(number, True), at_work]) for number in timing.adjusting[:adjustments]]
    adjusting, behind = (
        statistics.median(each) - statistics.median(worked) for each in zip(*costs, strict=True)
    )
    spread = (adjusting + behind) / step / STEPS_BETWEEN_ADJUSTMENTS
    parts = {title: statistics.median(seconds[name] for seconds in inside) for name, title in PARTS.items()}
    return [
        Figure("with fixed ranks", f"{step:.2f} s", {"processes": processes.world_size(), "seconds": step}),
        Figure(
            "the method adds to it",
            f"{added:+.1%} [{added - half:+.1%}, {added + half:+.1%}], {len(ratios)} pairs",
            {"added": added, "interval_95": [added - half, added + half]},
        ),
        *(
            Figure(title, f"{seconds:.3f} s, {seconds / step:+.1%}", {"seconds": seconds})
            for title, seconds in parts.items()
        ),
        Figure("one adjustment", f"{adjusting:.2f} s, {adjusting / step:.2f} steps", {"seconds": adjusting}),
        Figure(
            "the step after it, slower by", f"{behind:.2f} s, {behind / step:.2f} steps", {"seconds": behind}
        ),
        Figure(
            f"added, adjusting every {STEPS_BETWEEN_ADJUSTMENTS} steps",
            f"[{added - half + spread:+.1%}, {added + half + spread:+.1%}]",
        ),
    ]
