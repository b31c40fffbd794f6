from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynrank_ds.adapters.initial import module_generator, svd_factors
from dynrank_ds.adapters.linear import AdaptedLinear
from dynrank_ds.errors import RecipeError
from dynrank_ds.methods.base import MicroBatch
from dynrank_ds.methods.increlora import IncreLoRA, IncreLoRAConfig
from dynrank_ds.ranking.layout import ShardLayout, whole
from dynrank_ds.ranking.plan import RankPlan, RankState
from dynrank_ds.recipe import load_recipe
from tests.methods.small import CPU, SIDES, make_modules, step_view
from tests.ranking.thread_processes import ThreadProcess, run_in_threads

TIMES: dict[str, Any] = {"t_i": 4, "interval": 3, "top_h": 2, "target_rank": 4}


def increlora(total_steps: int = 30, rank: int = 1, **config: Any) -> IncreLoRA:
    return IncreLoRA(IncreLoRAConfig(**{**TIMES, **config}), make_modules(rank=rank), total_steps, CPU)


def plan(
    method: IncreLoRA, scores: list[float], ranks: list[int], max_ranks: list[int] | None = None
) -> RankPlan:
    state = RankState(tuple(ranks), tuple(max_ranks or [9] * len(ranks)), 1, 6, 30)
    return method.plan(
        [torch.full((r,), s, dtype=torch.float64) for s, r in zip(scores, ranks, strict=True)], state
    )


def test_the_highest_modules_grow_until_exactly_the_target() -> None:
    method = increlora()  # 3 triples to 12, two at a time for each of two modules
    ranks = [1, 1, 1]
    grown = []
    for scores in ([1.0, 3.0, 2.0], [9.0, 3.0, 2.0], [9.0, 3.0, 4.0], [1.0, 1.0, 1.0]):
        got = plan(method, scores, ranks)
        assert got.keep == tuple(tuple(range(r)) for r in ranks)
        ranks = list(got.ranks)
        grown.append(got.new)
    # 3 + 4 + 4 = 11: one triple is left, and the highest module takes it.
    assert grown == [(0, 2, 2), (2, 2, 0), (1, 0, 0), (0, 0, 0)]
    assert sum(ranks) == 12


def test_equal_modules_grow_lower_index_first_and_as_many_as_asked() -> None:
    assert plan(increlora(), [5.0, 5.0, 5.0], [1, 1, 1]).new == (2, 2, 0)


def test_a_full_module_leaves_its_turn_to_the_next_and_a_nearly_full_one_takes_what_fits() -> None:
    assert plan(increlora(), [9.0, 5.0, 1.0], [3, 1, 1], [3, 9, 9]).new == (0, 2, 2)
    assert plan(increlora(), [9.0, 5.0, 1.0], [2, 1, 1], [3, 9, 9]).new == (1, 2, 0)


def test_more_modules_than_there_are_grow_once_each() -> None:
    assert plan(increlora(top_h=7), [1.0, 2.0, 3.0], [1, 1, 1]).new == (2, 2, 2)


def test_growth_is_at_multiples_of_the_interval_after_t_i_until_the_target() -> None:
    method = increlora()
    assert [step for step in range(1, 31) if method.adjusts_at(step)] == [6, 9, 12, 15, 18, 21, 24, 27]
    assert method.planned_adjustments() == 3  # 4 + 4 + 1
    ranks = [1, 1, 1]
    for _ in range(3):
        assert method.growing
        grown = plan(method, [1.0, 2.0, 3.0], ranks)
        ranks = list(grown.ranks)
        method.applied(grown, 6)
    assert not any(map(method.adjusts_at, range(1, 31)))


def test_a_resumed_run_knows_how_far_growth_has_come() -> None:
    method = increlora()
    method.start(ShardLayout(method.shapes, (4, 4, 4), method.factors, whole))
    assert not method.growing
    method.start(ShardLayout(method.shapes, (4, 4, 3), method.factors, whole))
    assert method.adjusts_at(9)


