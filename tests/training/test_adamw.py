from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from dynrank_ds.training.adamw import RowAgedAdamW

LR = 1e-2


def steps(optimizer: torch.optim.Optimizer, param: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    """The parameter after each step."""
    course = []
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
        course.append(param.detach().clone())
    return course


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_adamw_where_all_rows_are_of_one_age(weight_decay: float) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(12) * 10 ** float(torch.randint(-4, 2, ())) for _ in range(50)]
    ours, theirs = (torch.linspace(-1, 1, 12).requires_grad_() for _ in range(2))
    settings = {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-7, "weight_decay": weight_decay}
    a = steps(RowAgedAdamW([ours], **settings), ours, gradients)
    b = steps(torch.optim.AdamW([theirs], **settings), theirs, gradients)
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def grown(old: Tensor, optimizer: RowAgedAdamW, new: int, **settings: float) -> tuple[Tensor, RowAgedAdamW]:
    """`old` with `new` elements behind it that are born now, and its optimizer."""
    state = optimizer.state[old]
    param = torch.cat([old.detach(), torch.linspace(-1, 1, new)]).requires_grad_()
    grown_optimizer = RowAgedAdamW([param], lr=LR, **settings)
    births, lengths = torch.tensor([0, state["step"]]), torch.tensor([len(old), new])
    grown_optimizer.set_state(param, state["step"], births, torch.ones(2), lengths)
    for moment in ("exp_avg", "exp_avg_sq"):
        grown_optimizer.state[param][moment][: len(old)] = state[moment]
    return param, grown_optimizer


def test_a_new_row_moves_as_under_a_fresh_adamw_and_an_old_one_as_if_nothing_had_happened() -> None:
    torch.manual_seed(1)
    early, late = [torch.randn(6) for _ in range(40)], [torch.randn(10) for _ in range(40)]
    old = torch.linspace(-1, 1, 6).requires_grad_()
    alone = old.detach().clone().requires_grad_()
    optimizer = RowAgedAdamW([old], lr=LR, weight_decay=0.1)
    steps(optimizer, old, early)
    param, after = grown(old, optimizer, new=4, weight_decay=0.1)
    course = steps(after, param, late)

    never_grown = torch.optim.AdamW([alone], lr=LR, weight_decay=0.1)
    old_course = steps(never_grown, alone, early + [g[:6] for g in late])[40:]
    fresh = torch.linspace(-1, 1, 4).requires_grad_()
    new_course = steps(torch.optim.AdamW([fresh], lr=LR, weight_decay=0.1), fresh, [g[6:] for g in late])
    for got, before, behind in zip(course, old_course, new_course, strict=True):
        torch.testing.assert_close(got[:6], before, rtol=0, atol=1e-6)
        torch.testing.assert_close(got[6:], behind, rtol=0, atol=1e-6)


def test_no_row_outruns_the_learning_rate_under_a_constant_gradient() -> None:
    gradient = torch.tensor([1e-3, -1.0, 30.0, 1e-2])
    old = torch.zeros(2, requires_grad=True)
    optimizer = RowAgedAdamW([old], lr=LR)
    steps(optimizer, old, [gradient[:2]] * 300)
    param, after = grown(old, optimizer, new=2)
    course = [param.detach().clone(), *steps(after, param, [gradient] * 100)]
    # Without ages the new rows would move by 3 learning rates at once and by 6 a little later.
    moves = torch.stack(course).diff(dim=0).abs()
    assert float(moves.max()) <= 1.001 * LR
    assert float(moves.min()) >= 0.99 * LR


def test_rows_of_many_ages_stand_beside_each_other() -> None:
    gradient = torch.full((6,), 0.5)
    births = torch.tensor([0, 90, 90, 7, 0, 99])
    param = torch.zeros(6, requires_grad=True)
    optimizer = RowAgedAdamW([param], lr=LR)
    optimizer.set_state(param, 99, births, torch.ones(6), torch.ones(6))
    param.grad = gradient
    optimizer.step()
    ages = 100 - births.double()
    expected = -LR * (0.1 / (1 - 0.9**ages)) / (0.001 / (1 - 0.999**ages)).sqrt()
    torch.testing.assert_close(param.detach().double(), expected, rtol=1e-5, atol=0)


def test_a_discarded_step_changes_no_bit() -> None:
    param = torch.randn(5, requires_grad=True)
    optimizer = RowAgedAdamW([param], lr=LR, weight_decay=0.1)
    steps(optimizer, param, [torch.randn(5) for _ in range(3)])
    weights, state = param.detach().clone(), copy.deepcopy(optimizer.state[param])
    optimizer.discard = True
    steps(optimizer, param, [torch.full((5,), torch.nan)])
    assert torch.equal(param, weights)
    for name, value in state.items():
        found = optimizer.state[param][name]
        assert torch.equal(found, value) if isinstance(value, Tensor) else found == value


def test_a_parameter_without_gradient_stays() -> None:
    param = torch.ones(3, requires_grad=True)
    optimizer = RowAgedAdamW([param], lr=LR, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(param, torch.ones(3))


def test_rates_by_element_are_learning_rates_by_parameter_group() -> None:
    torch.manual_seed(3)
    gradients = [torch.randn(10) for _ in range(20)]
    ours = torch.linspace(-1, 1, 10).requires_grad_()
    optimizer = RowAgedAdamW([ours], lr=LR, weight_decay=0.1)
    # Equal runs beside each other, and one without elements, are as good as one run.
    rates, lengths = torch.tensor([1.0, 1.0, 7.0, 16.0]), torch.tensor([3, 1, 0, 6])
    optimizer.set_state(ours, 0, torch.zeros(4), rates, lengths)
    slow, fast = (part.clone().requires_grad_() for part in ours.detach().split([4, 6]))
    groups = [{"params": [slow]}, {"params": [fast], "lr": 16 * LR}]
    theirs = torch.optim.AdamW(groups, lr=LR, weight_decay=0.1)
    for gradient, found in zip(gradients, steps(optimizer, ours, gradients), strict=True):
        slow.grad, fast.grad = gradient.split([4, 6])
        theirs.step()
        torch.testing.assert_close(found, torch.cat([slow, fast]).detach(), rtol=0, atol=1e-6)
