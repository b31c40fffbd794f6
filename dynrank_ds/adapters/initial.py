"""Initial values of triples, drawn so that they depend on the seed and the module alone.

Neither the world size, the order of modules nor the process matters: every process draws the same rows
and keeps its shard of them.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def module_generator(seed: int, module: str, event: int) -> torch.Generator:
    """Return the CPU generator of one module at one event: 0 at the start, the step number at an adjustment."""
    digest = hashlib.sha256(f"{seed}/{module}/{event}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def lora_factors(
    rank: int, in_features: int, out_features: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return LoRA's factors (Hu et al., 2021) as in loralib: A ~ U(+-1/sqrt(in)), B = 0, no e. fp32."""
    bound = 1 / math.sqrt(in_features)
    a = torch.rand(rank, in_features, generator=generator).mul_(2 * bound).sub_(bound)
    return {"lora_A": a, "lora_B": torch.zeros(rank, out_features)}


def svd_factors(
    rank: int, in_features: int, out_features: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return AdaLoRA's SVD form (Zhang et al., 2023, and its code): A, B ~ N(0, 0.02^2), e = 0. fp32."""
    return {
        "lora_A": torch.randn(rank, in_features, generator=generator).mul_(0.02),
        "lora_E": torch.zeros(rank),
        "lora_B": torch.randn(rank, out_features, generator=generator).mul_(0.02),
    }
