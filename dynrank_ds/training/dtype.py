"""What `model.dtype: auto` is in a run: the same in all of its processes, and after every resume."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from dynrank_ds import dtypes
from dynrank_ds.recipe import Recipe
from dynrank_ds.zero import processes

logger = logging.getLogger(__name__)


def agree_on_dtype(recipe: Recipe, before: Mapping[str, Any] | None, device: torch.device) -> Recipe:
    """Return the recipe with model.dtype bf16 or fp32, the same on every process, and log which and why.

    Every process must call it; `auto` takes one all-reduce.

    Args:
        recipe: the recipe as given.
        before: the recipe of the run that is resumed, whose dtype `auto` keeps, on another machine too.
        device: that this process trains on.

    Raises:
        RecipeError: model.attention needs another dtype.
    """
    dtype, reason = dtypes.resolve_dtype(recipe.model.dtype, device.type)
    if recipe.model.dtype == "auto":
        if before is not None:
            dtype = before["model"]["dtype"]
            reason = f"{dtype}: the run began with it"
        others = torch.tensor(float(dtype != "bf16"), device=device)
        without, world_size = int(processes.all_reduce_sum(others)), processes.world_size()
        if 0 < without < world_size:
            dtype, reason = "fp32", f"fp32: {without} of {world_size} processes have no bf16 arithmetic"
        logger.info("model.dtype: %s", reason)
    if warning := dtypes.slow_dtype_warning(dtype, device.type):
        logger.warning("model.dtype: %s", warning)
    return recipe.with_dtype(dtype)
