"""Which of transformers' attention kernels a run computes with."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from dynrank_ds.errors import MachineError, ModelError
from dynrank_ds.recipe import Recipe
from dynrank_ds.recipe_sections import ModelSection
from dynrank_ds.training.architecture import auto_class

logger = logging.getLogger(__name__)

_FLASH = {"flash_attention_3": "flash_attn_interface", "flash_attention_2": "flash_attn"}
"""Kernel -> the module that its package installs, the faster kernel first."""
_LEAST_CAPABILITY = {"flash_attention_3": (9, 0), "flash_attention_2": (8, 0)}
"""CUDA compute capability that each needs: Hopper, Ampere."""


def check_attention(config: PreTrainedConfig, attention: str) -> None:
    """Refuse a `model.attention` that the model does not have, or whose package is not installed here.

    Where sdpa is not what the model was trained with, a warning says so.

    Raises:
        ModelError, MachineError: naming what to give.
    """
    if attention == "sdpa" and not _class_of(config)._supports_sdpa:
        raise ModelError(
            f"model.attention is sdpa, which transformers does not have for {config.model_type} models: give eager"
        )
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if attention == "sdpa" and cap:
        logger.warning(
            "%s caps its attention scores (attn_logit_softcapping %g), which sdpa leaves out: give model.attention "
            "auto or eager",
            config.model_type,
            cap,
        )
    if attention in _FLASH and not _class_of(config)._supports_flash_attn:
        raise ModelError(
            f"model.attention is {attention}, which transformers does not have for {config.model_type} models: "
            "give auto"
        )
    if attention in _FLASH and find_spec(_FLASH[attention]) is None:
        raise MachineError(
            f"model.attention is {attention}, but there is no module {_FLASH[attention]}: install the package, or give "
            "auto"
        )


def choose_attention(
    section: ModelSection, config: PreTrainedConfig, device: torch.device
) -> tuple[str, str]:
    """Return the kernel and why: what was asked for, or the fastest that device, packages and model have.

    Args:
        section: with dtype bf16 or fp32.
        config: of the model.
        device: that it is computed on.
    """
    if section.attention != "auto":
        return section.attention, "as asked for"
    model_class, lacking = _class_of(config), _lacking_for_flash(section.dtype, config, device)
    if lacking is None:
        for kernel, available in (
            ("flash_attention_3", is_flash_attn_3_available),
            ("flash_attention_2", is_flash_attn_2_available),
        ):
            if available() and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY[kernel]:
                return kernel, "installed"
        lacking = "no FlashAttention for this GPU is installed"
    if not model_class._supports_sdpa:
        return "eager", f"transformers has no other for {config.model_type} models"
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        return "eager", f"{lacking}, and sdpa has no soft cap of scores"
    return "sdpa", lacking


def with_attention(recipe: Recipe, device: torch.device) -> Recipe:
    """Return the recipe with the kernel that `choose_attention` says, for programs that load the model themselves."""
    config = AutoConfig.from_pretrained(recipe.model.path, trust_remote_code=False)
    kernel, _ = choose_attention(recipe.model, config, device)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"attention": kernel})})


def _lacking_for_flash(dtype: str, config: PreTrainedConfig, device: torch.device) -> str | None:
    """Return why FlashAttention is out of the question, installed or not."""
    if device.type != "cuda":
        return "FlashAttention needs a GPU"
    if dtype != "bf16":
        return "FlashAttention needs bf16"
    if not _class_of(config)._supports_flash_attn:
        return f"{config.model_type} models have no FlashAttention"
    return None


def _class_of(config: PreTrainedConfig) -> Any:
    return auto_class(config)._model_mapping[type(config)]
