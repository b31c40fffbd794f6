"""The methods, one file per paper; the recipe's `method.name` chooses."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, SerializeAsAny
from pydantic_core import PydanticCustomError

from dynrank_ds.adapters.linear import AdaptedModule
from dynrank_ds.methods.base import Method, MethodConfig

_CLASSES = (
    "lora:LoRA",
    "pe_dyra:PEDyRA",
    "adalora:AdaLoRA",
    "elalora:ElaLoRA",
    "increlora:IncreLoRA",
    "dynamic_dora:DynamicDoRA",
    "weightlora:WeightLoRA",
    "weightlora:WeightLoRAPlus",
    "ard_lora:ARDLoRA",
    "squeeze:Squeeze",
)
"""FILE:CLASS of every method: the one line that a new method adds."""


def _loaded(path: str) -> tuple[str, type[Method]]:
    method: type[Method] = pkgutil.resolve_name(f"{__name__}.{path}")
    return method.config_class.model_fields["name"].default, method


METHODS: dict[str, type[Method]] = dict(map(_loaded, _CLASSES))
"""By `method.name`."""


def _config(values: Any) -> Any:
    """Return the section of the method that `values` names."""
    if not isinstance(values, dict):
        return values
    name = values.get("name")
    if not isinstance(name, str) or name not in METHODS:
        raise PydanticCustomError("unknown_method", "known are {known}", {"known": ", ".join(METHODS)})
    return METHODS[name].config_class.model_validate(values)


AnyMethodConfig = Annotated[SerializeAsAny[MethodConfig], BeforeValidator(_config)]
"""A recipe's `method` section: validated as that of the method it names."""


def method_class(config: MethodConfig) -> type[Method]:
    """Return the class for a recipe section: its `init` and `factors` are needed before modules exist."""
    return METHODS[config.name]


def build_method(
    config: MethodConfig, modules: Mapping[str, AdaptedModule], total_steps: int, device: torch.device
) -> Method:
    """Return the method for these modules.

    Raises:
        RecipeError: its times leave no adjustment in `total_steps`, or it cannot run on these modules.
    """
    return method_class(config)(config, modules, total_steps, device)
