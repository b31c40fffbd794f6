from __future__ import annotations

import itertools

import pytest
import torch

from dynrank_ds.ranking.allocation import ranks_by_component, ranks_by_score
from dynrank_ds.ranking.spectrum import InputSketch


def objective(scores: list[float], ranks: tuple[int, ...]) -> float:
    return sum((score / rank) ** 2 for score, rank in zip(scores, ranks, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_ranks_by_score_are_the_best_of_all_allocations(seed: int) -> None:
    drawn = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(10).tolist()
    limits, budget = [3, 9, 9, 5], 14
    found = ranks_by_score(drawn, [1] * 4, limits, budget)
    allowed = [r for r in itertools.product(*(range(1, limit + 1) for limit in limits)) if sum(r) <= budget]
    assert sum(found) == budget
    assert objective(drawn, tuple(found)) == pytest.approx(min(objective(drawn, ranks) for ranks in allowed))


def test_ranks_follow_the_two_thirds_power_of_scores_and_the_cost_of_triples() -> None:
    found = ranks_by_score([1.0, 8.0, 27.0], [1, 1, 1], [10**6] * 3, 14000)
    assert found == pytest.approx([1000, 4000, 9000], abs=1)
    found = ranks_by_score([1.0, 1.0], [1, 8], [10**6] * 2, 10000)
    assert found[0] / found[1] == pytest.approx(2, rel=1e-2) and found[0] + 8 * found[1] <= 10000


def test_components_are_taken_by_their_share_whatever_their_module() -> None:
    shares = [[0.5, 0.4, 0.05], [0.9, 0.01, 0.005], [0.3, 0.2, 0.19]]
    assert ranks_by_component(shares, [1, 1, 1], [3, 3, 3], 6) == [2, 1, 3]
    assert ranks_by_component(shares, [1, 1, 1], [3, 3, 2], 6) == [3, 1, 2]
    assert ranks_by_component(shares, [4, 1, 1], [3, 3, 3], 9) == [1, 2, 3]


def test_a_budget_below_rank_one_everywhere_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 1 in each of 3 modules takes 12, more than 11"):
        ranks_by_score([1.0, 1.0, 1.0], [4, 4, 4], [9, 9, 9], 11)


@pytest.mark.parametrize("rank", [20, 5])
def test_a_sketch_in_pieces_has_the_components_of_the_centred_inputs(rank: int) -> None:
    draw = torch.Generator().manual_seed(0)
    basis = torch.randn(rank, 40, generator=draw) * 0.6 ** torch.arange(rank)[:, None]
    x = torch.randn(300, rank, generator=draw) @ basis + 3 * torch.randn(40, generator=draw)
    mask = torch.rand(300, generator=draw) > 0.2
    sketches = [InputSketch(40, 14, 7, torch.device("cpu")) for _ in range(2)]
    for piece, piece_mask, sketch in zip(x.split(150), mask.split(150), sketches, strict=True):
        sketch.add(piece, piece_mask[None])
    sketches[0].sums += sketches[1].sums
    kept = x[mask].double()
    values = torch.linalg.svdvals(kept - kept.mean(0)).square()
    found = sketches[0].explained(int(mask.sum()))
    shared = min(6, rank)
    assert found[:shared] == pytest.approx((values / values.sum())[:shared], rel=0.02)
    assert len(found) >= shared and float(found[shared:].sum()) < 0.1
    assert float(found.sum()) <= 1 + 1e-6
