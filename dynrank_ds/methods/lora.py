"""LoRA: fixed ranks, the baseline that every dynamic method is compared with.

LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), https://arxiv.org/abs/2106.09685.
`adapter.scaling: root_rank` is rsLoRA's: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA (Kalajdzievski,
2023), https://arxiv.org/abs/2312.03732; `train.lora_b_rate` is LoRA+'s: LoRA+: Efficient Low Rank Adaptation of Large
Models (Hayou et al., 2024), https://arxiv.org/abs/2402.12354.
"""

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
