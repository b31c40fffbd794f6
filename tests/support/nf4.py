"""What a model in NF4 is given, sharded and not, to compare what comes out."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynrank_ds.adapters.targets import find_linears
from dynrank_ds.recipe import Recipe
from dynrank_ds.training.architecture import text_decoder


def batch() -> dict[str, Tensor]:
    """Arguments of SummedLoss: two samples of 12 tokens, every token but the first a target."""
    tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([row * 12 + i for row in range(2) for i in range(11)])
    return {"input_ids": tokens, "positions": positions, "targets": tokens.flatten()[positions + 1]}


def drawn_factors(model: PreTrainedModel, recipe: Recipe) -> dict[str, dict[str, Tensor]]:
    """Factors of every module that are all different from zero."""
    generator = torch.Generator().manual_seed(2)
    rank = recipe.adapter.rank
    linears = find_linears(model, recipe.adapter.targets, text_decoder(model), rank=rank)
    return {
        name: {
            "lora_A": torch.randn(rank, linear.in_features, generator=generator) * 0.1,
            "lora_B": torch.randn(rank, linear.out_features, generator=generator) * 0.1,
        }
        for name, linear in linears.items()
    }