def test_half_the_target_is_added_at_a_time_unless_given() -> None:
    assert [increlora(target_rank=t).add_rank for t in (2, 3, 4, 5)] == [1, 1, 2, 2]
    assert increlora(add_rank=1, interval=1).add_rank == 1


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"rank": 4}, r"method.target_rank 4 is not above adapter.rank 4: nothing would grow"),
        ({"interval": 0}, r"method.interval is 0, 0 of the 30 steps: give at least 1"),
        (
            {"interval": 12},
            r"method.top_h 2 modules by 2 triples reach the target of 12 triples after 3 adjustments, but "
            r"method.t_i 4 and method.interval 12 leave 2 before the last of 30 steps",
        ),
        (
            {"target_rank": 6},
            r"method.target_rank 6 x 3 modules is 18 triples, but the modules' largest ranks add up to 15",
        ),
        ({"interval": 40}, r"method.interval 40 leaves no adjustment before step 30"),
        ({"t_i": 24}, r"leave 1 before the last of 30 steps"),
    ],
)
def test_what_would_not_reach_the_target_is_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        increlora(**config)


def test_a_largest_rank_below_the_target_is_refused() -> None:
    sentence = r"adapter.max_rank 3 is below 4, the mean rank that increlora ends with"
    with pytest.raises(RecipeError, match=sentence):
        load_recipe("quickstart_increlora", ["adapter.max_rank=3"])
    assert load_recipe("quickstart_increlora", ["adapter.max_rank=4"]).adapter.max_rank == 4


def test_a_run_that_ends_below_its_target_says_so(caplog: pytest.LogCaptureFixture) -> None:
    method = increlora()
    for ranks, step in (((4, 4, 2), 29), ((4, 4, 4), 30), ((4, 4, 2), 30)):
        assert not caplog.messages
        layout = ShardLayout(method.shapes, ranks, method.factors, whole)
        method.start(layout)
        method.observe(step_view(torch.empty(0), torch.empty(0), layout, step=step))
    assert caplog.messages[0].startswith("increlora ends at 10 of its 12 triples")


def test_a_base_too_large_for_dense_gradients_is_refused_with_its_bytes() -> None:
    big = {str(i): AdaptedLinear(nn.Linear(20_000, 20_000, device="meta"), 1.0) for i in range(3)}
    for module in big.values():
        module.initial_rank = 1
    with pytest.raises(RecipeError, match=r"1,200,000,000 parameters, 4,800,000,000 bytes a step"):
        IncreLoRA(IncreLoRAConfig(**TIMES), big, 30, torch.device("meta"))


score = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1e6))


@settings(max_examples=150, deadline=None)
@given(
    scores=st.lists(score, min_size=3, max_size=3),
    ranks=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    room=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    top_h=st.integers(1, 4),
    add_rank=st.integers(1, 3),
)
def test_every_plan_adds_what_it_can_and_never_overshoots(
    scores: list[float], ranks: list[int], room: list[int], top_h: int, add_rank: int
) -> None:
    method = increlora(top_h=top_h, add_rank=add_rank, interval=1)
    got = plan(method, scores, ranks, [r + more for r, more in zip(ranks, room, strict=True)])
    takes = sorted((min(more, add_rank) for more in room), reverse=True)
    assert got.pruned(ranks) == [[], [], []]
    assert all(0 <= n <= min(more, add_rank) for n, more in zip(got.new, room, strict=True))
    assert sum(n > 0 for n in got.new) <= top_h
    assert sum(got.new) <= max(0, 12 - sum(ranks))
    if sum(takes) <= 12 - sum(ranks) and top_h >= 3:
        assert sum(got.new) == sum(takes)
    # Nobody who gets nothing scores above somebody who does, unless it is full.
    fed = [s for s, n in zip(scores, got.new, strict=True) if n]
    hungry = [s for s, n, more in zip(scores, got.new, room, strict=True) if not n and more]
    assert not fed or min(fed) >= max(hungry, default=0)


# --- statistics

SAMPLES, TOKENS = 6, 5


def double_modules(ranks: tuple[int, ...]) -> dict[str, AdaptedLinear]:
    """fp64 modules whose e is not 0; the same in every simulated process."""
    made = {}
    for (name, sides), rank in zip(SIDES.items(), ranks, strict=True):
        module = made[name] = AdaptedLinear(nn.Linear(*sides).double(), 1.7)
        module.initial_rank = 1
        generator = module_generator(3, name, rank)
        for parameter in (module.base.weight, module.base.bias):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        factors = svd_factors(rank, *sides, generator)
        module.set_factors({**factors, "lora_E": torch.randn(rank, generator=generator)})
    return made


