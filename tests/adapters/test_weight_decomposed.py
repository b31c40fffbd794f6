"""The weight-decomposed layer computes DoRA's formula, and its gradients are those of PEFT's DoRA."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dynrank_ds.adapters.dense import dense_weight
from dynrank_ds.adapters.initial import svd_factors
from dynrank_ds.adapters.linear import ModuleBackward
from dynrank_ds.adapters.weight_decomposed import WeightDecomposedLinear
from tests.support.named import inject_named

SCALE = 1.7


def adapted(
    rank: int, with_e: bool = True, dtype: torch.dtype = torch.float64, bias: bool = True
) -> WeightDecomposedLinear:
    """A module whose magnitudes and factors are all trained."""
    torch.manual_seed(rank)
    module = WeightDecomposedLinear(nn.Linear(5, 7, bias=bias, dtype=dtype).requires_grad_(False), SCALE)
    factors = {"lora_A": torch.randn(rank, 5), "lora_B": torch.randn(rank, 7)}
    if with_e:
        factors["lora_E"] = torch.randn(rank)
    module.set_factors(factors if rank else {})
    module.set_vectors({"magnitude_offset": torch.randn(7)})
    return module


def plain(x: Tensor, module: WeightDecomposedLinear, trained: dict[str, Tensor]) -> Tensor:
    """Equations 5 and 11 of the paper on whole weights, left to autograd, the norm detached (section 4.3)."""
    weight = module.base.weight
    if "lora_A" in trained:
        e = trained.get("lora_E", torch.ones(len(trained["lora_A"]), dtype=x.dtype))
        weight = weight + SCALE * trained["lora_B"].T @ torch.diag(e) @ trained["lora_A"]
    magnitude = module.base.weight.norm(dim=1) + trained["magnitude_offset"]
    return nn.functional.linear(
        x, magnitude[:, None] * weight / weight.norm(dim=1).detach()[:, None], module.base.bias
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rank", "with_e"), [(3, True), (3, False), (0, False)])
def test_output_and_gradients_are_those_of_the_formula_with_a_detached_norm(
    rank: int, with_e: bool, bias: bool
) -> None:
    module = adapted(rank, with_e, bias=bias)
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    trained = dict(module.factors() | module.vectors())
    copies = {k: v.detach().clone().requires_grad_() for k, v in trained.items()}
    other_x = x.detach().clone().requires_grad_()
    seen: list[ModuleBackward] = []
    module.on_backward = seen.append
    ours, formula = module(x), plain(other_x, module, copies)
    torch.testing.assert_close(ours, formula, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(ours)
    ours.backward(direction)
    formula.backward(direction)
    torch.testing.assert_close(x.grad, other_x.grad, rtol=1e-12, atol=1e-12)
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, copies[name].grad, rtol=1e-12, atol=1e-12, msg=name)
    for backward in seen:  # what methods see of the factors is what the optimizer gets
        assert torch.equal(backward.grad_a, module.lora_A.grad)
        assert torch.equal(backward.grad_b, module.lora_B.grad)
    assert len(seen) == bool(rank)


def test_gradients_are_those_of_pefts_dora_after_training_moved_everything() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"proj": nn.Linear(24, 40)})
    ours = inject_named(
        nn.ModuleDict({"proj": nn.Linear(24, 40)}), ["proj"], 4, 2.0, _lora, 0, variant=VARIANT
    )
    module = ours["proj"]
    module.base.load_state_dict(net["proj"].state_dict())
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["proj"], use_dora=True)
    peft = inject_adapter_in_model(config, net)["proj"]
    peft.lora_A["default"].weight.data.copy_(module.lora_A)
    module.lora_B.data.normal_(std=0.3)
    peft.lora_B["default"].weight.data.copy_(module.lora_B.T)
    module.magnitude_offset.data.normal_(std=0.2)
    magnitude = peft.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude.data, module.base_norms())  # PEFT's initial magnitudes
    magnitude.data += module.magnitude_offset.data
    x = torch.randn(50, 24)
    for layer in (module, peft):
        (layer(x).square().sum() / 100).backward()
    pairs = {
        "A": (module.lora_A.grad, peft.lora_A["default"].weight.grad),
        "B": (module.lora_B.grad.T, peft.lora_B["default"].weight.grad),
        "m": (module.magnitude_offset.grad, magnitude.grad),
    }
    for name, (found, expected) in pairs.items():
        difference = float((found - expected).abs().max())
        print(f"gradient of {name}: largest {float(expected.abs().max()):.3g}, difference {difference:.2e}")
        assert difference < 1e-5 and expected.abs().max() > 0.05, name


VARIANT = "weight_decomposed"


def _lora(rank: int, in_features: int, out_features: int, generator: torch.Generator) -> dict[str, Tensor]:
    a = torch.randn(rank, in_features, generator=generator)
    return {"lora_A": a, "lora_B": torch.zeros(rank, out_features)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_training_the_output_is_the_bases_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"proj": nn.Linear(24, 40)}).to(dtype)
    x = torch.randn(9, 24).to(dtype)
    expected = net["proj"](x)
    inject_named(net, ["proj"], 4, 2.0, svd_factors, 0, variant=VARIANT)
    assert torch.equal(net["proj"](x), expected)


def test_in_bf16_a_magnitude_moves_by_less_than_the_rounding_of_its_row() -> None:
    """bf16 has nothing between 1 and 1.0078: a row scaled to 1.003 would not move, or by twice as much."""
    module = adapted(0, dtype=torch.bfloat16, bias=False)
    x = torch.randn(4096, 5).bfloat16()
    outputs = []
    for share in (0, 0.003):
        module.set_vectors({"magnitude_offset": share * module.base_norms()})
        outputs.append(module(x).float().abs().sum(0))
    moved = outputs[1] / outputs[0] - 1
    torch.testing.assert_close(moved, torch.full((7,), 0.003), rtol=0.2, atol=0)


def test_factors_may_be_wider_than_the_base() -> None:
    torch.manual_seed(0)
    base = nn.Linear(24, 40, dtype=torch.bfloat16).requires_grad_(False)
    module, exact = (
        WeightDecomposedLinear(linear, SCALE, torch.float32) for linear in (base, nn.Linear(24, 40))
    )
    exact.base.load_state_dict(base.state_dict())
    factors = {"lora_A": 0.1 * torch.randn(3, 24), "lora_B": 0.1 * torch.randn(3, 40)}
    x = torch.randn(9, 24).bfloat16()
    for each in (module, exact):
        each.set_factors(factors)
        each.set_vectors({"magnitude_offset": torch.linspace(-0.2, 0.2, 40)})
    out = module(x)
    assert out.dtype == torch.bfloat16 and module.magnitude_offset.dtype == torch.float32
    torch.testing.assert_close(out.float(), exact(x.float()), rtol=0.02, atol=0.02)
    out.sum().backward()
    assert all(p.grad is not None for p in [*module.factors().values(), *module.vectors().values()])


@pytest.mark.parametrize("new", [{"lora_E": torch.zeros(1)}, {"lora_B": torch.zeros(1, 7)}])
def test_a_new_triple_without_effect_changes_no_bit_and_a_pruned_one_takes_its_share_alone(
    new: dict[str, Tensor],
) -> None:
    module = adapted(3)
    x = torch.randn(6, 5, dtype=torch.float64)
    before, offset = module(x), module.magnitude_offset
    rows = {"lora_A": torch.randn(1, 5), "lora_E": torch.randn(1), "lora_B": torch.randn(1, 7)} | new
    kept = {name: value.detach().clone() for name, value in module.factors().items()}
    module.set_factors({name: torch.cat([value, rows[name]]) for name, value in kept.items()})
    torch.testing.assert_close(module(x), before, rtol=0, atol=1e-14)
    fewer = {name: value[[0, 2]] for name, value in kept.items()}
    module.set_factors(fewer)
    assert module.magnitude_offset is offset  # the same parameter, with its moments
    torch.testing.assert_close(module(x), plain(x, module, {**fewer, **module.vectors()}))


def test_a_row_of_zeros_stays_one() -> None:
    module = adapted(2, dtype=torch.float32)
    with torch.no_grad():
        module.base.weight[3] = 0
        module.lora_B[:, 3] = 0
    out = module(torch.randn(4, 5))
    out.sum().backward()
    assert torch.equal(out[:, 3], module.base.bias[3].expand(4))
    assert all(p.grad.isfinite().all() for p in [*module.factors().values(), *module.vectors().values()])


@pytest.mark.parametrize("magnitude", [None, torch.rand(7) + 0.5])
def test_a_module_begins_at_given_magnitudes_or_with_the_function_that_its_triples_have(
    magnitude: Tensor | None,
) -> None:
    module = adapted(3, dtype=torch.float32)
    module.begin_at(magnitude)
    x = torch.randn(6, 5)
    weight = module.base.weight + SCALE * module.lora_B.T @ torch.diag(module.lora_E) @ module.lora_A
    if magnitude is not None:
        weight = magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
    expected = nn.functional.linear(x, weight, module.base.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


def test_a_4_bit_layer_is_decomposed_as_its_dequantised_weight_is() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(64, 32)
    base = Linear4bit(64, 32, quant_type="nf4", quant_storage=torch.float32)
    base.load_state_dict(dense.state_dict())
    base = base.to("cpu").requires_grad_(False)
    module, other = (
        WeightDecomposedLinear(linear, SCALE) for linear in (base, nn.Linear(64, 32).requires_grad_(False))
    )
    other.base.load_state_dict({"weight": dense_weight(base).clone(), "bias": dense.bias})
    assert (other.base.weight - dense.weight).abs().max() > 1e-3
    factors = {"lora_A": torch.randn(2, 64), "lora_B": torch.randn(2, 32)}
    x = torch.randn(5, 64)
    for each in (module, other):
        each.set_factors(factors)
        each.set_vectors({"magnitude_offset": torch.linspace(-0.2, 0.2, 32)})
    torch.testing.assert_close(module(x), other(x), rtol=1e-5, atol=1e-5)
