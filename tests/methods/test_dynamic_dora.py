"""Dynamic DoRA's schedule and policy, by hand and for any scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank_ds.errors import RecipeError
from dynrank_ds.methods.dynamic_dora import DynamicDoRA, DynamicDoRAConfig, component_factors
from dynrank_ds.ranking.plan import RankPlan, RankState
from tests.methods.small import CPU, SIDES, make_modules


def method(rank: int = 6, total_steps: int = 20, n: int = 3, **config: Any) -> DynamicDoRA:
    sides = {name: SIDES["abc"[i % 3]] for i, name in enumerate("abcdefghij"[:n])}
    return DynamicDoRA(DynamicDoRAConfig(**config), make_modules(sides, rank), total_steps, CPU)


def adjustments(rank: int = 6, total_steps: int = 20, **config: Any) -> list[int]:
    made = method(rank, total_steps, **config)
    steps = [step for step in range(1, total_steps + 1) if made.adjusts_at(step)]
    assert made.planned_adjustments() == len(steps)
    return steps


def plan(made: DynamicDoRA, scores: list[list[float]], step: int) -> RankPlan:
    ranks = tuple(map(len, scores))
    state = RankState(ranks, (9,) * len(ranks), max(ranks), step, 20)
    return made.plan([torch.tensor(s, dtype=torch.float64) for s in scores], state)


def test_masks_come_from_t_i_at_every_interval_and_at_the_last_step_before_t_f() -> None:
    assert adjustments(interval=3) == [3, 6, 9, 10]  # t_i 0.15 and t_f 0.5 of 20 steps
    assert adjustments(interval=7) == [3, 10]
    assert adjustments(t_i=2, t_f=6, interval=5) == [2, 7, 12, 14]
    assert adjustments(t_i=0, t_f=8, interval=4) == [4, 8, 12]
    assert adjustments(total_steps=200, interval=10) == [30, 40, 50, 60, 70, 80, 90, 100]


def test_the_number_of_masked_triples_grows_with_the_cube_of_time() -> None:
    made = method(rank=6, interval=3)  # 3 modules, 18 triples, 12 in the end
    # 6 (k / 7)^3 for k = 0, 3, 6, 7 is 0, 0.47, 3.78, 6; the authors mask at least one.
    assert [made.masked_at(step) for step in (3, 6, 9, 10)] == [1, 1, 3, 6]


@pytest.mark.parametrize(("modules", "start", "target"), [(72, 12, 8), (72, 3, 2), (36, 15, 10), (224, 6, 4)])
def test_counts_are_those_of_the_authors_formula(modules: int, start: int, target: int) -> None:
    total_steps = 2000
    made = method(start, total_steps, n=1, target_rank=target, interval=50)
    made.surplus *= modules
    largest = int(total_steps * (1 - 0.15 - 0.5))
    steps = [step for step in range(1, total_steps + 1) if made.adjusts_at(step)]
    assert steps[-1] == 1000
    for step in steps:
        current = int(step - total_steps * 0.15)
        theirs = max(int(modules * start * ((start - target) / start) * (current / largest) ** 3), 1)
        # Theirs is in floating point, which may take one off.
        assert made.masked_at(step) - theirs in (0, 1)
    assert made.masked_at(1000) == modules * (start - target)


def test_the_lowest_scores_are_masked_and_may_return() -> None:
    made = method(rank=2, target_rank=1, interval=3)
    scores = [[0.5, 0.1], [0.9, 0.2], [0.3, 0.4]]
    everything = ((0, 1),) * 3
    assert plan(made, scores, step=6) == RankPlan(everything, (0, 0, 0), ((1,), (), ()))
    # 3 (6 / 7)^3 = 1.9
    assert plan(made, scores, step=9) == RankPlan(everything, (0, 0, 0), ((1,), (), ()))
    # A later score decides alone: the triple that was masked comes back.
    assert plan(made, [[0.5, 0.6], [0.9, 0.2], [0.3, 0.4]], step=9).masked == ((), (1,), ())


def test_the_last_mask_removes_for_good_and_may_empty_a_module() -> None:
    made = method(rank=2, target_rank=1, interval=3)
    got = plan(made, [[0.2, 0.1], [0.9, 0.8], [0.3, 0.4]], step=10)
    assert got == RankPlan(keep=((), (0, 1), (1,)), new=(0, 0, 0))
    assert got.ranks == (0, 2, 1)


def test_equal_scores_go_by_module_and_triple_and_no_more_than_asked() -> None:
    made = method(rank=2, target_rank=1, interval=3)
    got = plan(made, [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], step=10)
    assert got.keep == ((), (1,), (0, 1))


score = st.one_of(st.sampled_from([0.0, 0.5]), st.floats(0, 1))


@settings(max_examples=150, deadline=None)
@given(
    scores=st.lists(st.lists(score, min_size=3, max_size=3), min_size=1, max_size=8),
    target=st.integers(1, 2),
    step=st.sampled_from([3, 6, 9, 10]),
)
def test_every_plan_masks_the_exact_count_of_the_lowest(
    scores: list[list[float]], target: int, step: int
) -> None:
    made = method(rank=3, n=len(scores), target_rank=target, interval=3)
    got = plan(made, scores, step)
    ranks = [3] * len(scores)
    assert not any(got.new)
    gone = got.pruned(ranks) if step == 10 else [list(m) for m in got.masked]
    assert sum(map(len, gone)) == made.masked_at(step)
    if step == 10:
        assert sum(got.ranks) == target * len(scores) and not got.masked
    else:
        assert got.ranks == tuple(ranks)
    inside = [scores[b][i] for b, module in enumerate(gone) for i in module]
    outside = [s for b, module in enumerate(scores) for i, s in enumerate(module) if i not in gone[b]]
    assert max(inside) <= min(outside)
    assert got == plan(made, scores, step)


def test_a_target_of_the_initial_rank_means_no_pruning() -> None:
    made = method(target_rank=6, interval=2)  # the paper's Table 6 has such runs
    assert made.planned_adjustments() == 0
    assert not any(map(made.adjusts_at, range(1, 21)))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"target_rank": 7, "interval": 2},
            "method.target_rank 7 is not below adapter.rank 6: nothing would be pruned",
        ),
        ({"rank": 1, "interval": 2}, "method.target_rank 1 is not below adapter.rank 1"),
        ({"interval": 0}, "method.interval is 0, 0 of the 20 steps: give at least 1"),
        ({"interval": 8}, r"method.t_i 3 \+ method.interval 8 leaves no adjustment before step 10"),
        ({"t_i": 12, "t_f": 9}, r"leaves no adjustment before step 11"),
    ],
)
def test_settings_that_leave_nothing_to_do_are_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        method(**config)


def test_the_target_is_by_default_two_thirds_of_a_start_that_is_one_and_a_half_targets() -> None:
    for target in range(1, 20):
        start = -(-3 * target // 2)
        assert method(start, n=1, interval=3).surplus == start - target


def test_components_begin_kaiming_uniform_with_coefficients_zero() -> None:
    factors = component_factors(8, 96, 300, torch.Generator().manual_seed(0))
    assert {k: tuple(v.shape) for k, v in factors.items()} == {
        "lora_A": (8, 96),
        "lora_E": (8,),
        "lora_B": (8, 300),
    }
    assert not factors["lora_E"].any()
    # torch's initialiser on an nn.Linear weight of these shapes draws between the same bounds.
    drawn = torch.Generator().manual_seed(1)
    for ours, weight in (
        (factors["lora_A"], torch.empty(8, 96)),
        (factors["lora_B"].T, torch.empty(300, 8)),
    ):
        torch.nn.init.kaiming_uniform_(weight, a=0, generator=drawn)
        assert abs(float(ours.abs().max() / weight.abs().max()) - 1) < 0.02
        assert abs(float(ours.std() / weight.std()) - 1) < 0.05
