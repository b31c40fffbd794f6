"""The prediction of what dynamic rank adds on many GPUs: its arithmetic by hand, and that its parts are measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynrank_ds.bench.scale import TARGETS, Measured, predicted
from dynrank_ds.planning.plan import GIB, Cluster, Plan, make_plan
from dynrank_ds.planning.speed import HARDWARE
from dynrank_ds.recipe import load_recipe
from tests.support.launch import quick_benchmark
from tests.support.recipes import write_recipe


def plan_of(recipe: str, nodes: int) -> Plan:
    return make_plan(load_recipe(recipe), Cluster(nodes, 8, 80 * GIB, HARDWARE["h100"]))


@pytest.mark.parametrize(
    ("target", "modules", "rate"),
    # Received by a GPU: NVLink's 450 GB/s; 8 cards of 50 GB/s between nodes.
    [(TARGETS[0], 224, 450e9), (TARGETS[1], 560, 400e9)],
    ids=["7B", "70B"],
)
def test_what_is_added_is_the_sum_of_its_parts(
    target: tuple[str, str, int], modules: int, rate: float
) -> None:
    name, recipe, nodes = target
    plan = plan_of(recipe, nodes)
    step, adjustment, added = predicted(name, plan, Measured(share=0.02, rebuild=0.005))
    assert step.values is not None and adjustment.values is not None and added.values is not None
    arithmetic, traffic = step.values["arithmetic"], step.values["traffic"]
    assert (arithmetic, traffic) == (plan.time.arithmetic, plan.time.traffic)
    assert step.values["gpus"] == 8 * nodes
    assert adjustment.values["modules"] == modules
    parts = adjustment.values["seconds"]
    assert parts["rebuild"] == pytest.approx(0.005 * modules)
    assert parts["traffic"] == pytest.approx(plan.traffic.adjustment / (0.7 * rate))
    assert parts["the step after it"] == pytest.approx(min(arithmetic, traffic))
    shorter = max(arithmetic, traffic)
    assert added.values["in_each_step"] == pytest.approx(0.02 * arithmetic / shorter)
    assert added.values["by_adjustments"] == pytest.approx(sum(parts.values()) / 100 / shorter)


def test_nothing_is_added_where_nothing_was_measured_but_traffic() -> None:
    name, recipe, nodes = TARGETS[0]
    *_, added = predicted(name, plan_of(recipe, nodes), Measured(share=0.0, rebuild=0.0))
    assert added.values is not None and added.values["in_each_step"] == 0 < added.values["by_adjustments"]


@pytest.mark.slow
def test_the_quick_run_measures_both_parts_and_predicts_both_sizes(tmp_path: Path) -> None:
    printed = quick_benchmark("scale", write_recipe(tmp_path))
    for row in ("measured: adjustment by modules", "measured: the method by a layer 1024 wide"):
        assert row in printed
    for name, *_ in TARGETS:
        for row in ("planned: step of", "predicted: an adjustment of", "predicted: added to"):
            assert f"{row} {name}" in printed
