"""ARD-LoRA's alpha, gates and commits: there is no reference to compare with, so against the formulas and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dynrank_ds.adapters.heads import head_splits
from dynrank_ds.adapters.initial import lora_factors, module_generator
from dynrank_ds.adapters.linear import AdaptedLinear
from dynrank_ds.errors import RecipeError
from dynrank_ds.methods.ard_lora import ARDLoRA, ARDLoRAConfig, alpha_of_modules
from dynrank_ds.methods.base import MicroBatch
from dynrank_ds.ranking.layout import ShardLayout, whole
from dynrank_ds.ranking.plan import RankPlan, RankState
from tests.methods.regression import SCALE, Regression, live
from tests.methods.small import CPU, make_modules, step_view
from tests.ranking.thread_processes import ThreadProcess, run_in_threads
from tests.support.named import inject_named

RATES = [0.3, 0.7, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5]


def ard_lora(made: dict[str, AdaptedLinear] | None = None, rank: int = 2, **config: Any) -> ARDLoRA:
    values = {"t_i": 3, "interval": 4, "t_f": 5, **config}
    return ARDLoRA(ARDLoRAConfig(**values), made or make_modules(rank=rank), 20, CPU)


def started(
    made: dict[str, AdaptedLinear], alpha: list[float] | None = None, slots: int = 3, **config: Any
) -> ARDLoRA:
    """With r0 = 2, so many slots everywhere, and these alphas, at which the last commit found them."""
    for module in made.values():
        module.initial_rank = 2
    method = ard_lora(made, **config)
    if alpha is not None:
        method.alpha.copy_(torch.tensor(alpha, dtype=torch.float64))
        method.reference.copy_(method.alpha)
    method.start(layout(method, (slots,) * 3))
    return method


def layout(method: ARDLoRA, ranks: tuple[int, ...]) -> ShardLayout:
    return ShardLayout(method.shapes, ranks, method.factors, whole)


def observe(method: ARDLoRA, step: int, rate_factor: float = 1.0, total=lambda t: t) -> None:  # type: ignore[no-untyped-def]
    nothing = torch.empty(0)
    ranks = tuple(len(module.gate) for module in method.modules)
    method.observe(step_view(nothing, nothing, layout(method, ranks), total, step, rate_factor=rate_factor))


def plan(method: ARDLoRA, continuous: list[float], ranks: list[int], step: int, limit: int = 99) -> RankPlan:
    state = RankState(tuple(ranks), (limit,) * len(ranks), 2, step, 20)
    scores = [
        torch.full((rank,), value, dtype=torch.float64) for rank, value in zip(ranks, continuous, strict=True)
    ]
    return method.plan(scores, state)


# --- schedule


def test_commits_come_from_t_i_at_every_interval_and_at_the_last_step_before_t_f() -> None:
    for config, steps in (
        ({}, [3, 7, 11, 15]),
        ({"t_i": 0}, [4, 8, 12, 15]),
        ({"t_f": 6}, [3, 7, 11, 14]),
        ({"t_i": 0.15, "interval": 0.25, "t_f": 0.1}, [3, 8, 13, 18]),
    ):
        method = ard_lora(**config)
        assert [step for step in range(1, 21) if method.adjusts_at(step)] == steps
        assert method.planned_adjustments() == len(steps)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"interval": 0}, "method.interval is 0, 0 of the 20 steps: give at least 1"),
        ({"interval": 12}, r"method.t_i 3 \+ method.interval 12 leaves no adjustment before step 15"),
        ({"t_i": 16}, r"leaves no adjustment before step 15"),
        ({"t_f": 0}, "method.t_f is 0, 0 of the 20 steps: give at least 1"),
    ],
)
def test_settings_that_leave_nothing_to_do_are_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        ard_lora(**config)


# --- ranks


@pytest.mark.parametrize(
    ("continuous", "whole_rank"),
    [(0.5, 1), (0.9, 1), (1.4, 1), (1.5, 2), (2.0, 2), (2.5, 2), (2.6, 3), (3.5, 4), (4.0, 4)],
)
def test_ranks_round_half_to_even_and_never_below_one(continuous: float, whole_rank: int) -> None:
    method = ard_lora()  # r0 = 2, so at most 4 slots
    for rank in range(1, 5):
        last = plan(method, [continuous], [rank], step=15)
        assert last.ranks == (whole_rank,)
        assert last.keep == (tuple(range(min(rank, whole_rank))),)
        # One slot more to grow into, before the last commit and below the largest rank.
        assert plan(method, [continuous], [rank], step=7).ranks == (min(whole_rank + 1, 4),)


def test_slots_stay_below_the_largest_alpha_and_the_largest_rank() -> None:
    assert plan(ard_lora(alpha_max=1.5), [3.0], [2], step=7).ranks == (3,)
    assert plan(ard_lora(), [3.0], [2], step=7, limit=3).ranks == (3,)
    assert plan(ard_lora(), [3.0], [2], step=15, limit=2).ranks == (2,)
    # 1.1 x 10 is a little more than 11 in floating point.
    assert ard_lora(rank=10, alpha_max=1.1).most_slots == 11


@settings(max_examples=150, deadline=None)
@given(
    made=st.lists(st.tuples(st.floats(0.5, 4), st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=8),
    step=st.sampled_from([3, 7, 11, 15]),
)
def test_every_plan_keeps_the_first_slots_and_stays_within_its_limits(
    made: list[tuple[float, int, int]], step: int
) -> None:
    made = [(value, min(rank, limit), limit) for value, rank, limit in made]
    ranks, limits = tuple(rank for _, rank, _ in made), tuple(limit for _, _, limit in made)
    scores = [torch.full((rank,), value, dtype=torch.float64) for value, rank, _ in made]
    method = ard_lora()
    got = method.plan(scores, RankState(ranks, limits, 2, step, 20))
    for (value, rank, limit), kept, after in zip(made, got.keep, got.ranks, strict=True):
        assert 1 <= after <= min(limit, 4)
        assert kept == tuple(range(min(rank, after)))
        # Whatever has a gate above 0 stays, until the last commit.
        assert step == 15 or after >= min(-(-value // 1), rank)
    backwards = method.plan(scores[::-1], RankState(ranks[::-1], limits[::-1], 2, step, 20))
    assert backwards.ranks == got.ranks[::-1]


# --- gates


def test_gates_add_up_to_the_continuous_rank() -> None:
    made = live(3)
    started(made, [1.0, 0.6, 1.25], slots=3)
    expected = [[1, 1, 0], [1, 0.2, 0], [1, 1, 0.5]]
    for module, gates in zip(made.values(), expected, strict=True):
        torch.testing.assert_close(module.gate, torch.tensor(gates, dtype=torch.float32))


def dense_delta(module: AdaptedLinear, alpha: Tensor, r0: int) -> Tensor:
    """s sum_i clamp(r0 alpha - (i - 1), 0, 1) b_i a_i, triple by triple."""
    delta = torch.zeros(module.out_features, module.in_features, dtype=torch.float64)
    for i in range(len(module.lora_A)):
        gate = torch.clamp(r0 * alpha - i, 0, 1)
        delta = delta + SCALE * gate * torch.outer(module.lora_B[i].detach(), module.lora_A[i].detach())
    return delta


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("reference", ["commit", "previous"])
def test_alpha_follows_adam_on_the_whole_loss_by_autograd(size: int, reference: str) -> None:
    """Eight steps: task, l1 and variation through torch's own clamp, huber_loss and Adam, in float64."""
    task, start = Regression(8, size), [1.0, 0.7, 1.3]
    settings = {"sparsity": 3.0, "variation": 0.8, "alpha_lr": 0.05, "t_i": 0, "interval": 4}

    def work(process: ThreadProcess) -> list[Tensor]:
        made, seen = live(3, torch.float64), []
        method = started(made, start, slots=3, reference=reference, **settings)
        for step in range(1, 9):
            method.begin_micro_batch(MicroBatch(step=step))
            task.backward(step, process.rank, made)
            observe(method, step, RATES[step - 1], process.all_reduce_sum)
            assert process.sums == step
            if step == 4:
                method.applied(RankPlan(((0, 1, 2),) * 3, (0, 0, 0)), step)
            seen.append(method.alpha.clone())
        return seen

    alpha = torch.tensor(start, dtype=torch.float64).requires_grad_()
    anchor, adam, expected = alpha.detach().clone(), torch.optim.Adam([alpha]), []
    made = live(3, torch.float64)
    for step in range(1, 9):
        adam.zero_grad()
        for i, (name, module) in enumerate(made.items()):
            task.whole_loss(step, name, module.base.weight + dense_delta(module, alpha[i], 2)).backward()
        huber = torch.nn.functional.huber_loss(alpha, anchor, reduction="sum")
        (3.0 * (alpha.sum() + 0.8 * huber) / 3).backward()
        before = alpha.detach().clone()
        adam.param_groups[0]["lr"] = 0.05 * RATES[step - 1]
        adam.step()
        with torch.no_grad():
            alpha.clamp_(1 / 4, 2)
        if reference == "previous":
            anchor = before
        elif step == 4:
            anchor = alpha.detach().clone()
        expected.append(alpha.detach().clone())
    for got in run_in_threads(size, work):
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)


