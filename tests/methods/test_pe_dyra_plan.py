from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank_ds.ranking.plan import RankPlan, RankState
from tests.methods.small import pe_dyra

INITIAL = 2


def plan(
    scores: list[list[float]], max_ranks: list[int] | None = None, step: int = 7, **config: Any
) -> RankPlan:
    """The plan for these scores; module i has i + 2 inputs and 2 outputs, so a triple of it has i + 5 parameters."""
    limits = tuple(max_ranks or [9] * len(scores))
    sides = {str(i): (i + 2, 2) for i in range(len(scores))}
    state = RankState(tuple(map(len, scores)), limits, INITIAL, step, 20)
    return pe_dyra(sides, rank=INITIAL, **config).plan(
        [torch.tensor(s, dtype=torch.float64) for s in scores], state
    )


def test_the_lowest_go_and_the_modules_of_highest_mean_grow() -> None:
    # Means before: 4, 5, 10; the two lowest triples are module 0's 1 and module 1's 2.
    got = plan([[1, 7], [2, 8], [10]], k=2)
    assert got == RankPlan(keep=((1,), (1,), (0,)), new=(0, 1, 1))


def test_a_module_is_judged_by_its_survivors() -> None:
    # Before pruning module 1 is best (5.0 against 4.5); of the survivors, module 0's mean is 9.
    got = plan([[0, 9], [5, 5]], k=1)
    assert got == RankPlan(keep=((1,), (0, 1)), new=(1, 0))


def test_in_place_of_a_module_at_its_maximum_the_next_one_grows() -> None:
    got = plan([[1, 2], [9, 9], [5, 5]], k=1, max_ranks=[9, 2, 9])
    assert got == RankPlan(keep=((1,), (0, 1), (0, 1)), new=(0, 0, 1))


def test_nothing_happens_where_every_module_has_rank_one() -> None:
    assert plan([[1], [2], [3]], k=4) == RankPlan(keep=((0,), (0,), (0,)), new=(0, 0, 0))


def test_prune_only_adds_nothing_and_expand_only_removes_nothing() -> None:
    assert plan([[1, 7], [2, 8], [10]], k=2, moves="prune") == RankPlan(
        keep=((1,), (1,), (0,)), new=(0, 0, 0)
    )
    assert plan([[1, 7], [2, 8], [10]], k=2, moves="expand") == RankPlan(
        keep=((0, 1), (0, 1), (0,)), new=(0, 1, 1)
    )


def test_modules_can_be_judged_before_the_pruning() -> None:
    # The pair of test_a_module_is_judged_by_its_survivors: before it, module 1 is the better one.
    got = plan([[0, 9], [5, 5]], k=1, module_mean="before")
    assert got == RankPlan(keep=((1,), (0, 1)), new=(0, 1))


def test_conserving_parameters_fills_what_was_freed_and_never_more() -> None:
    # Triples cost 5, 6 and 7, the start had two of each: 36. After the two lowest are gone 2, 2 and 1 are left,
    # which is 29; of the 7 to give module 1, the best, takes 6.
    got = plan([[5, 5], [9, 9], [1, 1, 4]], k=2, conserve="parameters")
    assert got == RankPlan(keep=((0, 1), (0, 1), (2,)), new=(0, 1, 0))


@settings(max_examples=100, deadline=None)
@given(
    scores=st.lists(st.lists(st.floats(0, 9), min_size=INITIAL, max_size=INITIAL), min_size=1, max_size=6),
    k=st.integers(1, 9),
)
def test_parameters_are_never_above_those_of_the_start(scores: list[list[float]], k: int) -> None:
    got = plan(scores, k=k, conserve="parameters")
    costs = [i + 5 for i in range(len(scores))]
    budget = sum(INITIAL * c for c in costs)
    used = sum(c * r for c, r in zip(costs, got.ranks, strict=True))
    # Never above, and nothing more fits below.
    assert used <= budget < used + min(costs)


def test_k_auto_goes_to_the_allocation_that_minimises_the_theorems_sum() -> None:
    scores = [[1.0, 1.0, 1.0, 1.0], [8.0, 8.0, 8.0], [2.0, 1.0]]
    got = plan(scores, k="auto", k_max=99)
    squares = [sum(module) ** 2 for module in scores]
    every = [r for r in itertools.product(range(1, 8), repeat=3) if sum(r) == 9]
    best = min(every, key=lambda ranks: sum(g / r**2 for g, r in zip(squares, ranks, strict=True)))
    assert got.ranks == best
    # Theorem 3.1: in proportion to G^(2/3).
    shares = [square ** (1 / 3) for square in squares]
    for rank, share in zip(best, shares, strict=True):
        assert rank == pytest.approx(9 * share / sum(shares), abs=1)


def test_k_auto_moves_no_more_than_k_max_and_stops_by_itself() -> None:
    scores = [[1.0, 1.0, 1.0, 1.0], [8.0, 8.0, 8.0]]
    one = plan(scores, k="auto", k_max=1)
    assert one == RankPlan(keep=((1, 2, 3), (0, 1, 2)), new=(0, 1))
    settled = plan([[1.0], [8.0] * 4], k="auto")
    assert settled == RankPlan(keep=((0,), (0, 1, 2, 3)), new=(0, 0))


score = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1e6))
allocation = st.lists(
    st.tuples(st.lists(score, min_size=1, max_size=6), st.integers(0, 3)), min_size=1, max_size=7
)


@settings(max_examples=150, deadline=None)
@given(allocation=allocation, k=st.integers(1, 30))
def test_every_plan_keeps_the_total_rank_and_stays_within_its_limits(
    allocation: list[tuple[list[float], int]], k: int
) -> None:
    scores = [module for module, _ in allocation]
    limits = [len(module) + room for module, room in allocation]
    got = plan(scores, limits, k=k)
    before = [len(module) for module in scores]
    assert sum(got.ranks) == sum(before)
    assert all(1 <= rank <= limit for rank, limit in zip(got.ranks, limits, strict=True))
    assert all(list(kept) == sorted(set(kept)) and kept for kept in got.keep)
    assert sum(map(len, got.pruned(before))) == min(k, sum(before) - len(before))
    assert got == plan(scores, limits, step=11, k=k)
    # Whatever goes scores no higher than whatever stays, unless it is the last of its module.
    gone = [scores[b][i] for b, triples in enumerate(got.pruned(before)) for i in triples]
    stays = [scores[b][i] for b, kept in enumerate(got.keep) if len(kept) > 1 for i in kept]
    assert max(gone, default=0) <= min(stays, default=1e9)
