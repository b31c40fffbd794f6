"""Scores of whole modules from a few batches of a run's data, sharded as in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from dynrank_ds.adapters.linear import ModuleBackward
from dynrank_ds.checkpoint.files import Progress
from dynrank_ds.data.collating import PackedCollator, PaddedCollator
from dynrank_ds.methods.base import MicroBatch, StepView
from dynrank_ds.methods.sensitivity import SensitivityMethod
from dynrank_ds.ranking.layout import ModuleShape
from dynrank_ds.ranking.spectrum import InputSketch
from dynrank_ds.recipe import Recipe, check_recipe
from dynrank_ds.training.dtype import agree_on_dtype
from dynrank_ds.training.loop import Trainer, TrainingData
from dynrank_ds.training.model import with_defaults
from dynrank_ds.training.run import build_engine, deepspeed_config
from dynrank_ds.training.rundir import RunDirectory
from dynrank_ds.training.samples import prepare_data, split_held_out
from dynrank_ds.zero import processes

Score = Literal["gradient", "energy", "sensitivity", "pe_dyra"]


@dataclass(frozen=True)
class Calibration:
    """What a calibration pass found.

    Attributes:
        shapes: of the adapted modules.
        limits: their largest ranks.
        scores: per module its score; with `energy` the shares of variance that its components explain.
    """

    shapes: Sequence[ModuleShape]
    limits: Sequence[int]
    scores: list[float] | list[list[float]]


def calibrate(
    recipe: Recipe, score: Score, batches: int, components: int, device: torch.device
) -> Calibration:
    """Return scores of every module that the recipe adapts; every process of the group must call it.

    Args:
        recipe: whose model, data, targets and global batch are used.
        score: `gradient`, an estimate of the norm of the loss's gradient by the module's weight, root mean square over
            the batches; `energy`, the components of its inputs (EVA); these two change no weight. `sensitivity`
            (AdaLoRA's) and `pe_dyra` train for so many steps, and are the sums of the module's triples.
        batches: global batches to read.
        components: of the inputs that are wanted with `energy`.
        device: of this process.

    Raises:
        DynrankError: what of the recipe, model or data cannot be run.
    """
    trained = score in ("sensitivity", "pe_dyra")
    recipe = agree_on_dtype(with_defaults(_for_calibration(recipe, trained, batches)), None, device)
    samples, pad_id = prepare_data(recipe)
    data = TrainingData(
        *split_held_out(samples, recipe), PackedCollator() if recipe.data.packing else PaddedCollator(pad_id)
    )
    engine, method = build_engine(
        recipe, deepspeed_config(recipe), None, recipe.total_steps(len(data.samples)), device
    )
    calibrator = _Calibrator(
        recipe, data, engine, method, RunDirectory(Path(recipe.output.dir)), Progress(), {}
    )
    if trained:
        found: Any = calibrator.trained_scores(score == "pe_dyra", batches)
    elif score == "gradient":
        found = calibrator.gradient_norms(batches)
    else:
        found = calibrator.input_components(batches, components)
    limits = [module.max_rank for module in engine.modules]
    return Calibration(engine.shapes, limits, found)


def _for_calibration(recipe: Recipe, trained: bool, batches: int) -> Recipe:
    """Return the recipe with LoRA, or with PE-DyRA that would adjust after the last batch."""
    values = recipe.model_dump(mode="json")
    values["method"] = {"name": "lora"}
    if trained:
        values["method"] = {"name": "pe_dyra", "t_i": 0, "interval": batches, "t_f": 1}
    values["train"] |= {"steps": batches + 2, "epochs": None, "warmup": 0, "schedule": "constant"}
    values["train"]["held_out_interval"] = None
    values["adapter"] |= {
        "init": "default",
        "init_from": None,
        "ranks": {},
        "dropout": 0.0,
        "weight_decomposed": False,
    }
    if trained:
        values["adapter"]["rank"] = max(2, recipe.adapter.rank)
    return check_recipe(values, "suggest-ranks")


class _Calibrator(Trainer):
    """A trainer that scores modules and writes nothing."""

    def gradient_norms(self, batches: int) -> list[float]:
        """Frobenius norms of dL/dW, root mean square over batches, estimated from the gradients of lora_B.

        At B = 0 the gradient of lora_B is s A G^T with G = dL/dW, and the rows of A are uniform and independent with
        variance 1 / (3 in): its squared norm is s^2 r ||G||^2 / (3 in) on average.
        """
        layout = self.engine.layout
        squares = torch.zeros(len(layout.shapes), dtype=torch.float64, device=self.device)
        for number in self._numbers(batches):
            self._backward(number)
            sums = layout.module_sums(layout.row_sums(self.engine.gradients().square()))
            squares += sums[layout.factors.index("lora_B")]
            self.engine.step(0.0, discard=True)
        processes.all_reduce_sum(squares)
        scale = self.recipe.scale
        return [
            (float(square) / batches * 3 * shape.in_features / (scale**2 * rank)) ** 0.5
            for square, shape, rank in zip(squares, layout.shapes, layout.ranks, strict=True)
        ]

    def input_components(self, batches: int, components: int) -> list[list[float]]:
        """Shares of variance that the components of each module's inputs explain, descending."""
        width = 2 * components + 8
        sketches = [
            InputSketch(shape.in_features, width, self.recipe.train.seed, self.device)
            for shape in self.engine.shapes
        ]
        seen = [MicroBatch()]
        begin = self.method.begin_micro_batch

        def noted(micro_batch: MicroBatch) -> None:
            seen[0] = micro_batch
            begin(micro_batch)

        def add(sketch: InputSketch, backward: ModuleBackward) -> None:
            sketch.add(backward.x, seen[0].token_mask)

        self.method.begin_micro_batch = noted  # type: ignore[method-assign]
        for module, sketch in zip(self.engine.modules, sketches, strict=True):
            module.on_backward = partial(add, sketch)
        tokens = 0
        for number in self._numbers(batches):
            self._backward(number)
            tokens += int(self.data.samples.lengths[self.batches.indices(number)].sum())
            self.engine.step(0.0, discard=True)
        for sketch in sketches:
            processes.all_reduce_sum(sketch.sums)
        return [sketch.explained(tokens)[:components].tolist() for sketch in sketches]

    def trained_scores(self, pe_dyra: bool, batches: int) -> list[float]:
        """Return the sums of the scores of each module's triples after so many steps of training."""
        self._pe_dyra, self._last = pe_dyra, batches
        for number in self._numbers(batches):
            self._step(self.batches.indices(number))
            self.progress.batch += 1
        return [float(scores.sum()) for scores in self._found]

    def _observe(self, view: StepView) -> None:
        self.method.observe(view)
        if view.step == self._last:
            assert isinstance(self.method, SensitivityMethod)
            self._found = (
                self.method.scores(view) if self._pe_dyra else SensitivityMethod.scores(self.method, view)
            )

    def _backward(self, number: int) -> Tensor:
        indices = self.batches.indices(number)
        return self._accumulate(indices, targets=int(self.data.samples.target_counts[indices].sum()))

    def _numbers(self, batches: int) -> tqdm[int]:
        return tqdm(range(batches), desc="calibration", unit="batch", disable=not self.is_first)
