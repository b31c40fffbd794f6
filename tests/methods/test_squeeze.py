"""Squeeze against the SVD of whole updates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dynrank_ds.adapters.linear import ModuleBackward
from dynrank_ds.errors import RecipeError
from dynrank_ds.methods.base import MicroBatch
from dynrank_ds.methods.squeeze import Squeeze, SqueezeConfig
from dynrank_ds.ranking.layout import ShardLayout, whole
from dynrank_ds.ranking.plan import RankPlan, RankState
from tests.methods.small import CPU, SIDES, make_modules, step_view

RANK, SCALE = 4, 2.0


def squeeze(**config: object) -> Squeeze:
    """Over 20 steps: truncations after 6, 10 and 14, from 12 triples to 10, 8 and 6 (target 2 in 3 modules)."""
    values = {"t_i": 2, "interval": 4, "t_f": 6, "target_rank": 2, **config}
    return Squeeze(SqueezeConfig(**values), make_modules(rank=RANK), 20, CPU)


def drawn_factors(seed: int, ranks: tuple[int, ...] = (RANK,) * 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "lora_A": torch.randn(rank, n_in, generator=generator),
            "lora_B": torch.randn(rank, n_out, generator=generator),
        }
        for rank, (n_in, n_out) in zip(ranks, SIDES.values(), strict=True)
    ]


def update(factors: dict[str, Tensor]) -> Tensor:
    return SCALE * factors["lora_B"].double().T @ factors["lora_A"].double()


def scores_of(
    method: Squeeze, factors: list[dict[str, Tensor]], step: int = 6, processes: int = 1
) -> list[Tensor]:
    ranks = [len(one["lora_A"]) for one in factors]
    for module, one in enumerate(factors):
        nothing = torch.zeros(1)
        a, b = one["lora_A"], one["lora_B"]
        backward = ModuleBackward(nothing, nothing, SCALE, a, b, None, nothing, nothing, None)
        if len(a):
            method.on_backward(module, backward, MicroBatch(step=step))
    layout = ShardLayout(method.shapes, ranks, method.factors, whole)
    empty = torch.empty(0)
    return list(method.scores(step_view(empty, empty, layout, lambda tensor: tensor.mul_(processes), step)))


def state(ranks: tuple[int, ...], step: int) -> RankState:
    return RankState(ranks, (8,) * len(ranks), RANK, step, 20)


def test_scores_are_the_singular_values_of_the_updates() -> None:
    factors = drawn_factors(0)
    for one, scores in zip(factors, scores_of(squeeze(), factors, processes=3), strict=True):
        expected = torch.linalg.svdvals(update(one))[:RANK]
        torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)


def test_a_module_without_triples_has_no_scores() -> None:
    factors = drawn_factors(0, (4, 0, 2))
    assert [len(scores) for scores in scores_of(squeeze(), factors)] == [4, 0, 2]


def test_a_linear_narrower_than_the_rank_has_singular_values_of_0() -> None:
    wide = [{"lora_A": torch.ones(9, 7), "lora_B": torch.ones(9, 5)}, *drawn_factors(0)[1:]]
    scores = scores_of(squeeze(), wide)[0]
    assert len(scores) == 9 and scores[0] == pytest.approx(SCALE * 9 * math.sqrt(35))
    assert float(scores[5:].abs().max()) == 0


def test_total_rank_falls_linearly_to_the_target_and_the_smallest_singular_values_go() -> None:
    method, factors = squeeze(), drawn_factors(1)
    assert [step for step in range(1, 21) if method.adjusts_at(step)] == [6, 10, 14]
    assert [method.budget(step) for step in (6, 10, 14)] == [10, 8, 6]
    scores = scores_of(method, factors)
    plan = method.plan(scores, state((4, 4, 4), 6))
    together = torch.cat(scores).sort(descending=True).values
    threshold = float(together[9])
    assert plan.ranks == tuple(int((one >= threshold).sum()) for one in scores) and sum(plan.ranks) == 10
    for kept, added, rank in zip(plan.keep, plan.new, plan.ranks, strict=True):
        assert (len(kept), added) == ((4, 0) if rank == 4 else (0, rank))


def test_a_truncated_module_is_the_best_approximation_of_its_update() -> None:
    """Eckart and Young: the error is the norm of the singular values that went."""
    one = drawn_factors(2)[0]
    plan = RankPlan(((), (0, 1, 2, 3), (0, 1, 2, 3)), (2, 0, 0))
    rows = squeeze().new_rows(0, one, plan, torch.Generator())
    singular = torch.linalg.svdvals(update(one))
    error = torch.linalg.norm(update(rows) - update(one))
    torch.testing.assert_close(error, singular[2:].norm(), rtol=1e-6, atol=0)
    assert rows["lora_A"].shape == (2, 7) and rows["lora_B"].shape == (2, 5)
    # Rows of A are as long as LoRA's at the start, so that small singular values train on.
    generator = torch.Generator().manual_seed(0)
    at_the_start = Squeeze.init(1000, 7, 5, generator)["lora_A"].square().sum(1).mean().sqrt()
    torch.testing.assert_close(rows["lora_A"].norm(dim=1), torch.full((2,), 3**-0.5))
    assert float(at_the_start) == pytest.approx(3**-0.5, rel=0.02)


def test_a_module_that_loses_only_zeros_keeps_its_function() -> None:
    one = drawn_factors(3)[1]
    one["lora_B"][2:] = 0
    plan = RankPlan((tuple(range(4)), (), tuple(range(4))), (0, 2, 0))
    rows = squeeze().new_rows(1, one, plan, torch.Generator())
    torch.testing.assert_close(update(rows), update(one), rtol=1e-5, atol=1e-6)


def test_rows_that_no_singular_value_is_left_for_begin_as_at_the_start() -> None:
    narrow = {"lora_A": torch.randn(9, 7), "lora_B": torch.randn(9, 5)}
    plan = RankPlan(((), (0, 1, 2, 3), (0, 1, 2, 3)), (8, 0, 0))
    rows = squeeze().new_rows(0, narrow, plan, torch.Generator().manual_seed(0))
    assert rows["lora_A"].shape == (8, 7) and rows["lora_B"].shape == (8, 5)
    torch.testing.assert_close(update(rows), update(narrow), rtol=1e-5, atol=1e-5)
    assert float(rows["lora_B"][5:].abs().max()) == 0 < float(rows["lora_A"][5:].abs().min())


def test_nothing_is_truncated_while_every_update_is_still_0() -> None:
    method = squeeze(t_i=0, interval=1, t_f=17)
    assert [step for step in range(1, 21) if method.adjusts_at(step)] == [2, 3]


def test_a_target_above_the_rank_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"method.target_rank 5 is not below adapter.rank 4"):
        squeeze(target_rank=5)


def test_a_target_of_the_initial_rank_truncates_nothing() -> None:
    method = squeeze(target_rank=4)
    assert method.planned_adjustments() == 0 and not any(map(method.adjusts_at, range(1, 21)))


def test_the_default_target_is_a_quarter_of_the_rank() -> None:
    assert SqueezeConfig().final_mean_rank(16) == 4 and SqueezeConfig().final_mean_rank(3) == 1