def test_the_gradient_of_alpha_is_that_of_finite_differences() -> None:
    task, h = Regression(1, 1), 1e-6
    made = live(3, torch.float64)
    start = [0.8, 0.7, 1.3]
    method = started(made, start, slots=3, t_i=0, sparsity=0.0)
    method.begin_micro_batch(MicroBatch(step=1))
    task.backward(1, 0, made)
    observe(method, 1)
    for i, (name, module) in enumerate(made.items()):
        alphas = [torch.tensor(start[i] + d, dtype=torch.float64) for d in (h, -h)]
        losses = [
            float(task.whole_loss(1, name, module.base.weight + dense_delta(module, alpha, 2)))
            for alpha in alphas
        ]
        assert float(method.alpha.grad[i]) == pytest.approx((losses[0] - losses[1]) / (2 * h), rel=1e-7)


# --- the regulariser


def test_the_l1_term_alone_drives_alpha_to_its_floor() -> None:
    method = started(live(2), t_i=1, interval=2, t_f=1, alpha_lr=0.2)
    for step in range(1, 20):
        observe(method, step)
    assert torch.equal(method.alpha, torch.full((3,), 1 / 4))
    scores = method.scores(step_view(torch.empty(0), torch.empty(0), layout(method, (3, 3, 3))))
    assert [s.tolist() for s in scores] == [[0.5] * 3] * 3


