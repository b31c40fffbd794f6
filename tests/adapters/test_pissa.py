"""A linear beside frozen initial triples, against the formula left to autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dynrank_ds.adapters.pissa import PissaLinear

SCALE, RANK = 1.7, 3


def pissa(with_e: bool = True, dtype: torch.dtype = torch.float64) -> PissaLinear:
    """At its start: the trained triples are the initial ones."""
    torch.manual_seed(0)
    module = PissaLinear(nn.Linear(5, 7, dtype=dtype).requires_grad_(False), SCALE)
    factors = {"lora_A": torch.randn(RANK, 5), "lora_B": torch.randn(RANK, 7)}
    if with_e:
        factors["lora_E"] = torch.randn(RANK)
    module.set_factors(factors)
    module.set_initial(factors, range(RANK))
    return module


def product(factors: dict[str, Tensor]) -> Tensor:
    e = factors.get("lora_E", torch.ones(len(factors["lora_A"]), dtype=torch.float64))
    return SCALE * factors["lora_B"].T @ torch.diag(e) @ factors["lora_A"]


def trained(module: PissaLinear) -> dict[str, Tensor]:
    """Copies of the factors after each was changed by training."""
    with torch.no_grad():
        for factor in module.factors().values():
            factor += 0.1 * torch.randn_like(factor)
    return {name: factor.detach().clone() for name, factor in module.factors().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_e", [True, False])
def test_at_the_start_the_output_is_that_of_the_base_bit_for_bit(with_e: bool, dtype: torch.dtype) -> None:
    module = pissa(with_e, dtype)
    x = torch.randn(4, 6, 5, dtype=dtype)
    assert torch.equal(module(x), module.base(x))


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("with_e", [True, False])
def test_output_and_gradients_are_those_of_the_formula(with_e: bool, dropped: bool) -> None:
    module = pissa(with_e)
    initial = {name: factor.detach().clone() for name, factor in module.factors().items()}
    copies = {name: factor.requires_grad_() for name, factor in trained(module).items()}
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    mask = (
        (torch.rand(8, 5, dtype=torch.float64) < 0.7).double() / 0.7 if dropped else torch.ones(8, 5).double()
    )
    if dropped:
        module.dropout = lambda _: mask
    other = x.detach().clone().requires_grad_()
    change = product(copies) - product(initial)
    formula = module.base(other) + (other * mask.view(2, 4, 5)) @ change.T
    ours = module(x)
    torch.testing.assert_close(ours, formula, rtol=1e-12, atol=1e-12)

    direction = torch.randn_like(ours)
    ours.backward(direction)
    formula.backward(direction)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=1e-12)
    for name, factor in module.factors().items():
        torch.testing.assert_close(factor.grad, copies[name].grad, rtol=1e-12, atol=1e-12, msg=name)
    assert module.initial_A.grad is None and module.initial_B.grad is None


def test_a_pruned_triple_takes_its_initial_triple_with_it_and_a_new_one_has_none() -> None:
    module = pissa()
    initial = {name: factor.detach().clone() for name, factor in module.factors().items()}
    factors = trained(module)
    initial_of, rows = module.rows_after([0, 2], new=1)
    assert initial_of == [0, 2, None] and rows == [0, 2]
    added = {"lora_A": torch.ones(1, 5), "lora_E": torch.zeros(1), "lora_B": torch.ones(1, 7)}
    module.set_factors({name: torch.cat([factor[[0, 2]], added[name]]) for name, factor in factors.items()})
    module.set_initial({name: factor[rows] for name, factor in initial.items()}, initial_of)
    x = torch.randn(4, 5, dtype=torch.float64)
    left = [{name: factor[[0, 2]] for name, factor in some.items()} for some in (factors, initial)]
    expected = module.base(x) + x @ (product(left[0]) - product(left[1])).T
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    assert module.rows_after([1, 2], new=0) == ([2, None], [1])
    # Without any initial triple it is a plain adapted linear.
    assert module.rows_after([2], new=0) == ([None], [])
    module.set_initial({}, [None] * 3)
    assert module.initial_A is None and module.initial_B is None and module.initial_E is None


def test_a_masked_triple_gives_its_initial_triple_back_to_the_weight_for_good() -> None:
    module = pissa()
    initial = {name: factor.detach().clone() for name, factor in module.factors().items()}
    factors = trained(module)
    with torch.no_grad():
        module.lora_E[1] = 0
    module.mask_initial([1])
    module.mask_initial([1])
    x = torch.randn(4, 5, dtype=torch.float64)
    left = [{name: factor[[0, 2]] for name, factor in some.items()} for some in (factors, initial)]
    expected = module.base(x) + x @ (product(left[0]) - product(left[1])).T
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    assert module.initial_of == [0, None, 2]
    assert module.rows_after([1, 2], new=0) == ([None, 2], [2])
