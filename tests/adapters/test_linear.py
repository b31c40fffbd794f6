from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynrank_ds.adapters.linear import AdaptedLinear, ModuleBackward

SCALE = 1.7


class CountingWork:
    """Records what backward shows it and asks for a given penalty gradient."""

    def __init__(self, penalty: float | None = None) -> None:
        self.inputs: list[Tensor] = []
        self.penalty = penalty

    def __call__(self, backward: ModuleBackward) -> None:
        self.inputs.append(backward.x.clone())
        if self.penalty is not None:
            backward.grad_a += self.penalty * backward.lora_a
            backward.grad_b += self.penalty * backward.lora_b


def adapted(rank: int, with_e: bool = True, dtype: torch.dtype = torch.float64) -> AdaptedLinear:
    torch.manual_seed(rank)
    module = AdaptedLinear(nn.Linear(5, 7, dtype=dtype).requires_grad_(False), SCALE)
    factors = {"lora_A": torch.randn(rank, 5, dtype=dtype), "lora_B": torch.randn(rank, 7, dtype=dtype)}
    if with_e:
        factors["lora_E"] = torch.randn(rank, dtype=dtype)
    module.set_factors(factors if rank else {})
    return module


def plain(x: Tensor, module: AdaptedLinear, factors: dict[str, Tensor]) -> Tensor:
    """W x + bias + s B^T diag(e) A x, left to autograd."""
    e = factors.get("lora_E", torch.ones(len(factors["lora_A"]), dtype=x.dtype))
    delta = SCALE * factors["lora_B"].T @ torch.diag(e) @ factors["lora_A"]
    return x @ (module.base.weight + delta).T + module.base.bias


@pytest.mark.parametrize("with_e", [True, False])
def test_fp32_triples_beside_a_bf16_base_are_added_in_fp32(with_e: bool) -> None:
    torch.manual_seed(0)
    module = AdaptedLinear(nn.Linear(5, 7, dtype=torch.bfloat16).requires_grad_(False), SCALE, torch.float32)
    factors = {"lora_A": torch.randn(3, 5), "lora_B": torch.randn(3, 7)}
    module.set_factors({**factors, "lora_E": torch.randn(3)} if with_e else factors)
    x = torch.randn(2, 4, 5).bfloat16().requires_grad_()
    other_x = x.detach().clone().requires_grad_()
    copies = {k: v.detach().clone().requires_grad_() for k, v in module.factors().items()}
    e = copies.get("lora_E", torch.ones(3))
    formula = (
        module.base(other_x) + (other_x.float() @ copies["lora_A"].T * (SCALE * e)) @ copies["lora_B"]
    ).bfloat16()
    ours = module(x)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, formula)
    direction = torch.randn_like(ours)
    ours.backward(direction)
    formula.backward(direction)
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(
        x.grad, other_x.grad, rtol=2e-2, atol=2e-2
    )  # two products, each rounded to bf16
    for name, factor in module.factors().items():
        assert factor.grad is not None and factor.grad.dtype == torch.float32
        torch.testing.assert_close(factor.grad, copies[name].grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("with_e", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 5)])
def test_output_and_gradients_are_those_of_the_formula(with_e: bool, shape: tuple[int, ...]) -> None:
    module = adapted(3, with_e)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    copies = {k: v.detach().clone().requires_grad_() for k, v in module.factors().items()}
    other_x = x.detach().clone().requires_grad_()
    ours, formula = module(x), plain(other_x, module, copies)
    torch.testing.assert_close(ours, formula, rtol=1e-12, atol=1e-12)

    direction = torch.randn_like(ours)
    ours.backward(direction)
    formula.backward(direction)
    torch.testing.assert_close(x.grad, other_x.grad, rtol=1e-12, atol=1e-12)
    assert module.factors().keys() == copies.keys()
    for name, factor in module.factors().items():
        torch.testing.assert_close(factor.grad, copies[name].grad, rtol=1e-12, atol=1e-12, msg=name)
    assert module.base.weight.grad is None


