"""WeightLoRA's weights and both policies, by hand and for any weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynrank_ds.adapters.initial import module_generator
from dynrank_ds.adapters.linear import AdaptedLinear
from dynrank_ds.errors import RecipeError
from dynrank_ds.methods.base import MicroBatch
from dynrank_ds.methods.weightlora import (
    WeightLoRA,
    WeightLoRAConfig,
    WeightLoRAPlus,
    WeightLoRAPlusConfig,
    project,
)
from dynrank_ds.ranking.layout import ShardLayout, whole
from dynrank_ds.ranking.plan import RankPlan, RankState
from tests.methods.regression import SCALE, Regression, live
from tests.methods.small import CPU, SIDES, make_modules, step_view
from tests.ranking.thread_processes import ThreadProcess, run_in_threads

RANK = 2


def weightlora(made: dict[str, AdaptedLinear] | None = None, **config: Any) -> WeightLoRA:
    values = {"k": 2, "disconnect_at": 5, **config}
    return WeightLoRA(WeightLoRAConfig(**values), made or make_modules(), 20, CPU)


def weightlora_plus(sides: dict[str, tuple[int, int]] = SIDES, **config: Any) -> WeightLoRAPlus:
    values = {"k": 2, "disconnect_at": 5, **config}
    return WeightLoRAPlus(WeightLoRAPlusConfig(**values), make_modules(sides), 20, CPU)


def plan(method: WeightLoRA, weights: list[float], rank: int = RANK, limit: int = 99) -> RankPlan:
    n = len(weights)
    state = RankState((rank,) * n, (limit,) * n, rank, 5, 20)
    return method.plan([torch.full((rank,), w, dtype=torch.float64) for w in weights], state)


@pytest.mark.parametrize(
    ("weights", "k", "expected"),
    [
        ([1.2, 0.9, 1.1], 2, [1.2, 0, 1.1]),
        ([-3.0, 0.9, 0.1], 2, [0, 0.9, 0.1]),  # signed: -3 is not large
        ([-1.0, 0.5, -2.0], 2, [0, 0.5, 0]),  # fewer than k are positive
        ([1.0, 1.0, 1.0], 2, [1, 1, 0]),  # ties go to the lower index
        ([0.3, 0.7], 5, [0.3, 0.7]),
    ],
)
def test_the_projection_keeps_the_k_largest_positive_weights(
    weights: list[float], k: int, expected: list[float]
) -> None:
    projected = project(torch.tensor(weights), k)
    assert torch.equal(projected, torch.tensor(expected))
    assert torch.equal(project(projected, k), projected)


STEPS, T = 6, 5
RATES = [0.2, 0.6, 1.0, 0.8, 0.5, 0.3]


def stoiht(task: Regression, k: int) -> list[Tensor]:
    """w after every step, by autograd through dense matrices: w <- H_k(max(w - lr grad, 0)) until T."""
    w, seen = torch.ones(3, dtype=torch.float64), []
    for step in range(1, STEPS + 1):
        if step <= T:
            leaf = w.clone().requires_grad_()
            for index, (name, module) in enumerate(live(RANK, torch.float64).items()):
                delta = SCALE * module.lora_B.detach().T @ module.lora_A.detach()
                task.whole_loss(step, name, module.base.weight + leaf[index] * delta).backward()
            w = (w - 0.15 * RATES[step - 1] * leaf.grad).clamp_min(0)
            dropped = sorted(range(3), key=lambda i: (-float(w[i]), i))[k:]
            w[dropped] = 0
        seen.append(w)
    return seen


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("k", [1, 2])
def test_weights_follow_projected_sgd_on_the_gradient_of_the_whole_batch(size: int, k: int) -> None:
    task = Regression(STEPS, size)

    def work(process: ThreadProcess) -> list[Tensor]:
        made, seen = live(RANK, torch.float64), []
        method = weightlora(made, weight_lr=0.15, k=k)
        layout = ShardLayout(method.shapes, (RANK,) * 3, method.factors, whole)
        method.start(layout)
        for step in range(1, STEPS + 1):
            method.begin_micro_batch(MicroBatch(step=step))
            task.backward(step, process.rank, made)
            nothing = torch.empty(0)
            method.observe(
                step_view(nothing, nothing, layout, process.all_reduce_sum, step, rate_factor=RATES[step - 1])
            )
            assert process.sums == min(step, T)  # one a step until T
            assert torch.equal(torch.cat([module.gate for module in made.values()]), method.w)
            seen.append(method.w.clone())
        return seen

    expected = stoiht(task, k)
    assert any(not torch.equal(w > 0, expected[0] > 0) for w in expected), "no adapter ever came back"
    for got in run_in_threads(size, work):
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_nothing_is_projected_while_w_has_no_gradient() -> None:
    made = live(RANK)
    method = weightlora(made)
    layout = ShardLayout(method.shapes, (RANK,) * 3, method.factors, whole)
    for module in made.values():  # B = 0, as at the first step
        module.set_factors({"lora_A": module.lora_A.detach(), "lora_B": torch.zeros_like(module.lora_B)})
        module(torch.randn(2, module.in_features)).square().sum().backward()
    method.observe(step_view(torch.empty(0), torch.empty(0), layout))
    assert torch.equal(method.w, torch.ones(3))


def test_a_discarded_step_leaves_no_trace() -> None:
    made = live(RANK)
    method = weightlora(made, weight_lr=0.01)
    layout = ShardLayout(method.shapes, (RANK,) * 3, method.factors, whole)
    view = step_view(torch.empty(0), torch.empty(0), layout)
    made["a"](torch.full((1, 7), float("nan"))).sum().backward()
    method.discard_step()
    method.observe(view)
    assert torch.equal(method.w, torch.ones(3))


def test_saved_weights_come_back_into_the_modules() -> None:
    made = live(RANK)
    method = weightlora(made)
    method.replicated_state["w"].copy_(torch.tensor([0.5, 0.0, 2.0]))
    method.restored()
    assert [float(module.gate) for module in made.values()] == [0.5, 0.0, 2.0]
    assert torch.equal(torch.cat(method.gates()), torch.tensor([0.5, 0.0, 2.0]))


def test_the_only_adjustment_is_at_t() -> None:
    method = weightlora(disconnect_at=0.25)
    assert [step for step in range(1, 21) if method.adjusts_at(step)] == [5]
    assert method.planned_adjustments() == 1


def test_at_t_all_but_the_k_largest_lose_every_triple() -> None:
    assert plan(weightlora(), [0.4, 0.0, 1.3]) == RankPlan(((0, 1), (), (0, 1)), (0, 0, 0))
    assert plan(weightlora(), [0.0, 0.0, 1.3]).ranks == (0, 0, 2)  # a weight of 0 is none of the k
    assert plan(weightlora(), [1.0, 1.0, 1.0]).ranks == (
        2,
        2,
        0,
    )  # never projected: ties go to the lower index
    with pytest.raises(
        RecipeError, match=r"no adapter has a weight above 0 at step 5.*lower method.weight_lr"
    ):
        plan(weightlora(), [0.0, 0.0, 0.0])


def test_random_selection_trains_no_weight_and_keeps_k_modules_of_its_seed() -> None:
    sides = {f"m{i}": (4, 4) for i in range(12)}
    kept = set()
    for seed in range(20):
        made = make_modules(sides)
        config = WeightLoRAConfig(k=3, disconnect_at=1, selection="random", seed=seed)
        method = WeightLoRA(config, made, 20, CPU)
        layout = ShardLayout(method.shapes, (RANK,) * 12, method.factors, whole)
        view = step_view(torch.empty(0), torch.empty(0), layout)
        method.observe(view)
        scores = method.scores(view)
        assert all(torch.equal(a, b) for a, b in zip(scores, method.scores(view), strict=True))
        ranks = method.plan(scores, RankState((RANK,) * 12, (4,) * 12, RANK, 1, 20)).ranks
        assert sorted(ranks) == [0] * 9 + [RANK] * 3
        assert all(module.gate is None for module in made.values())
        assert method.gates() == [None] * 12 and method.replicated_state == {}
        kept.add(ranks)
    assert len(kept) > 15


def test_survivors_take_the_rank_that_the_memory_of_all_adapters_pays_for() -> None:
    # r (in + out) of all: 2 (12 + 13 + 12) = 74; a and c survive: floor(74 / 24) = 3.
    assert plan(weightlora_plus(), [0.4, 0.0, 1.3]) == RankPlan(((), (), ()), (3, 0, 3))
    assert plan(weightlora_plus(k=1), [0.4, 0.0, 1.3]).new == (0, 0, 6)  # floor(74 / 12)
    plain = plan(weightlora_plus(extension="plain"), [0.4, 0.0, 1.3])
    assert plain == RankPlan(((0, 1), (), (0, 1)), (1, 0, 1))


def test_a_module_at_its_maximum_leaves_its_share_to_the_others() -> None:
    sides = {"a": (4, 4), "b": (90, 10), "c": (60, 40), "d": (50, 50)}
    method = weightlora_plus(sides)
    state = RankState((2,) * 4, (4, 10, 40, 50), 2, 5, 20)
    scores = [torch.full((2,), w, dtype=torch.float64) for w in (1.0, 1.0, 0.0, 0.0)]
    # The budget is 2 x 308 = 616; a stops at 4 x 8 = 32, b takes floor(584 / 100) = 5.
    assert method.plan(scores, state).ranks == (4, 5, 0, 0)


def test_survivors_that_cannot_grow_keep_their_rows() -> None:
    got = plan(weightlora_plus(), [0.4, 0.0, 1.3], limit=2)
    assert got == RankPlan(((0, 1), (), (0, 1)), (0, 0, 0))


weight = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 10))


@settings(max_examples=150, deadline=None)
@given(
    modules=st.lists(st.tuples(weight, st.integers(4, 40), st.integers(4, 40)), min_size=2, max_size=9),
    k=st.integers(1, 8),
    rank=st.integers(1, 4),
    extension=st.sampled_from(["qr", "plain"]),
)
def test_no_plan_takes_more_memory_and_none_could_take_a_rank_more(
    modules: list[tuple[float, int, int]], k: int, rank: int, extension: str
) -> None:
    sides = {f"m{i}": (n_in, n_out) for i, (_, n_in, n_out) in enumerate(modules)}
    k = min(k, len(modules) - 1)
    weights = [max(w, 1e-3 * (i == 0)) for i, (w, _, _) in enumerate(modules)]
    method = weightlora_plus(sides, k=k, extension=extension)
    limits = tuple(min(pair) for pair in sides.values())
    state = RankState((rank,) * len(sides), limits, rank, 5, 20)
    got = method.plan([torch.full((rank,), w, dtype=torch.float64) for w in weights], state)
    costs = [sum(pair) for pair in sides.values()]

    def parameters(ranks: Sequence[int]) -> int:
        return sum(r * c for r, c in zip(ranks, costs, strict=True))

    survivors = [b for b, r in enumerate(got.ranks) if r]
    assert len(survivors) == min(k, sum(w > 0 for w in weights))
    assert min(weights[b] for b in survivors) >= max(
        (w for b, w in enumerate(weights) if b not in survivors), default=0
    )
    assert all(rank <= got.ranks[b] <= limits[b] for b in survivors)
    assert parameters(got.ranks) <= parameters(state.ranks)
    larger = [min(got.ranks[b] + 1, limits[b]) if b in survivors else 0 for b in range(len(costs))]
    assert larger == list(got.ranks) or parameters(larger) > parameters(state.ranks)


@pytest.mark.parametrize("extension", ["qr", "plain"])
def test_growing_leaves_the_product_as_it_is(extension: str) -> None:
    torch.manual_seed(0)
    method = weightlora_plus({"x": (30, 20), "y": (10, 10)}, k=1, extension=extension)
    old = {"lora_A": torch.randn(3, 30), "lora_B": torch.randn(3, 20)}
    keep = () if extension == "qr" else (0, 1, 2)
    growth = RankPlan((keep, ()), (7 - len(keep), 0))
    rows = method.new_rows(0, old, growth, module_generator(0, "x", 5))
    a, b = (torch.cat([old[f][list(keep)], rows[f]]).double() for f in ("lora_A", "lora_B"))
    assert a.shape == (7, 30) and b.shape == (7, 20)
    torch.testing.assert_close(
        b.T @ a, (old["lora_B"].double().T @ old["lora_A"].double()), rtol=1e-5, atol=1e-5
    )
    assert not b[3:].any()
    again = method.new_rows(0, old, growth, module_generator(0, "x", 5))
    assert all(torch.equal(rows[f], again[f]) for f in rows)
    if extension == "plain":
        assert torch.equal(a[:3], old["lora_A"].double())
        return
    # [Q, (I - Q Q^T) V]: the first rows are an orthonormal basis of A's, the others orthogonal to them and
    # about as long.
    torch.testing.assert_close(a[:3] @ a[:3].T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.linalg.matrix_rank(torch.cat([a[:3], old["lora_A"].double()]), rtol=1e-5) == 3
    assert (a[:3] @ a[3:].T).abs().max() < 1e-6
    assert 0.6 < float(a[3:].norm(dim=1).mean()) < 1.4


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"k": 3}, "method.k is 3, and the model has 3 adapted linears: none would be dropped"),
        ({"disconnect_at": 1}, "method.disconnect_at is step 1: give 2 to 19"),
        ({"disconnect_at": 20}, "method.disconnect_at is step 20: give 2 to 19"),
        ({"disconnect_at": 0, "selection": "random"}, "method.disconnect_at is step 0: give 1 to 19"),
        ({"disconnect_at": 1.5}, "method.disconnect_at is 1.5: give whole steps, or a fraction"),
    ],
)
def test_settings_that_leave_nothing_to_do_are_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        weightlora(**config)
