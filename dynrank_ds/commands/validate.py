"""`dynrank validate`: check a recipe, its model and its data without processes or a GPU."""

from __future__ import annotations

import logging
import os

import torch

from dynrank_ds import dtypes
from dynrank_ds.methods import build_method
from dynrank_ds.recipe import Recipe
from dynrank_ds.training.model import DTYPES, adapt, model_without_weights
from dynrank_ds.training.quantisation import quantisation_config
from dynrank_ds.training.samples import described, prepare_data, split_held_out
from dynrank_ds.training.trackers import check_packages
from dynrank_ds.zero.config import load_config

logger = logging.getLogger(__name__)


def validate(recipe: Recipe) -> str:
    """Check everything of a recipe that can be checked without processes; return a summary of the run.

    Raises:
        DynrankError: what cannot be run.
    """
    check_packages(recipe)
    recipe, reason = _with_dtype_of_this_machine(recipe)
    load_config(recipe.deepspeed.config, recipe.model.dtype == "bf16")
    recipe.accumulation(world_size=1)
    dataset, held_out = split_held_out(prepare_data(recipe)[0], recipe)
    quantisation_config(recipe.model, DTYPES[recipe.model.dtype])  # which needs packages
    model = model_without_weights(recipe.model.path)
    modules = adapt(model, recipe)
    steps = recipe.total_steps(len(dataset))
    method = build_method(recipe.method, modules, steps, torch.device("meta"))
    trainable = sum(p.numel() for module in modules.values() for p in module.factors().values())
    base = sum(p.numel() for p in model.parameters()) - trainable
    linears = len({module.part.linear if module.part else name for name, module in modules.items()})
    return "\n".join(
        [
            f"model       {recipe.model.path}: {base:,} parameters, in {reason}{_quantised(recipe)}",
            described(dataset) + (f"; {len(held_out):,} more are held out" if len(held_out) else ""),
            f"adapter     {linears} linears, total rank {sum(module.initial_rank for module in modules.values())}, "
            f"{trainable:,} trainable parameters ({trainable / base:.3%})",
            f"method      {recipe.method.name}: {method.planned_adjustments()} adjustments in {steps} steps",
        ]
    )


def _quantised(recipe: Recipe) -> str:
    if recipe.model.quantisation is None:
        return ""
    return f"; linear layers in {recipe.model.quantisation}" + (
        ", doubly quantised" if recipe.model.double_quantisation else ""
    )


def _with_dtype_of_this_machine(recipe: Recipe) -> tuple[Recipe, str]:
    """Return the recipe as a run on this machine would have it, and its dtype with the reason."""
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    device_type = "cpu" if on_cpu else "cuda"
    dtype, reason = dtypes.resolve_dtype(recipe.model.dtype, device_type)
    if warning := dtypes.slow_dtype_warning(dtype, device_type):
        logger.warning("model.dtype: %s", warning)
    return recipe.with_dtype(dtype), reason
