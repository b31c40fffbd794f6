"""Whether an adapter leaves its start: a look at the factor that begins at zero, early in a run."""

from __future__ import annotations

import logging
import math

from dynrank_ds.ranking.schedule import resolve_steps
from dynrank_ds.recipe import Recipe
from dynrank_ds.zero import processes
from dynrank_ds.zero.engine import ZeroEngine

logger = logging.getLogger(__name__)

_SHARE = 0.1
_LEAST_STEPS = 5
"""Fewer say little: the first steps are those of the warm-up."""


class MovementCheck:
    """Warns once if the factor that begins at zero has hardly moved after a tenth of the run, or after its warm-up.

    That factor is lora_B, or lora_E where a method has it: until it moves the adapter changes nothing. AdamW moves an
    element by about the learning rate at each step, so that what is asked for, one step at the method's default rate
    for this model, is little. A run that starts from an adapter is not looked at.
    """

    def __init__(self, recipe: Recipe, engine: ZeroEngine, hidden_size: int, total_steps: int) -> None:
        self._recipe, self._engine = recipe, engine
        self._expected = recipe.default_rate(hidden_size)
        warmup = resolve_steps(recipe.train.warmup, total_steps, "train.warmup")
        step = max(_LEAST_STEPS, math.ceil(_SHARE * total_steps), warmup)
        self._step = None if recipe.adapter.init_from else step

    def after_step(self, step: int) -> None:
        """Look at the weights if it is time; every process must call it after every step."""
        if step != self._step:
            return
        self._step = None  # a discarded step leaves the number where it is
        layout = self._engine.layout
        factor = "lora_E" if "lora_E" in layout.factors else "lora_B"
        mine = layout.factor(self._engine.weights(), factor).double()
        sums = processes.all_reduce_sum(mine.new_tensor([float(mine.square().sum()), len(mine)])).tolist()
        moved = math.sqrt(sums[0] / max(1, sums[1]))
        if moved < self._expected and processes.rank() == 0:
            logger.warning(
                "%s has hardly moved: after %d steps its elements are %.2g (root mean square), less than one step of "
                "%s's default learning rate for this model, %g, would make them. Training with train.learning_rate %g "
                "will do little: raise it",
                factor,
                step,
                moved,
                self._recipe.method.name,
                self._expected,
                self._recipe.train.peak_rate,
            )
