"""Planning again from what a run has logged."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dynrank_ds.methods import build_method
from dynrank_ds.ranking.plan import RankState
from dynrank_ds.recipe import Recipe
from dynrank_ds.training.model import adapt
from tests.support.recipes import STEPS, lines


def check_plans_follow_from_the_log(run: Path, recipe: Recipe) -> None:
    """Logged scores and ranks give every logged plan, by the policy alone, without any process group."""
    modules = adapt(AutoModelForCausalLM.from_pretrained(recipe.model.path), recipe)
    policy = build_method(recipe.method, modules, STEPS, torch.device("cpu"))
    limits = tuple(min(module.in_features, module.out_features) for module in modules.values())
    adjustments = lines(run / "ranks.jsonl")
    assert adjustments
    for line in adjustments:
        scores = [torch.tensor(line["scores"][name], dtype=torch.float64) for name in modules]
        before = tuple(line["before"][name] for name in modules)
        state = RankState(before, limits, recipe.adapter.rank, line["step"], STEPS)
        assert policy.plan(scores, state).sha256() == line["plan_sha256"]