@pytest.mark.parametrize("entries", [1, 3])
def test_a_gate_of_the_methods_scales_triples_and_its_gradient_reaches_the_hook(entries: int) -> None:
    module, seen = adapted(3, with_e=False), []
    module.gate = torch.rand(entries, dtype=torch.float64) + 0.5
    module.on_backward = lambda backward: seen.append(backward.grad_gate)
    x = torch.randn(4, 5, dtype=torch.float64)
    gate = module.gate.expand(3).clone().requires_grad_()
    formula = plain(x, module, {**{k: v.detach() for k, v in module.factors().items()}, "lora_E": gate})
    ours = module(x)
    torch.testing.assert_close(ours, formula, rtol=1e-12, atol=1e-12)

    direction = torch.randn_like(ours)
    ours.backward(direction)
    formula.backward(direction)
    assert module.gate.grad is None
    torch.testing.assert_close(seen[0], gate.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)])
def test_the_gradient_of_a_gate_is_summed_in_at_least_single_precision(
    dtype: torch.dtype, wide: torch.dtype
) -> None:
    module, seen = adapted(3, with_e=False, dtype=dtype), []
    module.gate = torch.ones(3)
    module.on_backward = lambda backward: seen.append(backward)
    module(torch.randn(64, 5, dtype=dtype)).backward(torch.randn(64, 7, dtype=dtype))
    through_b, hidden = seen[0].grad_y @ seen[0].lora_b.T, seen[0].x @ seen[0].lora_a.T
    assert seen[0].grad_gate.dtype == wide
    exact = SCALE * (through_b.double() * hidden.double()).sum(0)
    torch.testing.assert_close(seen[0].grad_gate.double(), exact, rtol=1e-5, atol=1e-5)


def test_an_input_without_gradient_gets_none() -> None:
    module = adapted(2)
    x = torch.randn(3, 5, dtype=torch.float64)
    module(x).sum().backward()
    assert x.grad is None
    assert all(factor.grad is not None for factor in module.factors().values())


def test_rank_zero_is_the_base_and_owns_no_parameter() -> None:
    module = adapted(0)
    x = torch.randn(4, 5, dtype=torch.float64)
    assert torch.equal(module(x), module.base(x))
    assert module.factors() == {}
    assert {name for name, _ in module.named_parameters()} == {"base.weight", "base.bias"}


def test_factors_can_be_taken_away_again() -> None:
    module = adapted(3)
    module.set_factors({})
    x = torch.randn(4, 5, dtype=torch.float64)
    assert torch.equal(module(x), module.base(x))
    assert not [p for p in module.parameters() if p.requires_grad]


@pytest.mark.parametrize("with_checkpointing", [False, True])
def test_the_hook_sees_the_input_once_per_backward(with_checkpointing: bool) -> None:
    module = adapted(3)
    module.on_backward = work = CountingWork()
    for times in (1, 2):
        x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
        y = checkpoint(module, x, use_reentrant=False) if with_checkpointing else module(x)
        y.sum().backward()
        assert len(work.inputs) == times
        assert torch.equal(work.inputs[-1], x.flatten(0, -2))


def test_the_hook_sees_nothing_in_evaluation() -> None:
    module = adapted(3)
    module.on_backward = work = CountingWork()
    with torch.no_grad():
        module(torch.randn(2, 5, dtype=torch.float64))
    module(torch.randn(2, 5, dtype=torch.float64))  # no backward follows
    assert work.inputs == []


def test_the_penalty_gradient_is_added_to_a_and_b() -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    without, with_penalty = adapted(3), adapted(3)
    with_penalty.on_backward = CountingWork(penalty=0.5)
    for module in (without, with_penalty):
        module(x).square().sum().backward()
    for name, factor in with_penalty.factors().items():
        extra = 0 * factor if name == "lora_E" else 0.5 * factor
        torch.testing.assert_close(factor.grad, without.factors()[name].grad + extra)


def test_adding_triples_with_e_zero_changes_no_bit_of_the_output() -> None:
    module = adapted(4, dtype=torch.float32)
    x = torch.randn(3, 6, 5)
    before = module(x)
    grown = {
        name: torch.cat([f.detach(), torch.zeros(3) if name == "lora_E" else torch.randn(3, f.shape[1])])
        for name, f in module.factors().items()
    }
    module.set_factors(grown)
    assert module.lora_A is not None and module.lora_A.shape == (7, 5)
    assert torch.equal(module(x), before)
