from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dynrank_ds.adapters.linear import AdaptedLinear
from dynrank_ds.errors import RecipeError
from dynrank_ds.methods.elalora import ElaLoRA, ElaLoRAConfig, orthogonal_rows
from dynrank_ds.ranking.plan import RankPlan, RankState
from tests.methods.small import CPU, make_modules


def elalora(total_steps: int = 30, rank: int = 4, **config: Any) -> ElaLoRA:
    times = {"t_i": 4, "interval": 3, "t_f": 6, **config}
    return ElaLoRA(ElaLoRAConfig(**times), make_modules(rank=rank), total_steps, CPU)


def adjustments(total_steps: int = 30, **config: Any) -> list[int]:
    method = elalora(total_steps, **config)
    steps = [step for step in range(1, total_steps + 1) if method.adjusts_at(step)]
    assert method.planned_adjustments() == len(steps)
    return steps


def plan(scores: list[list[float]], b: int, k: int, max_ranks: list[int] | None = None) -> RankPlan:
    ranks = tuple(map(len, scores))
    state = RankState(ranks, tuple(max_ranks or [9] * len(scores)), 4, 7, 30)
    method = elalora(b=b, k=k, schedule="constant")
    return method.plan([torch.tensor(s, dtype=torch.float64) for s in scores], state)


def test_the_number_of_reallocated_triples_falls_with_the_cube_of_the_phase() -> None:
    method = elalora(b=8)  # p = (t - 4) / 20 at 7, 10, ..., 22
    # 8 (1 - p^3) = 7.973, 7.784, 7.271, 6.272, 4.625, 2.168
    assert [method.config.reallocated(step, method.schedule) for step in range(7, 24, 3)] == [
        8,
        8,
        7,
        6,
        5,
        2,
    ]
    assert adjustments(b=8) == [7, 10, 13, 16, 19, 22]
    assert adjustments(b=1) == [7, 10, 13, 16, 19]  # 0.271 rounds to nothing at 22
    assert adjustments(b=1, schedule="constant") == [7, 10, 13, 16, 19, 22]


def test_a_half_goes_to_the_even_number() -> None:
    method = elalora(total_steps=14, t_i=4, t_f=0, b=4)  # p = 1/2 at step 9: 4 * 7/8 = 3.5
    assert method.config.reallocated(9, method.schedule) == 4
    method = elalora(total_steps=14, t_i=4, t_f=0, b=12)  # 12 * 7/8 = 10.5
    assert method.config.reallocated(9, method.schedule) == 10


def test_the_lowest_go_and_the_modules_of_the_highest_candidates_grow() -> None:
    # k = 1: one candidate a module, its lowest. 1 and 2 go, 8 and 7 are the highest.
    got = plan([[1, 20], [8, 9], [30, 7], [2, 3]], b=2, k=1)
    assert got == RankPlan(keep=((1,), (0, 1), (0, 1), (1,)), new=(0, 1, 1, 0))


def test_a_module_loses_or_gains_up_to_k() -> None:
    got = plan([[1, 2, 3, 9], [5, 8, 7, 9]], b=2, k=2)
    assert got == RankPlan(keep=((2, 3), (0, 1, 2, 3)), new=(0, 2))
    # k = 1: neither may go twice.
    assert plan([[1, 2, 3, 9], [5, 8, 7, 9]], b=2, k=1) == RankPlan(((1, 2, 3), (0, 1, 2, 3)), (0, 1))


def test_no_triple_is_on_both_sides() -> None:
    # Three candidates: b = 3 would prune and expand the same ones; 1 can go and 1 of the other two grow.
    got = plan([[1, 9], [2, 9], [3, 9]], b=3, k=1)
    assert got == RankPlan(keep=((1,), (0, 1), (0, 1)), new=(0, 0, 1))
    assert plan([[1, 9], [2, 9], [3, 9], [4, 9]], b=3, k=1).new == (0, 0, 1, 1)


def test_a_module_of_rank_one_never_shrinks_but_may_grow() -> None:
    got = plan([[50], [1, 2], [3, 4]], b=1, k=2)
    assert got == RankPlan(keep=((0,), (1,), (0, 1)), new=(1, 0, 0))
    assert plan([[1], [2], [3]], b=2, k=2) == RankPlan(((0,), (0,), (0,)), (0, 0, 0))


def test_a_full_module_leaves_its_turn_to_the_next() -> None:
    assert plan([[1, 2], [8, 9], [5, 6]], b=1, k=1, max_ranks=[9, 2, 9]).new == (0, 0, 1)
    # Nobody has room: nothing goes either, for the total rank stays.
    assert plan([[1, 2], [8, 9], [5, 6]], b=1, k=1, max_ranks=[2, 2, 2]).ranks == (2, 2, 2)


def test_equal_scores_move_exactly_as_many_as_asked_lower_module_and_triple_first() -> None:
    got = plan([[0.0] * 3] * 3, b=2, k=1)
    assert got == RankPlan(keep=((1, 2), (0, 1, 2), (0, 1, 2)), new=(0, 1, 0))
    got = plan([[0.0] * 3] * 4, b=2, k=1)
    assert got == RankPlan(keep=((1, 2), (1, 2), (0, 1, 2), (0, 1, 2)), new=(0, 0, 1, 1))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"interval": 0}, r"method.interval is 0, 0 of the 30 steps: give at least 1"),
        ({"interval": 40}, r"method.t_i 4 \+ method.interval 40 leaves no adjustment before step 24"),
        ({"t_i": 15, "t_f": 15}, r"leaves no adjustment before step 15"),
        ({"b": 1, "interval": 18}, r"leaves no adjustment before step 24"),  # 1 - 0.9^3 rounds to nothing
        (
            {"rank": 1},
            r"adapter.rank is 1: elalora leaves every module one triple, so that none could be pruned",
        ),
    ],
)
def test_what_would_do_nothing_is_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        elalora(**config)


score = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1e6))
allocations = st.lists(
    st.tuples(st.lists(score, min_size=1, max_size=5), st.integers(0, 2)), min_size=1, max_size=6
)


def lowest(module: list[float], count: int) -> list[int]:
    return sorted(range(len(module)), key=lambda i: (module[i], i))[:count]


@settings(max_examples=150, deadline=None)
@given(allocation=allocations, b=st.integers(1, 12), k=st.integers(1, 6))
def test_every_plan_keeps_the_total_rank_and_stays_within_its_limits(
    allocation: list[tuple[list[float], int]], b: int, k: int
) -> None:
    scores = [module for module, _ in allocation]
    limits = [len(module) + room for module, room in allocation]
    before = [len(module) for module in scores]
    got = plan(scores, b, k, limits)
    pruned = got.pruned(before)
    assert sum(got.ranks) == sum(before)
    assert sum(got.new) == sum(map(len, pruned)) <= b
    assert all(1 <= rank <= limit for rank, limit in zip(got.ranks, limits, strict=True))
    for module, gone, new in zip(scores, pruned, got.new, strict=True):
        assert set(gone) <= set(lowest(module, min(k, len(module) - 1)))
        assert new <= len(set(lowest(module, k)) - set(gone))


@settings(max_examples=150, deadline=None)
@given(allocation=allocations, b=st.integers(1, 12), k=st.integers(1, 6))
def test_every_plan_moves_the_right_triples_and_as_many_as_it_can(
    allocation: list[tuple[list[float], int]], b: int, k: int
) -> None:
    scores = [module for module, _ in allocation]
    limits = [len(module) + room for module, room in allocation]
    got = plan(scores, b, k, limits)
    pruned = got.pruned([len(module) for module in scores])
    order = sorted((s[i], m, i) for m, s in enumerate(scores) for i in lowest(s, min(k, len(s) - 1)))
    assert sorted((m, i) for _, m, i in order[: sum(got.new)]) == [
        (m, i) for m, gone in enumerate(pruned) for i in gone
    ]
    for more in range(sum(got.new) + 1, min(b, len(order)) + 1):
        gone = [{i for _, m, i in order[:more] if m == module} for module in range(len(scores))]
        places = [
            min(len(set(lowest(s, k)) - g), limit - len(s) + len(g))
            for s, g, limit in zip(scores, gone, limits, strict=True)
        ]
        assert sum(places) < more
    # Of the candidates that stay, those that brought a new triple score no lower than those that did not.
    brought, passed = [], []
    for module, gone, new, rank, limit in zip(scores, pruned, got.new, got.ranks, limits, strict=True):
        stay = sorted(module[i] for i in lowest(module, k) if i not in gone)
        brought += stay[len(stay) - new :]
        passed += stay[: len(stay) - new] if rank < limit else []
    assert not brought or min(brought) >= max(passed, default=0)


@pytest.mark.parametrize(("rank", "count", "length"), [(0, 2, 5), (3, 2, 40), (3, 2, 5), (1, 1, 2)])
@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
def test_new_rows_are_orthonormal_and_orthogonal_to_those_that_stay(
    rank: int, count: int, length: int, scale: float
) -> None:
    torch.manual_seed(0)
    old = torch.randn(rank, length) * scale
    new = orthogonal_rows(old, count, torch.Generator().manual_seed(1))
    assert new.dtype == torch.float32
    torch.testing.assert_close(new @ new.T, torch.eye(count), rtol=0, atol=1e-6)
    assert (new @ old.T).abs().max().item() <= 1e-5 * scale if rank else True


def test_new_rows_are_the_drawn_vectors_less_their_projection() -> None:
    old = torch.randn(3, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    drawn = torch.randn(2, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, seen = [], old
    for v in drawn:
        v = v - torch.linalg.lstsq(seen.T, v[:, None]).solution[:, 0] @ seen
        expected.append(v / v.norm())
        seen = torch.cat([seen, expected[-1][None]])
    ours = orthogonal_rows(old.float(), 2, torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours.double(), torch.stack(expected), rtol=0, atol=1e-6)


def test_new_rows_look_at_the_survivors_alone_and_leave_the_function_as_it_is() -> None:
    torch.manual_seed(0)
    method = elalora()
    old = {"lora_A": torch.randn(3, 7), "lora_E": torch.randn(3), "lora_B": torch.randn(3, 5)}
    change = RankPlan(keep=((0, 2), (), ()), new=(2, 0, 0))
    rows = method.new_rows(0, old, change, torch.Generator().manual_seed(0))
    for factor in ("lora_A", "lora_B"):
        assert (rows[factor] @ old[factor][[0, 2]].T).abs().max() < 1e-5
        assert (rows[factor] @ old[factor][1]).abs().max() > 1e-2
    assert torch.equal(rows["lora_E"], torch.zeros(2))
    module = AdaptedLinear(nn.Linear(7, 5), 1.0)
    kept = {f: v[[0, 2]] for f, v in old.items()}
    x = torch.randn(4, 7)
    module.set_factors(kept)
    before = module(x)
    module.set_factors({f: torch.cat([kept[f], rows[f]]) for f in kept})
    torch.testing.assert_close(module(x), before, rtol=0, atol=1e-6)
