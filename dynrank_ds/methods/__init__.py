"""One file per paper; the recipe's `method.name` chooses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field

from dynrank_ds.adapters.linear import AdaptedLinear
from dynrank_ds.methods.base import Method
from dynrank_ds.methods.lora import LoRA, LoRAConfig
from dynrank_ds.methods.pe_dyra import PEDyRA, PEDyRAConfig

AnyMethodConfig = Annotated[LoRAConfig | PEDyRAConfig, Field(discriminator="name")]

_CLASSES: dict[str, type[Method]] = {"lora": LoRA, "pe_dyra": PEDyRA}
METHOD_NAMES = tuple(_CLASSES)


def method_class(config: LoRAConfig | PEDyRAConfig) -> type[Method]:
    """The class behind a recipe section: its `init` and `factors` are needed before blocks exist."""
    return _CLASSES[config.name]


def build_method(
    config: LoRAConfig | PEDyRAConfig,
    blocks: Mapping[str, AdaptedLinear],
    total_steps: int,
    device: torch.device,
) -> Method:
    """The method on these blocks.

    Raises:
        RecipeError: its times leave it nothing to do in `total_steps`.
    """
    if isinstance(config, PEDyRAConfig):
        return PEDyRA(config, blocks, total_steps, device)
    return LoRA(blocks, device)
