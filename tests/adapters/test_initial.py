from __future__ import annotations

import math

import torch

from dynrank_ds.adapters.initial import lora_factors, module_generator, svd_factors


def drawn(seed: int, module: str, event: int = 0) -> torch.Tensor:
    return svd_factors(3, 8, 6, module_generator(seed, module, event))["lora_A"]


def test_values_depend_on_seed_module_and_event_alone() -> None:
    first = drawn(1, "layers.0.q_proj")
    torch.manual_seed(99)
    torch.randn(10)
    assert torch.equal(drawn(1, "layers.0.q_proj"), first)
    for other in (drawn(2, "layers.0.q_proj"), drawn(1, "layers.1.q_proj"), drawn(1, "layers.0.q_proj", 5)):
        assert not torch.equal(other, first)


def test_lora_starts_as_a_uniform_a_and_a_zero_b() -> None:
    factors = lora_factors(64, 100, 30, module_generator(0, "x", 0))
    assert {k: tuple(v.shape) for k, v in factors.items()} == {"lora_A": (64, 100), "lora_B": (64, 30)}
    assert not factors["lora_B"].any()
    a = factors["lora_A"]
    assert float(a.abs().max()) <= 0.1  # 1 / sqrt(100)
    assert abs(float(a.std()) - 0.1 / math.sqrt(3)) < 2e-3
    assert abs(float(a.mean())) < 3e-3


def test_the_svd_form_starts_with_normal_a_and_b_and_e_zero() -> None:
    factors = svd_factors(64, 100, 30, module_generator(0, "x", 0))
    assert {k: tuple(v.shape) for k, v in factors.items()} == {
        "lora_A": (64, 100),
        "lora_E": (64,),
        "lora_B": (64, 30),
    }
    assert not factors["lora_E"].any()
    for name in ("lora_A", "lora_B"):
        assert abs(float(factors[name].std()) - 0.02) < 1e-3
        assert abs(float(factors[name].mean())) < 1e-3
