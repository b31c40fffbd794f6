"""The recipes of the papers' runs have the papers' numbers, and the quickstart's the budgets that they state."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dynrank_ds.adapters.linear import AdaptedModule
from dynrank_ds.methods import build_method
from dynrank_ds.ranking.layout import ShardLayout, whole
from dynrank_ds.ranking.plan import RankState
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.model import adapt

LLAMA2_7B = LlamaConfig()  # transformers' defaults are LLaMA-2-7B's sides
LLAMA3_8B = LlamaConfig(
    vocab_size=128256, intermediate_size=14336, num_key_value_heads=8, tie_word_embeddings=False
)
SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
)


@pytest.mark.parametrize(
    ("name", "config", "share"),
    [
        ("llama2_7b_metamathqa_pe_dyra", LLAMA2_7B, 0.00148),
        ("llama3_8b_metamathqa_pe_dyra", LLAMA3_8B, 0.00131),
    ],
)
def test_pe_dyra_on_llama_trains_the_share_of_parameters_that_the_paper_names(
    name: str, config: LlamaConfig, share: float
) -> None:
    recipe = load_recipe(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    base = sum(p.numel() for p in model.parameters())
    modules = adapt(model, recipe)
    trainable = sum(p.numel() for b in modules.values() for p in b.factors().values())
    assert len(modules) == 224
    assert trainable / base == pytest.approx(share, abs=0.5e-5)
    # 100,000 rows, batches of 16, 5 epochs; adjustments end 11,250 steps before the end.
    steps = recipe.total_steps(100_000)
    assert steps == 31_250
    method = build_method(recipe.method, modules, steps, torch.device("meta"))
    due = [step for step in range(1, steps + 1) if method.adjusts_at(step)]
    assert due == list(range(3000, 20_000, 1000)) and len(due) == method.planned_adjustments()


def final_ranks(name: str) -> tuple[list[AdaptedModule], tuple[int, ...]]:
    """The modules of a quickstart recipe on SmolLM2-135M's sides, and their ranks at the end if scores were chance."""
    recipe = load_recipe(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SMOLLM2_135M)
    modules, steps = adapt(model, recipe), recipe.total_steps(0)
    method = build_method(recipe.method, modules, steps, torch.device("cpu"))
    ranks = tuple(module.initial_rank for module in modules.values())
    method.start(ShardLayout(method.shapes, ranks, method.factors, whole))
    limits = tuple(min(module.in_features, module.out_features) for module in modules.values())
    generator, adjustments = torch.Generator().manual_seed(0), 0
    for step in range(1, steps + 1):
        if method.adjusts_at(step):
            scores = [torch.rand(rank, generator=generator, dtype=torch.float64) for rank in ranks]
            plan = method.plan(scores, RankState(ranks, limits, recipe.adapter.rank, step, steps))
            method.applied(plan, step)
            ranks, adjustments = plan.ranks, adjustments + 1
    assert adjustments == method.planned_adjustments()
    return list(modules.values()), ranks


@pytest.mark.parametrize("method", ["pe_dyra", "lora", "adalora", "elalora", "increlora", "dynamic_dora"])
def test_every_quickstart_with_a_budget_ends_with_the_total_rank_of_lora(method: str) -> None:
    name = "quickstart" if method == "pe_dyra" else f"quickstart_{method}"
    assert load_recipe(name).method.name == method
    assert sum(final_ranks(name)[1]) == 4 * 210


def test_weightlora_keeps_the_papers_share_of_adapters_and_plus_fills_their_memory() -> None:
    kept = final_ranks("quickstart_weightlora")[1]
    assert set(kept) == {0, 4}
    assert sum(rank > 0 for rank in kept) == round(210 * 100 / 224)  # of LLaMA3-8B
    modules, grown = final_ranks("quickstart_weightlora_plus")
    costs = [module.in_features + module.out_features for module in modules]
    held = sum(rank * cost for rank, cost in zip(grown, costs, strict=True)) / (4 * sum(costs))
    assert 0.85 < held <= 1 and sum(rank > 0 for rank in grown) == 94


def test_ard_loras_quickstart_begins_with_loras_number_of_parameters() -> None:
    modules, _ = final_ranks("quickstart_ard_lora")
    assert len(modules) == 30 * (9 + 3 + 3 + 9 + 3)
    per_head = 2 * sum(module.in_features + module.out_features for module in modules)
    lora = 4 * sum(module.in_features + module.out_features for module in final_ranks("quickstart_lora")[0])
    assert per_head / lora == pytest.approx(1.07, abs=0.005)
