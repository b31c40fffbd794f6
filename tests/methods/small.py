from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynrank_ds.adapters.linear import AdaptedLinear
from dynrank_ds.methods.base import AllReduceSum, StepView
from dynrank_ds.methods.pe_dyra import PEDyRA, PEDyRAConfig
from dynrank_ds.ranking.layout import ShardLayout

CPU = torch.device("cpu")
Sides = Mapping[str, tuple[int, int]]
"""(in, out) by module."""
SIDES = {"a": (7, 5), "b": (4, 9), "c": (6, 6)}


def random_sides(seed: int) -> Sides:
    """Of three modules, 8 to 16 each."""
    drawn = torch.randint(8, 17, (3, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    return {name: (n_in, n_out) for name, (n_in, n_out) in zip("abc", drawn, strict=True)}


def make_modules(
    sides: Sides = SIDES, rank: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, AdaptedLinear]:
    made = {name: AdaptedLinear(nn.Linear(*pair, dtype=dtype), 1.0) for name, pair in sides.items()}
    for module in made.values():
        module.initial_rank = rank
    return made


def pe_dyra(
    sides: Sides = SIDES,
    total_steps: int = 20,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    **config: Any,
) -> PEDyRA:
    times = {"t_i": 4, "interval": 3, "t_f": 5, **config}
    return PEDyRA(PEDyRAConfig(**times), make_modules(sides, rank, dtype), total_steps, CPU)


def step_view(
    weights: Tensor,
    gradients: Tensor,
    layout: ShardLayout,
    total: AllReduceSum = lambda tensor: tensor,
    step: int = 1,
    tokens: int = 1,
    rate_factor: float = 1.0,
) -> StepView:
    return StepView(step, weights, gradients, layout, tokens, rate_factor, total)
