"""`dynrank validate`: check a recipe, its model and its data without processes or a GPU."""

from __future__ import annotations

import logging
import os

import torch

from dynrank_ds import dtypes
from dynrank_ds.recipe import Recipe
from dynrank_ds.training.checks import check_run
from dynrank_ds.training.samples import described

logger = logging.getLogger(__name__)


def validate(recipe: Recipe, n_processes: int = 1) -> str:
    """Check everything of a recipe that can be checked without its processes; return a summary of the run.

    Raises:
        DynrankError: what cannot be run.
    """
    run = check_run(recipe, n_processes)
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    if warning := dtypes.slow_dtype_warning(run.recipe.model.dtype, "cpu" if on_cpu else "cuda"):
        logger.warning("model.dtype: %s", warning)
    modules, recipe = run.modules, run.recipe
    trainable = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    base = sum(p.numel() for p in run.model.parameters()) - trainable
    linears = len({module.part.linear if module.part else name for name, module in modules.items()})
    held_out = f"; {len(run.held_out):,} more are held out" if len(run.held_out) else ""
    return "\n".join(
        [
            f"model       {recipe.model.path}: {base:,} parameters, in {run.dtype_reason}{_quantised(recipe)}",
            described(run.samples) + held_out,
            f"adapter     {linears} linears, total rank {sum(module.initial_rank for module in modules.values())}, "
            f"{trainable:,} trainable parameters ({trainable / base:.3%})",
            f"method      {recipe.method.name}: {run.method.planned_adjustments()} adjustments in {run.steps} steps",
            f"training    {run.steps} steps of {recipe.train.global_batch_size} samples, learning rate "
            f"{recipe.train.peak_rate:g}, alpha / rank {recipe.scale:.4g}",
            f"processes   {n_processes}, each {recipe.accumulation(n_processes)} micro-batches of "
            f"{recipe.train.micro_batch_size} a step",
        ]
    )


def _quantised(recipe: Recipe) -> str:
    if recipe.model.quantisation is None:
        return ""
    return f"; linear layers in {recipe.model.quantisation}" + (
        ", doubly quantised" if recipe.model.double_quantisation else ""
    )
