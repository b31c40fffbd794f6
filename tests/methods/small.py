from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dynrank_ds.adapters.linear import AdaptedLinear
from dynrank_ds.methods.pe_dyra import PEDyRA, PEDyRAConfig

CPU = torch.device("cpu")
SIDES = {"a": (7, 5), "b": (4, 9), "c": (6, 6)}


def blocks() -> dict[str, AdaptedLinear]:
    return {name: AdaptedLinear(nn.Linear(*sides), 1.0) for name, sides in SIDES.items()}


def pe_dyra(total_steps: int = 20, **config: Any) -> PEDyRA:
    times = {"t_i": 4, "interval": 3, "t_f": 5, **config}
    return PEDyRA(PEDyRAConfig(**times), blocks(), total_steps, CPU)
