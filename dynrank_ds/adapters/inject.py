"""Putting adapters into a model by the names of its linears."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dynrank_ds.adapters.initial import block_generator
from dynrank_ds.adapters.linear import AdaptedLinear, FactorInit
from dynrank_ds.errors import RecipeError


def inject(
    model: nn.Module, targets: Sequence[str], rank: int, alpha: float, init: FactorInit, seed: int
) -> dict[str, AdaptedLinear]:
    """Freezes `model` and replaces every `nn.Linear` whose last name is in `targets` by an adapted one.

    Factors are created in the dtype of the base weight; s = alpha / rank. Returns the blocks by their
    full module name, in the model's order.

    Raises:
        RecipeError: a target matches no linear of the model, or the rank exceeds a linear's sides.
    """
    model.requires_grad_(False)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in targets
    }
    found = {name.rsplit(".", 1)[-1] for name in linears}
    for target in targets:
        if target not in found:
            known = sorted(
                {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
            )
            raise RecipeError(
                f"adapter.targets names '{target}', but the model has no linear of that name; it has {', '.join(known)}"
            )
    blocks: dict[str, AdaptedLinear] = {}
    for name, linear in linears.items():
        if rank > min(linear.in_features, linear.out_features):
            raise RecipeError(
                f"adapter.rank is {rank}, but {name} is {linear.out_features} x {linear.in_features}: "
                f"at most {min(linear.in_features, linear.out_features)} is possible"
            )
        block = AdaptedLinear(linear, alpha / rank)
        drawn = init(rank, block.in_features, block.out_features, block_generator(seed, name, 0))
        block.set_factors({k: v.to(linear.weight) for k, v in drawn.items()})
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, block)
        blocks[name] = block
    return blocks
