from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank_ds.ranking.plan import RankPlan, RankState
from tests.methods.small import pe_dyra


def plan(scores: list[list[float]], k: int, max_ranks: list[int] | None = None, step: int = 7) -> RankPlan:
    limits = tuple(max_ranks or [9] * len(scores))
    state = RankState(tuple(map(len, scores)), limits, step, 20)
    return pe_dyra(k=k).plan([torch.tensor(s, dtype=torch.float64) for s in scores], state)


def test_the_lowest_go_and_the_blocks_of_highest_mean_grow() -> None:
    # Means before: 4, 5, 10; the two lowest triples are block 0's 1 and block 1's 2.
    got = plan([[1, 7], [2, 8], [10]], k=2)
    assert got == RankPlan(keep=((1,), (1,), (0,)), new=(0, 1, 1))


def test_a_block_is_judged_by_its_survivors() -> None:
    # Before pruning block 1 is best (5.0 against 4.5); of the survivors, block 0's mean is 9.
    got = plan([[0, 9], [5, 5]], k=1)
    assert got == RankPlan(keep=((1,), (0, 1)), new=(1, 0))


def test_a_block_at_its_maximum_passes_its_turn_to_the_next() -> None:
    got = plan([[1, 2], [9, 9], [5, 5]], k=1, max_ranks=[9, 2, 9])
    assert got == RankPlan(keep=((1,), (0, 1), (0, 1)), new=(0, 0, 1))


def test_nothing_happens_where_every_block_has_rank_one() -> None:
    assert plan([[1], [2], [3]], k=4) == RankPlan(keep=((0,), (0,), (0,)), new=(0, 0, 0))


score = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1e6))
allocation = st.lists(
    st.tuples(st.lists(score, min_size=1, max_size=6), st.integers(0, 3)), min_size=1, max_size=7
)


@settings(max_examples=150, deadline=None)
@given(allocation=allocation, k=st.integers(1, 30))
def test_every_plan_keeps_the_total_rank_and_stays_within_its_limits(
    allocation: list[tuple[list[float], int]], k: int
) -> None:
    scores = [block for block, _ in allocation]
    limits = [len(block) + room for block, room in allocation]
    got = plan(scores, k, limits)
    before = [len(block) for block in scores]
    assert sum(got.ranks) == sum(before)
    assert all(1 <= rank <= limit for rank, limit in zip(got.ranks, limits, strict=True))
    assert all(list(kept) == sorted(set(kept)) and kept for kept in got.keep)
    assert sum(map(len, got.pruned(before))) == min(k, sum(before) - len(before))
    assert got == plan(scores, k, limits, step=11)
    # Whatever goes scores no higher than whatever stays, unless it is the last of its block.
    gone = [scores[b][i] for b, triples in enumerate(got.pruned(before)) for i in triples]
    stays = [scores[b][i] for b, kept in enumerate(got.keep) if len(kept) > 1 for i in kept]
    assert max(gone, default=0) <= min(stays, default=1e9)
