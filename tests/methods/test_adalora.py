from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank_ds.errors import RecipeError
from dynrank_ds.methods.adalora import AdaLoRA, AdaLoRAConfig
from dynrank_ds.ranking.layout import ShardLayout, whole
from dynrank_ds.ranking.plan import RankPlan, RankState
from tests.methods.small import CPU, make_modules, step_view


def adalora(total_steps: int = 30, rank: int = 6, **config: Any) -> AdaLoRA:
    times = {"t_i": 4, "interval": 3, "t_f": 8, "target_rank": 2, **config}
    return AdaLoRA(AdaLoRAConfig(**times), make_modules(rank=rank), total_steps, CPU)


def adjustments(**config: Any) -> list[int]:
    method = adalora(**config)
    steps = [step for step in range(1, 31) if method.adjusts_at(step)]
    assert method.planned_adjustments() == len(steps)
    return steps


def plan(method: AdaLoRA, scores: list[list[float]], step: int) -> RankPlan:
    ranks = tuple(map(len, scores))
    state = RankState(ranks, (9,) * len(ranks), ranks[0], step, 30)
    return method.plan([torch.tensor(s, dtype=torch.float64) for s in scores], state)


def test_masks_fall_on_multiples_of_the_interval_and_once_more_at_the_end() -> None:
    # global_step (ours less one) 6, 9, ..., 21 between 4 and 22, and 22, the first that is not below T - t_f.
    assert adjustments() == [7, 10, 13, 16, 19, 22, 23]
    assert adjustments(t_f=9) == [7, 10, 13, 16, 19, 22]  # 21 is both: one mask, the final one
    assert adjustments(t_i=6) == [10, 13, 16, 19, 22, 23]  # masks need global_step > t_i
    assert adjustments(t_i=0, interval=12, t_f=1) == [13, 25, 30]
    assert adjustments(t_i=0.2, interval=0.1, t_f=0.3) == [10, 13, 16, 19, 22]


def test_the_budget_falls_as_the_cube_of_what_is_left_of_the_schedule() -> None:
    method = adalora()  # 18 triples to 6, from global_step 4 to 22
    # m = 16/18, 13/18, 10/18, 7/18, 4/18, 1/18, 0: 12 m^3 = 8.43, 4.52, 2.06, 0.71, 0.13, 0.00, 0
    assert [method.budget(step, 18) for step in adjustments()] == [14, 10, 8, 6, 6, 6, 6]


def test_masks_leave_every_triple_in_place_until_the_final_one_removes_them() -> None:
    scores = [[5, 0, 4, 3, 2, 1.0], [9, 9, 9, 9, 9, 9], [0.5, 7, 7, 7, 7, 7]]
    soft = plan(adalora(), scores, step=7)
    assert soft == RankPlan((tuple(range(6)),) * 3, (0, 0, 0), masked=((1, 4, 5), (), (0,)))
    # 6 of 18 stay; the nines all do, although nothing keeps the other modules above rank 0.
    assert plan(adalora(), scores, step=23) == RankPlan(((), tuple(range(6)), ()), (0, 0, 0))


def test_equal_scores_lose_as_many_as_asked_lower_module_and_triple_first() -> None:
    got = plan(adalora(), [[0.0] * 6] * 3, step=10)
    assert got.masked == (tuple(range(6)), (0, 1), ())


def test_the_target_is_two_thirds_of_the_initial_rank_unless_given() -> None:
    assert adalora(target_rank=None).target_total == 4 * 3
    assert adalora(target_rank=None, rank=2).target_total == 1 * 3


def test_a_target_of_the_initial_rank_means_no_pruning() -> None:
    method = adalora(target_rank=6)
    assert method.planned_adjustments() == 0
    assert not any(map(method.adjusts_at, range(1, 31)))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"target_rank": 7}, r"method.target_rank 7 is not below adapter.rank 6: nothing would be pruned"),
        ({"target_rank": None, "rank": 1}, r"method.target_rank 1 is not below adapter.rank 1"),
        ({"t_f": 0}, r"method.t_f is 0, 0 of the 30 steps: give at least 1"),
        ({"interval": 0}, r"method.interval is 0, 0 of the 30 steps: give at least 1"),
        (
            {"interval": 40},
            r"method.t_i 4 \+ method.interval 40 leaves no adjustment before step 22",
        ),
        ({"t_i": 22}, r"method.t_i 22 \+ method.interval 3 leaves no adjustment"),
        ({"t_i": 29, "t_f": 29}, r"method.t_i 29 \+ method.interval 3 leaves no adjustment"),
    ],
)
def test_what_would_do_nothing_is_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        adalora(**config)


def test_statistics_are_those_before_the_step_of_the_final_mask() -> None:
    method = adalora()
    layout = ShardLayout(method.shapes, (6, 6, 6), method.factors, whole)
    method.start(layout)
    torch.manual_seed(0)
    for step in range(1, 31):
        before = method.sensitivity.smoothed.clone()
        method.observe(step_view(torch.randn(layout.numel), torch.randn(layout.numel), layout, step=step))
        assert torch.equal(before, method.sensitivity.smoothed) == (step >= 23), step


METHOD = adalora()
ADJUSTMENTS = adjustments()
score = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1e6))


@settings(max_examples=150, deadline=None)
@given(scores=st.lists(st.lists(score, min_size=6, max_size=6), min_size=3, max_size=3), data=st.data())
def test_every_plan_leaves_exactly_its_budget(scores: list[list[float]], data: st.DataObject) -> None:
    step = data.draw(st.sampled_from(ADJUSTMENTS))
    got = plan(METHOD, scores, step)
    gone = got.pruned([6] * 3) if step == 23 else [list(module) for module in got.masked]
    assert sum(map(len, gone)) == 18 - METHOD.budget(step, 18)
    assert got.new == (0, 0, 0)
    assert sum(got.ranks) == (6 if step == 23 else 18)
    low = [scores[b][i] for b, triples in enumerate(gone) for i in triples]
    high = [scores[b][i] for b in range(3) for i in range(6) if i not in gone[b]]
    assert max(low) <= min(high)
