"""What holds for the plans of every method, whatever the scores."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from dynrank_ds.methods import AnyMethodConfig, build_method
from dynrank_ds.methods.base import Method
from dynrank_ds.ranking.plan import RankPlan, RankState
from tests.methods.small import CPU, Sides, make_modules
from tests.support.methods import METHODS

RANK, LIMIT, STEPS = 4, 5, 20
SIDES = {"a": (7, 9), "b": (12, 8), "c": (8, 8), "d": (20, 7), "e": (9, 16), "f": (8, 10)}
MINIMUM = {"adalora": 0, "dynamic_dora": 0, "weightlora": 0, "weightlora_plus": 0, "squeeze": 0}
KEEP_THE_TOTAL = ("pe_dyra", "pe_dyra_auto", "elalora")


def made(name: str, order: Sequence[str]) -> Method:
    sides: Sides = {module: SIDES[module] for module in order}
    config = TypeAdapter(AnyMethodConfig).validate_python(METHODS[name])
    return build_method(config, make_modules(sides, rank=RANK), STEPS, CPU)


def by_module(plan: RankPlan, order: Sequence[str]) -> dict[str, tuple[object, ...]]:
    masked = plan.masked or ((),) * len(order)
    return dict(zip(order, zip(plan.keep, plan.new, masked, strict=True), strict=True))


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), order=st.permutations(list(SIDES)), data=st.data())
def test_plans_are_pure_within_their_limits_and_the_same_in_any_order_of_modules(
    name: str, seed: int, order: list[str], data: st.DataObject
) -> None:
    method = made(name, list(SIDES))
    step = data.draw(st.sampled_from([s for s in range(1, STEPS + 1) if method.adjusts_at(s)]))
    ranks = {module: data.draw(st.integers(2, LIMIT)) for module in SIDES}
    # Scores of most different sizes, as sensitivities are.
    generator = torch.Generator().manual_seed(seed)
    scores = {
        module: torch.randn(rank, generator=generator).double().mul_(2).exp_()
        for module, rank in ranks.items()
    }

    def planned(method: Method, modules: Sequence[str]) -> RankPlan:
        now = tuple(ranks[module] for module in modules)
        state = RankState(now, (LIMIT,) * len(now), RANK, step, STEPS)
        return method.plan([scores[module] for module in modules], state)

    plan = planned(method, list(SIDES))
    assert planned(method, list(SIDES)) == plan
    assert all(MINIMUM.get(name, 1) <= rank <= LIMIT for rank in plan.ranks)
    assert name not in KEEP_THE_TOTAL or sum(plan.ranks) == sum(ranks.values())
    assert by_module(planned(made(name, order), order), order) == by_module(plan, list(SIDES))