def test_the_variation_is_nothing_at_the_last_commit_and_pulls_back_to_it() -> None:
    method = started(live(2), [1.0, 1.5, 0.4], sparsity=3.0, variation=0.5)
    method.applied(RankPlan(((0, 1, 2),) * 3, (0, 0, 0)), 4)
    assert torch.equal(method.reference, method.alpha)
    torch.testing.assert_close(method.penalty_gradient(), torch.ones(3, dtype=torch.float64))
    method.alpha.copy_(torch.tensor([1.2, 0.2, 1.9]))
    # 1 + 0.5 clamp(alpha - reference, -1, 1)
    expected = torch.tensor([1.1, 0.5, 1.5], dtype=torch.float64)
    torch.testing.assert_close(method.penalty_gradient(), expected, rtol=1e-6, atol=0)


def test_alpha_moves_only_between_t_i_and_the_last_commit() -> None:
    made = live(3)
    method = started(made)
    for step in range(1, 21):
        before = method.alpha.clone()
        method.begin_micro_batch(MicroBatch(step=step))
        for module in made.values():
            module(torch.randn(2, module.in_features)).square().sum().backward()
        observe(method, step)
        assert torch.equal(method.alpha, before) == (step <= 3 or step > 15), step


# --- the function


def outputs(made: dict[str, AdaptedLinear]) -> Tensor:
    with torch.no_grad():
        return torch.cat(
            [
                module(torch.linspace(-1, 1, 2 * module.in_features).view(2, -1)).flatten()
                for module in made.values()
            ]
        )


def apply(method: ARDLoRA, made: dict[str, AdaptedLinear], step: int) -> RankPlan:
    """A commit as the loop does it."""
    ranks = tuple(len(module.lora_A) for module in made.values())
    view = step_view(torch.empty(0), torch.empty(0), layout(method, ranks))
    got = method.plan(method.scores(view), RankState(ranks, (9, 9, 9), 2, step, 20))
    for index, (name, module) in enumerate(made.items()):
        old = {f: value.detach() for f, value in module.factors().items()}
        fresh = method.new_rows(index, old, got, module_generator(0, name, step))
        module.set_factors({f: torch.cat([old[f][list(got.keep[index])], fresh[f]]) for f in old})
    method.applied(got, step)
    return got


def test_a_commit_before_the_last_changes_no_output() -> None:
    made = live(2)
    method = started(made, [1.0, 0.6, 0.3], slots=2)
    before = outputs(made)
    assert apply(method, made, step=3).ranks == (3, 2, 2)
    torch.testing.assert_close(outputs(made), before, rtol=1e-6, atol=1e-6)
    for alpha in ([1.4, 1.2, 0.9], [0.7, 1.0, 0.26], [2.0, 0.5, 1.75]):
        method.alpha.copy_(torch.tensor(alpha))
        method._refresh()
        before = outputs(made)
        apply(method, made, step=7)
        torch.testing.assert_close(outputs(made), before, rtol=1e-6, atol=1e-6)


