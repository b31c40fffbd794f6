"""Putting adapters into a model by the names of its linears."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from dynrank_ds.adapters.heads import HeadedLinear, HeadSplit
from dynrank_ds.adapters.initial import module_generator
from dynrank_ds.adapters.linear import AdaptedLinear, AdaptedModule, FactorInit, Variant
from dynrank_ds.adapters.pissa import PissaLinear
from dynrank_ds.adapters.weight_decomposed import WeightDecomposedLinear
from dynrank_ds.errors import RecipeError

_LINEARS: Mapping[Variant, type[AdaptedLinear]] = {
    "plain": AdaptedLinear,
    "pissa": PissaLinear,
    "weight_decomposed": WeightDecomposedLinear,
}
"""What a linear that is one module becomes."""


def inject(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    rank: int,
    scale: float,
    init: FactorInit,
    seed: int,
    splits: Mapping[str, HeadSplit] | None = None,
    ranks: Mapping[str, int] | None = None,
    variant: Variant = "plain",
    dtype: torch.dtype | None = None,
) -> dict[str, AdaptedModule]:
    """Freeze `model` and replace the linear layers `linears`, by their full names, by adapted ones.

    Factors are created in `dtype`, by default that of the base weight. `splits` names the linears, by their last names,
    that fall into one module a head. `ranks` are those of single linears, by full names, in place of `rank`. `variant`
    is what linears become that are one module each. Returns the modules by their full module names, in the order of
    `linears`.

    Raises:
        RecipeError: the rank exceeds a linear's sides.
    """
    model.requires_grad_(False)
    modules: dict[str, AdaptedModule] = {}
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        split = (splits or {}).get(child)
        adapted = (
            _LINEARS[variant](linear, scale, dtype)
            if split is None
            else HeadedLinear(linear, split, scale, name, dtype)
        )
        wanted = (ranks or {}).get(name, rank)
        for module_name, module in adapted.adapted_modules(name).items():
            if wanted > min(module.in_features, module.out_features):
                raise RecipeError(
                    f"adapter.rank is {wanted}, but {module_name} is {module.out_features} x {module.in_features}: "
                    f"at most {min(module.in_features, module.out_features)} is possible"
                )
            module.initial_rank = wanted
            if wanted:
                drawn = init(
                    wanted, module.in_features, module.out_features, module_generator(seed, module_name, 0)
                )
                module.set_factors({k: v.to(linear.weight.device) for k, v in drawn.items()})
            modules[module_name] = module
        setattr(model.get_submodule(parent), child, adapted)
    return modules
