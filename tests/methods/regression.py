"""A task of drawn data for methods that learn gates: every process, micro-batch and module has its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dynrank_ds.adapters.initial import lora_factors, module_generator
from dynrank_ds.adapters.linear import AdaptedLinear
from tests.methods.small import SIDES

SCALE = 1.5


def live(rank: int, dtype: torch.dtype = torch.float32) -> dict[str, AdaptedLinear]:
    """The same modules at every call; B is drawn too, as after some steps."""
    made = {}
    for name, sides in SIDES.items():
        base = nn.Linear(*sides, bias=False, dtype=dtype).requires_grad_(False)
        base.weight.normal_(generator=module_generator(0, name, 2))
        factors = lora_factors(rank, *sides, module_generator(0, name, 0))
        factors["lora_B"].normal_(generator=module_generator(0, name, 1))
        made[name] = AdaptedLinear(base, SCALE)
        made[name].set_factors(factors)
        made[name].initial_rank = rank
    return made


class Regression:
    """For every step, process, and each of two micro-batches: inputs and targets of each module."""

    def __init__(self, steps: int, size: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(features: int) -> Tensor:
            return torch.randn(4, features, generator=generator, dtype=torch.float64)

        self.size = size
        self.data = {
            (step, process, micro_batch, name): (draw(n_in), draw(n_out))
            for step in range(1, steps + 1)
            for process in range(size)
            for micro_batch in range(2)
            for name, (n_in, n_out) in SIDES.items()
        }

    def backward(self, step: int, process: int, modules: dict[str, AdaptedLinear]) -> None:
        """What a process does of a step; losses are scaled by their number, because the engine takes the mean."""
        for name, module in modules.items():
            for micro_batch in range(2):
                (self.size * self._loss(step, process, micro_batch, name, module)).backward()

    def whole_loss(self, step: int, name: str, matrix: Tensor) -> Tensor:
        """Of all processes and micro-batches, where the module's weight is `matrix`."""
        parts = [
            self._loss(step, p, m, name, lambda x: x @ matrix.T) for p in range(self.size) for m in range(2)
        ]
        return torch.stack(parts).sum()

    def _loss(self, step: int, p: int, m: int, name: str, layer: Callable[[Tensor], Tensor]) -> Tensor:
        x, y = self.data[step, p, m, name]
        return (layer(x) - y).square().mean()
