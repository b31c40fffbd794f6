"""`dynrank report --replay`: plan every adjustment of a run again from its log."""

from __future__ import annotations

from pathlib import Path

import torch

from dynrank_ds.errors import RunError
from dynrank_ds.methods import build_method
from dynrank_ds.ranking.plan import RankState
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.model import adapt, model_without_weights
from dynrank_ds.training.rundir import RECIPE, RunDirectory
from dynrank_ds.training.samples import prepare_data, split_held_out


def replay(run: Path) -> tuple[int, list[int]]:
    """Compute every plan of a run anew from the logged scores and ranks, without its weights.

    Returns:
        The number of logged adjustments, and the steps of those whose logged plan is another one.

    Raises:
        DynrankError: the folder holds no run, or its model or data, which gives the number of steps, is not there.
    """
    if not (run / RECIPE).is_file():
        raise RunError(f"{run / RECIPE} does not exist: name the folder of a training run")
    adjustments = RunDirectory(run).adjustments()
    if not adjustments:
        return 0, []
    recipe = load_recipe(str(run / RECIPE))
    steps = recipe.train.steps or recipe.total_steps(len(split_held_out(prepare_data(recipe)[0], recipe)[0]))
    # The first line has the ranks that the run began with: an adapter that it started from need not be there any more.
    adapter = recipe.adapter.model_copy(update={"init_from": None})
    recipe = recipe.model_copy(update={"adapter": adapter})
    modules = adapt(model_without_weights(recipe.model.path), recipe)
    for name, module in modules.items():
        module.initial_rank = adjustments[0]["before"][name]
    method = build_method(recipe.method, modules, steps, torch.device("meta"))
    limits = tuple(module.max_rank for module in modules.values())
    differing = []
    for line in adjustments:
        scores = [torch.tensor(line["scores"][name], dtype=torch.float64) for name in modules]
        before = tuple(line["before"][name] for name in modules)
        plan = method.plan(scores, RankState(before, limits, recipe.adapter.rank, line["step"], steps))
        if plan.sha256() != line["plan_sha256"]:
            differing.append(line["step"])
    return len(adjustments), differing
