"""One file per paper; the recipe's `method.name` chooses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field

from dynrank_ds.adapters.linear import AdaptedModule
from dynrank_ds.methods.adalora import AdaLoRA, AdaLoRAConfig
from dynrank_ds.methods.ard_lora import ARDLoRA, ARDLoRAConfig
from dynrank_ds.methods.base import Method, MethodConfig
from dynrank_ds.methods.dynamic_dora import DynamicDoRA, DynamicDoRAConfig
from dynrank_ds.methods.elalora import ElaLoRA, ElaLoRAConfig
from dynrank_ds.methods.increlora import IncreLoRA, IncreLoRAConfig
from dynrank_ds.methods.lora import LoRA, LoRAConfig
from dynrank_ds.methods.pe_dyra import PEDyRA, PEDyRAConfig
from dynrank_ds.methods.weightlora import (
    WeightLoRA,
    WeightLoRAConfig,
    WeightLoRAPlus,
    WeightLoRAPlusConfig,
)

AnyMethodConfig = Annotated[
    LoRAConfig
    | PEDyRAConfig
    | AdaLoRAConfig
    | ElaLoRAConfig
    | IncreLoRAConfig
    | DynamicDoRAConfig
    | WeightLoRAConfig
    | WeightLoRAPlusConfig
    | ARDLoRAConfig,
    Field(discriminator="name"),
]

_CLASSES: dict[type[MethodConfig], type[Method]] = {
    LoRAConfig: LoRA,
    PEDyRAConfig: PEDyRA,
    AdaLoRAConfig: AdaLoRA,
    ElaLoRAConfig: ElaLoRA,
    IncreLoRAConfig: IncreLoRA,
    DynamicDoRAConfig: DynamicDoRA,
    WeightLoRAConfig: WeightLoRA,
    WeightLoRAPlusConfig: WeightLoRAPlus,
    ARDLoRAConfig: ARDLoRA,
}
METHOD_NAMES = tuple(config.model_fields["name"].default for config in _CLASSES)


def method_class(config: MethodConfig) -> type[Method]:
    """The class behind a recipe section: its `init` and `factors` are needed before modules exist."""
    return _CLASSES[type(config)]


def build_method(
    config: MethodConfig, modules: Mapping[str, AdaptedModule], total_steps: int, device: torch.device
) -> Method:
    """The method on these modules.

    Raises:
        RecipeError: its times leave it nothing to do in `total_steps`.
    """
    return method_class(config)(config, modules, total_steps, device)