def test_after_the_last_commit_whole_ranks_train_as_plain_lora() -> None:
    made = live(2)
    method = started(made, [1.3, 0.6, 0.3], slots=2)
    apply(method, made, step=3)
    got = apply(method, made, step=15)
    assert got.ranks == (3, 1, 1)
    assert method.gates() == [None] * 3
    for module in made.values():
        plain = module.base.weight + SCALE * module.lora_B.T @ module.lora_A
        x = torch.randn(4, module.in_features)
        torch.testing.assert_close(module(x), x @ plain.T, rtol=1e-5, atol=1e-5)
        method.begin_micro_batch(MicroBatch(step=16))
        module(x).sum().backward()
    alpha = method.alpha.clone()
    method.observe(step_view(torch.empty(0), torch.empty(0), layout(method, got.ranks), step=16))
    assert torch.equal(method.alpha, alpha)


# --- checkpoints


@pytest.mark.parametrize("last_step", [9, 16])
def test_a_restored_method_continues_bit_for_bit(last_step: int) -> None:
    made, again = live(2), live(2)
    first = ard_lora(made)
    first.start(layout(first, (2, 2, 2)))

    def train(method: ARDLoRA, on: dict[str, AdaptedLinear], steps: range) -> None:
        for step in steps:
            method.begin_micro_batch(MicroBatch(step=step))
            for module in on.values():
                x = torch.randn(4, module.in_features, generator=torch.Generator().manual_seed(step))
                module(x).square().sum().backward()
            ranks = tuple(len(module.lora_A) for module in on.values())
            method.observe(step_view(torch.empty(0), torch.empty(0), layout(method, ranks), step=step))
            if method.adjusts_at(step):
                apply(method, on, step)

    train(first, made, range(1, last_step + 1))
    saved = {name: value.clone() for name, value in first.replicated_state.items()}
    for name, module in again.items():
        module.set_factors({f: value.detach().clone() for f, value in made[name].factors().items()})
    second = ard_lora(again)
    second.start(layout(second, tuple(len(module.lora_A) for module in again.values())))
    for name, value in saved.items():
        second.replicated_state[name].copy_(value)
    second.restored()
    assert torch.equal(outputs(made), outputs(again))
    train(first, made, range(last_step + 1, 20))
    train(second, again, range(last_step + 1, 20))
    for name, value in first.replicated_state.items():
        assert torch.equal(value, second.replicated_state[name]), name
    assert torch.equal(outputs(made), outputs(again))


def test_a_discarded_step_leaves_no_trace() -> None:
    made = live(3)
    method, other = started(made), started(live(3))
    method.begin_micro_batch(MicroBatch(step=4))
    for module in made.values():
        module(torch.full((2, module.in_features), float("nan"))).sum().backward()
    method.discard_step()
    observe(method, 4)
    observe(other, 4)
    assert torch.equal(method.alpha, other.alpha)


# --- heads


def test_the_heads_of_a_group_share_an_alpha_where_it_is_one_per_head() -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=50,
    )
    model = LlamaForCausalLM(config)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    heads = inject_named(model, targets, 2, 1.0, lora_factors, 0, head_splits(config))
    shared = alpha_of_modules(heads)
    # q 0 1 | 2 3, k 0 | 1, v 0 | 1, o 0 1 | 2 3, up
    layer = [0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 2]
    assert shared == layer + [3 + i for i in layer]
    per_head = ARDLoRA(ARDLoRAConfig(t_i=3, interval=4, t_f=5, alpha_per="head"), heads, 20, CPU)
    assert len(per_head.alpha) == 6
    assert len(ARDLoRA(ARDLoRAConfig(t_i=3, interval=4, t_f=5), heads, 20, CPU).alpha) == len(heads) == 26


def test_a_shared_alpha_gets_the_gradient_of_all_its_modules() -> None:
    task = Regression(1, 1)
    gradients = []
    for shared in (False, True):
        made = live(2, torch.float64)
        method = started(made, [0.8] * 3, slots=2, t_i=0, sparsity=0.0)
        if shared:
            method.alpha_of = [0, 1, 0]
            method.start(layout(method, (2, 2, 2)))
        method.begin_micro_batch(MicroBatch(step=1))
        task.backward(1, 0, made)
        observe(method, 1)
        gradients.append(method.alpha.grad)
    alone, together = gradients
    torch.testing.assert_close(together[:2], torch.stack([alone[0] + alone[2], alone[1]]))