def batch(step: int, name: str) -> tuple[Tensor, Tensor]:
    """Inputs (samples, tokens, in) and what the outputs are multiplied by in the loss."""
    generator = module_generator(step, name, 99)
    shape = (SAMPLES, TOKENS)
    return tuple(torch.randn(*shape, side, generator=generator, dtype=torch.float64) for side in SIDES[name])  # type: ignore[return-value]


def loss(module: Any, step: int, name: str, samples: list[int]) -> Tensor:
    x, y = batch(step, name)
    return (module(x[samples]) * y[samples]).sin().sum() / (SAMPLES * TOKENS)


def dense_score(name: str, step: int, modules: dict[str, AdaptedLinear]) -> float:
    """sum |dW * dL/dW| / sqrt(numel) from autograd by a dense weight, sample by sample."""
    module = modules[name]
    change = module.scale * module.lora_B.T @ torch.diag(module.lora_E) @ module.lora_A
    total = 0.0
    for sample in range(SAMPLES):
        dense = (module.base.weight + change).detach().requires_grad_()
        loss(lambda x, w=dense: nn.functional.linear(x, w, module.base.bias), step, name, [sample]).backward()
        assert dense.grad is not None
        total += float((change.detach() * dense.grad).abs().sum())
    return total / change.numel() ** 0.5


@pytest.mark.parametrize(("size", "micro_batch"), [(1, 6), (1, 2), (2, 3), (3, 1)])
def test_scores_are_those_of_dense_gradients_however_the_batch_is_dealt(size: int, micro_batch: int) -> None:
    ranks_of = {step: (1, 1, 1) if step <= 7 else (3, 1, 3) for step in range(1, 13)}

    def work(process: ThreadProcess) -> Tensor:
        method: IncreLoRA | None = None
        mine = list(range(process.rank, SAMPLES, size))
        for step, ranks in ranks_of.items():
            modules = double_modules(ranks)
            following = IncreLoRA(IncreLoRAConfig(**TIMES), modules, 30, CPU)
            if method:
                for key, value in method.replicated_state.items():
                    following.replicated_state[key].copy_(value)
            method = following
            for first in range(0, len(mine), micro_batch):
                chosen = mine[first : first + micro_batch]
                method.begin_micro_batch(MicroBatch(torch.ones(len(chosen), TOKENS)))
                for name, module in modules.items():
                    # As the loop has it: the engine takes the mean over processes.
                    (loss(module, step, name, chosen) * size).backward()
            layout = ShardLayout(method.shapes, ranks, method.factors, whole)
            method.observe(
                step_view(torch.empty(0), torch.empty(0), layout, process.all_reduce_sum, step=step)
            )
        assert method is not None and process.sums == len(ranks_of)  # one a step
        view = step_view(torch.empty(0), torch.empty(0), layout, process.all_reduce_sum)
        scores = method.scores(view)
        assert [len(s) for s in scores] == [3, 1, 3] and all((s == s[0]).all() for s in scores)
        return torch.stack([s[0] for s in scores])

    smoothed, uncertainty = torch.zeros(2, 3, dtype=torch.float64)
    for step, ranks in ranks_of.items():
        modules = double_modules(ranks)
        now = torch.tensor([dense_score(name, step, modules) for name in SIDES], dtype=torch.float64)
        smoothed = 0.85 * smoothed + 0.15 * now
        uncertainty = 0.85 * uncertainty + 0.15 * (now - smoothed).abs()
    for ours in run_in_threads(size, work):
        torch.testing.assert_close(ours, smoothed * uncertainty, rtol=1e-10, atol=0)


def test_a_discarded_step_leaves_no_trace_and_statistics_end_with_growth() -> None:
    method = increlora()
    layout = ShardLayout(method.shapes, (1, 1, 1), method.factors, whole)
    method._sums.fill_(float("nan"))
    method.discard_step()
    sums = []

    def total(tensor: Tensor) -> Tensor:
        sums.append(tensor)
        return tensor

    view = step_view(torch.empty(0), torch.empty(0), layout, total)
    method.observe(view)
    assert not method.smoothed.any() and len(sums) == 1
    method.start(ShardLayout(method.shapes, (4, 4, 4), method.factors, whole))
    method.observe(view)
    assert len(sums) == 1
