"""Every method of tests/support/methods.py with other rounding of its gradients: FOLDER, a setup as in methods.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dynrank_ds.recipe import load_recipe
from dynrank_ds.training import adamw, run
from tests.support.methods import METHODS
from tests.support.watching import main

# Four times the spacing of fp32 numbers.
RELATIVE = 4 * torch.finfo(torch.float32).eps
NEIGHBOURS = 33


def rounded_otherwise(gradient: Tensor, generator: torch.Generator) -> Tensor:
    """A flat gradient as sums in another order would have it.

    Their rounding is a share of the terms, that is of the gradients around an element, however small its own is;
    what is exactly 0 stays 0, as a row does that nothing reaches.
    """
    around = torch.nn.functional.avg_pool1d(
        gradient.square()[None], NEIGHBOURS, stride=1, padding=NEIGHBOURS // 2
    )[0].sqrt()
    noise = torch.randn(gradient.shape, generator=generator)
    return torch.where(gradient == 0, 0.0, gradient + RELATIVE * noise * around)


def rounding(folder: Path) -> None:
    update = adamw._update
    generator = torch.Generator().manual_seed(0)

    def updated(param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        update(param, rounded_otherwise(grad, generator), state, group)

    config, *overrides = sys.argv[2].split(",")
    for name in METHODS:
        chosen = [*overrides, f"deepspeed.config={config}", f"output.dir={folder}/{name}-1-rounding"]
        with patch.object(adamw, "_update", updated):
            run.train(load_recipe(str(folder / f"{name}.yaml"), chosen), False, torch.device("cpu"))


if __name__ == "__main__":
    main([rounding])
