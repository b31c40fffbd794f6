"""How many parameters an adapter can come to have while its ranks change."""

from __future__ import annotations

import math

import torch

from dynrank_ds.methods import build_method
from dynrank_ds.methods.ard_lora import ARDLoRAConfig
from dynrank_ds.methods.base import Method
from dynrank_ds.methods.elalora import ElaLoRAConfig
from dynrank_ds.methods.increlora import IncreLoRAConfig
from dynrank_ds.methods.pe_dyra import PEDyRAConfig
from dynrank_ds.methods.sensitivity import SensitivityConfig
from dynrank_ds.planning.architecture import Architecture
from dynrank_ds.recipe import Recipe


def method_of(recipe: Recipe, architecture: Architecture, steps: int) -> Method:
    """Return the recipe's method on modules without weights.

    Raises:
        RecipeError: its times leave no adjustment in `steps`, or it cannot run on these modules.
    """
    return build_method(recipe.method, architecture.modules, steps, torch.device("meta"))


def row_statistics(recipe: Recipe) -> int:
    """Return how many vectors of the adapters' size the method keeps."""
    return 2 if isinstance(recipe.method, SensitivityConfig) else 0


def most_parameters(recipe: Recipe, architecture: Architecture, method: Method) -> int:
    """Return a bound on the adapter's parameters at any step: every triple that moves, moves to the largest module."""
    config, start = recipe.method, architecture.trainable_parameters
    costs = [shape.triple_parameters(method.factors) for shape in method.shapes]
    if isinstance(config, ARDLoRAConfig):
        return sum(cost * math.ceil(round(config.alpha_max * recipe.adapter.rank, 9)) for cost in costs)
    if isinstance(config, IncreLoRAConfig):
        grown = config.final_mean_rank(recipe.adapter.rank) - recipe.adapter.rank
        return start + grown * len(costs) * max(costs)
    if isinstance(config, PEDyRAConfig) and config.conserve == "parameters":
        return start
    adjustments = method.planned_adjustments()
    if isinstance(config, PEDyRAConfig) and config.moves != "prune":
        moved = adjustments * (config.k_max if config.k == "auto" else config.k)
        leaving = 0 if config.moves == "expand" else min(costs)
    elif isinstance(config, ElaLoRAConfig):
        moved, leaving = adjustments * config.b, min(costs)
    else:  # the others only ever remove, or grow into what was removed
        return start
    if leaving:  # every module keeps one triple
        moved = min(moved, (recipe.adapter.rank - 1) * len(costs))
    return start + moved * (max(costs) - leaving)
