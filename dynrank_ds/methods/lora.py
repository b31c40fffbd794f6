"""LoRA (Hu et al., 2021): fixed rank, the baseline that every dynamic method is compared with."""

from __future__ import annotations

from typing import Literal

from dynrank_ds.adapters.initial import lora_factors
from dynrank_ds.methods.base import Method, MethodConfig


class LoRAConfig(MethodConfig):
    """Recipe section `method: {name: lora}`."""

    name: Literal["lora"] = "lora"


class LoRA(Method):
    """y = W x + s B^T A x, without e."""

    config_class = LoRAConfig
    init = staticmethod(lora_factors)
    factors = ("lora_A", "lora_B")
