"""The recipes of the papers' runs have the papers' numbers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dynrank_ds.methods import build_method
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.prepare import adapt

LLAMA2_7B = LlamaConfig()  # transformers' defaults are LLaMA-2-7B's sides
LLAMA3_8B = LlamaConfig(
    vocab_size=128256, intermediate_size=14336, num_key_value_heads=8, tie_word_embeddings=False
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
    blocks = adapt(model, recipe)
    trainable = sum(p.numel() for b in blocks.values() for p in b.factors().values())
    assert len(blocks) == 224
    assert trainable / base == pytest.approx(share, abs=0.5e-5)
    # 100,000 rows, batches of 16, 5 epochs; adjustments end 11,250 steps before the end.
    steps = recipe.total_steps(100_000)
    assert steps == 31_250
    method = build_method(recipe.method, blocks, steps, torch.device("meta"))
    due = [step for step in range(1, steps + 1) if method.adjusts_at(step)]
    assert due == list(range(3000, 20_000, 1000)) and len(due) == method.planned_adjustments()
