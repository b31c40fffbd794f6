"""`dynrank suggest-ranks`: a rank for each layer, from a calibration pass over a recipe's data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from dynrank_ds.errors import RecipeError
from dynrank_ds.ranking.allocation import ranks_by_component, ranks_by_score
from dynrank_ds.recipe import Recipe
from dynrank_ds.training.calibration import Calibration, Score, calibrate
from dynrank_ds.zero import processes

_COMPONENTS = 2.0
"""With `energy`, no module gets more than this times the mean rank: EVA's rho, and its default."""


def suggest_ranks(
    recipe: Recipe, score: Score, batches: int, mean_rank: int | None, parameters: int | None
) -> dict[str, int]:
    """Return a rank for every linear layer that the recipe adapts; in a process group or alone.

    Args:
        recipe: whose model, data and targets are used.
        score: as `calibrate`.
        batches: global batches of the calibration pass.
        mean_rank: the mean rank of a module, or
        parameters: the most elements that all lora_A and lora_B may have.

    Raises:
        DynrankError: what of the recipe, model or data cannot be run; a budget too small for rank 1 everywhere.
    """
    for name, value in (("--batches", batches), ("--mean-rank", mean_rank), ("--parameters", parameters)):
        if value is not None and value < 1:
            raise RecipeError(f"{name} is {value}: give at least 1")
    device = processes.start(recipe.deepspeed.timeout)
    most = mean_rank or recipe.adapter.rank
    found = calibrate(recipe, score, batches, round(_COMPONENTS * most), device)
    return allocate(found, mean_rank, parameters)


def allocate(found: Calibration, mean_rank: int | None, parameters: int | None) -> dict[str, int]:
    """Return ranks by module name within the budget.

    Raises:
        RecipeError: it does not give every module a triple.
    """
    n_modules = len(found.shapes)
    costs = [shape.in_features + shape.out_features for shape in found.shapes]
    if mean_rank is not None:
        costs, budget = [1] * n_modules, mean_rank * n_modules
    else:
        assert parameters is not None
        budget = parameters
    scores: Any = found.scores
    rule = ranks_by_component if isinstance(scores[0], list) else ranks_by_score
    try:
        ranks = rule(scores, costs, found.limits, budget)
    except ValueError as error:
        raise RecipeError(f"--parameters {parameters} is too small: {error}") from error
    return {shape.name: rank for shape, rank in zip(found.shapes, ranks, strict=True)}


def suggestion_text(recipe: Recipe, ranks: Mapping[str, int]) -> str:
    """Return the ranks as a `LoraConfig` of PEFT and as the adapter section of a recipe.

    Both keep the recipe's scale s in every layer, so that alpha / r is the same everywhere.
    """
    common = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
    others = {name: rank for name, rank in ranks.items() if rank != common}
    patterns = sorted(others, key=lambda name: (-len(name), name))
    scale = recipe.scale
    peft = {
        "r": common,
        "lora_alpha": _plain(scale * common),
        "target_modules": list(ranks),
        "rank_pattern": {name: others[name] for name in patterns},
        "alpha_pattern": {name: _plain(scale * others[name]) for name in patterns},
    }
    section = {"rank": common, "alpha": _plain(scale * common), "scaling": "rank", "ranks": others}
    lines = [f"    {key}={value!r}," for key, value in peft.items()]
    yaml_text = yaml.safe_dump({"adapter": section}, sort_keys=False)
    return "\n".join(
        [
            f"# {len(ranks)} layers, total rank {sum(ranks.values())}, ranks {min(ranks.values())} to "
            f"{max(ranks.values())}",
            "",
            "# PEFT",
            "LoraConfig(",
            *lines,
            ")",
            "",
            "# recipe",
            yaml_text.rstrip(),
        ]
    )


def _plain(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha
