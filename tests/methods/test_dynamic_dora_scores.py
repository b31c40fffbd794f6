"""Dynamic DoRA's scores and penalty against eq. 7, 8 and 10 on dense matrices, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dynrank_ds.adapters.initial import module_generator
from dynrank_ds.adapters.linear import AdaptedLinear
from dynrank_ds.methods.base import MicroBatch
from dynrank_ds.methods.dynamic_dora import (
    DynamicDoRA,
    DynamicDoRAConfig,
    component_factors,
    relative_norms,
)
from dynrank_ds.ranking.layout import ShardLayout
from dynrank_ds.ranking.plan import RankState
from dynrank_ds.zero.shards import zero3_rules
from tests.methods.small import CPU, SIDES, step_view

RANK = 3
FACTORS = ("lora_A", "lora_E", "lora_B")


def live(dtype: torch.dtype = torch.float64) -> dict[str, AdaptedLinear]:
    made = {name: AdaptedLinear(nn.Linear(*sides, dtype=dtype), 1.0) for name, sides in SIDES.items()}
    for name, module in made.items():
        module.initial_rank = RANK
        module.set_factors(component_factors(RANK, *SIDES[name], module_generator(0, name, 0)))
    return made


def started(modules: dict[str, AdaptedLinear], size: int = 1, rank: int = 0, **config) -> DynamicDoRA:
    method = DynamicDoRA(DynamicDoRAConfig(interval=3, **config), modules, 20, CPU)
    rules = zero3_rules((), (), (), size)
    method.start(ShardLayout(method.shapes, (RANK,) * 3, FACTORS, rules[rank]))
    return method


def backward(
    method: DynamicDoRA, modules: dict[str, AdaptedLinear], step: int, micro_batches: int = 1
) -> None:
    """A step of micro-batches whose task has no gradient."""
    for number in range(micro_batches):
        method.begin_micro_batch(MicroBatch(step=step, last=number == 0))
        for module in modules.values():
            (0 * module(torch.randn(2, module.in_features, dtype=module.dtype))).sum().backward()


def dense(module: AdaptedLinear) -> Tensor:
    """Eq. 7 from (r, out, in) matrices."""
    a, c, b = (f.detach().double() for f in (module.lora_A, module.lora_E, module.lora_B))
    components = c[:, None, None] * b[:, :, None] * a[:, None, :]
    return components.flatten(1).norm(dim=1) / (components.sum(0).norm() + 1e-8)


def shake(modules: dict[str, AdaptedLinear], scale: float = 1.0) -> None:
    """The factors of the next step, the same for a seed."""
    with torch.no_grad():
        for module in modules.values():
            for factor in module.factors().values():
                factor.add_(torch.randn(factor.shape, dtype=factor.dtype) * scale)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_norms_from_gram_matrices_are_those_of_dense_components(scale: float) -> None:
    torch.manual_seed(0)
    modules = live()
    shake(modules, scale)
    for module in modules.values():
        got = relative_norms(module.lora_A.detach(), module.lora_E.detach(), module.lora_B.detach())
        torch.testing.assert_close(got, dense(module), rtol=1e-10, atol=0)


def test_norms_of_components_that_cancel_stay_finite() -> None:
    a, b = torch.randn(1, 6).repeat(2, 1), torch.randn(1, 4).repeat(2, 1)
    got = relative_norms(a, torch.tensor([1.0, -1.0]), b)
    assert torch.isfinite(got).all()
    assert relative_norms(a, torch.zeros(2), b).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("size", [1, 3])
def test_every_process_smooths_the_same_scores_without_any_communication(size: int) -> None:
    def refused(tensor: Tensor) -> Tensor:
        raise AssertionError("a sum over processes")

    smoothed = []
    for rank in range(size):
        torch.manual_seed(7)
        modules = live()
        method = started(modules, size, rank)
        expected = torch.zeros(9, dtype=torch.float64)
        for step in range(1, 11):
            shake(modules, 0.1)
            seen = torch.cat([dense(module) for module in modules.values()])
            with torch.random.fork_rng():
                torch.manual_seed(100 * rank + step)  # other data on every process
                backward(method, modules, step, micro_batches=2)
            layout = ShardLayout(method.shapes, (RANK,) * 3, FACTORS, zero3_rules((), (), (), size)[rank])
            view = step_view(torch.empty(0), torch.empty(0), layout, refused, step=step)
            method.observe(view)
            expected = 0.9 * expected + 0.1 * seen
            torch.testing.assert_close(torch.cat(list(method.scores(view))), expected, rtol=1e-10, atol=0)
        smoothed.append(method.smoothed)
    assert all(torch.equal(other, smoothed[0]) for other in smoothed)


def test_scores_follow_their_triples_through_the_last_mask_and_then_stand_still() -> None:
    torch.manual_seed(1)
    modules = live()
    method = started(modules, target_rank=2)
    for step in range(1, 11):
        shake(modules)
        backward(method, modules, step)
        layout = ShardLayout(method.shapes, (RANK,) * 3, FACTORS, zero3_rules((), (), (), 1)[0])
        method.observe(step_view(torch.empty(0), torch.empty(0), layout, step=step))
        if method.adjusts_at(step):
            scores = method.scores(step_view(torch.empty(0), torch.empty(0), layout, step=step))
            state = RankState((RANK,) * 3, (9,) * 3, RANK, step, 20)
            plan = method.plan(scores, state)
            method.applied(plan, step)
    expected = torch.cat([s[list(kept)] for s, kept in zip(scores, plan.keep, strict=True)])
    assert len(expected) == 6
    assert torch.equal(method.smoothed, expected)
    for module, kept in zip(modules.values(), plan.keep, strict=True):
        rows = list(kept)
        module.set_factors({name: f.detach()[rows] for name, f in module.factors().items()} if rows else {})
    backward(method, modules, 11)
    method.observe(step_view(torch.empty(0), torch.empty(0), layout, step=11))
    assert torch.equal(method.replicated_state["scores"], expected)


def test_a_discarded_step_leaves_no_trace() -> None:
    torch.manual_seed(2)
    modules = live()
    method = started(modules)
    layout = ShardLayout(method.shapes, (RANK,) * 3, FACTORS, zero3_rules((), (), (), 1)[0])
    with torch.no_grad():
        modules["a"].lora_A.fill_(float("nan"))
    backward(method, modules, 1)
    method.discard_step()
    assert not method.smoothed.any()
    with torch.no_grad():
        modules["a"].lora_A.normal_()
    shake(modules)
    backward(method, modules, 1)
    method.observe(step_view(torch.empty(0), torch.empty(0), layout))
    torch.testing.assert_close(
        method.smoothed, 0.1 * torch.cat([dense(b) for b in modules.values()]), rtol=1e-10, atol=0
    )


def test_16_bit_factors_are_scored_in_double_precision() -> None:
    torch.manual_seed(3)
    module = AdaptedLinear(nn.Linear(7, 5, dtype=torch.bfloat16), 1.0)
    module.set_factors({"lora_A": torch.randn(3, 7), "lora_E": torch.randn(3), "lora_B": torch.randn(3, 5)})
    got = relative_norms(module.lora_A.detach(), module.lora_E.detach(), module.lora_B.detach())
    torch.testing.assert_close(got, dense(module), rtol=1e-10, atol=0)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_penalty_has_the_gradient_of_the_mean_variance_over_all_factor_rows(micro_batches: int) -> None:
    torch.manual_seed(4)
    modules = live(torch.float32)
    method = started(modules, variance=0.3)
    backward(method, modules, step=10, micro_batches=micro_batches)
    copies = [
        f.detach().double().requires_grad_()
        for module in modules.values()
        for f in (module.lora_A, module.lora_B)
    ]
    variances = torch.cat([torch.var(f, dim=1) for f in copies])
    assert len(variances) == 2 * 3 * RANK
    (0.3 * variances.mean()).backward()
    ours = [f.grad for module in modules.values() for f in (module.lora_A, module.lora_B)]
    for gradient, copy in zip(ours, copies, strict=True):
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(gradient.double(), copy.grad, rtol=1e-5, atol=1e-8)
    assert not any(module.lora_E.grad.any() for module in modules.values())


def test_the_penalty_ends_with_the_last_mask() -> None:
    modules = live()
    method = started(modules, variance=0.3)
    backward(method, modules, step=11)
    assert not any(f.grad.any() for module in modules.values() for f in module.factors().values())
