"""What rank changes cost in collectives: a few small ones at an adjustment, none between adjustments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.launch import outcomes, run_worker
from tests.support.recipes import lines, write_recipe
from tests.support.tiny import write_model

SCALARS = {
    name: ["all_reduce", 8 * (3 + factors)] for name, factors in (("pe_dyra", 3), ("deep", 3), ("lora", 2))
}
"""Loss, stop request, penalty, and the squared gradient norm of each factor."""
PLAN_CHECK = ["all_gather_into_tensor", 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes' runs of PE-DyRA, also with a held-out loss after its adjustment, and LoRA on 14 linears, and of
    PE-DyRA on 35 that all change at once."""
    folder = tmp_path_factory.mktemp("collectives")
    for name in ("pe_dyra", "held_out", "lora", "deep", "deep_zero2"):
        (folder / name).mkdir()
        write_recipe(folder / name)
    for name in ("deep", "deep_zero2"):
        write_model(folder / name / "model", layers=5)
    path = folder / "lora" / "recipe.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"method": {"name": "lora"}}))
    run_worker(2, "collectives", folder)
    return folder


def steps(folder: Path, name: str) -> list[dict[str, Any]]:
    first, second = outcomes(folder / name / "run", "collectives", 2)
    assert first == second  # every process issues the same ones
    return first


@pytest.mark.parametrize("name", ["pe_dyra", "lora", "deep"])
def test_a_step_without_adjustment_adds_one_reduction_of_scalars(folder: Path, name: str) -> None:
    plain = [step for step in steps(folder, name) if not step["adjusts"]]
    assert plain and all(step["ours"] == [SCALARS[name]] for step in plain)


@pytest.mark.parametrize("name", ["pe_dyra", "deep"])
def test_an_adjustment_adds_two_reductions_a_plan_check_and_one_that_gathers(folder: Path, name: str) -> None:
    adjustments = [step for step in steps(folder, name) if step["adjusts"]]
    logged = lines(folder / name / "run" / "ranks.jsonl")
    for step, line in zip(adjustments, logged, strict=True):
        changed = bool(line["pruned"] or line["added"])
        scalars, first, second, check, *gathers = step["ours"]
        assert scalars == SCALARS[name] and check == PLAN_CHECK
        assert first[0] == second[0] == "all_reduce"
        assert len(gathers) == changed  # of all modules together: they are small
        assert all(kind == "all_reduce" for kind, _ in gathers)


@pytest.mark.parametrize("name", ["deep", "deep_zero2"])
def test_a_rank_change_sends_the_rows_of_all_modules_at_once_and_nothing_of_the_base(
    folder: Path, name: str
) -> None:
    """All 35 modules change, and DeepSpeed builds its engine anew, without formatting its parameters for a message."""
    [adjustment] = [step["adjustment"] for step in steps(folder, name) if step["rank_changes"]]
    sent = {kind: count for kind, count in adjustment.items() if count and kind != "barrier"}
    assert sent == {"all_gather_single": 1, "allreduce": 1}  # the check of the plan; the rows


def test_between_adjustments_pe_dyra_issues_as_many_collectives_as_lora(folder: Path) -> None:
    pe_dyra, lora = steps(folder, "pe_dyra"), steps(folder, "lora")
    # DeepSpeed records its order of fetching in the first step of an engine.
    settled = [step for step in range(1, 12) if step + 1 not in (7, 8)]
    assert [pe_dyra[s]["all"] for s in settled] == [lora[s]["all"] for s in settled]


def test_a_held_out_loss_behind_an_adjustment_does_not_stop_deepspeed_from_fetching_ahead(
    folder: Path,
) -> None:
    """DeepSpeed would take the order of that forward for that of a step, and fetch module by module ever after."""
    held_out = steps(folder, "held_out")
    assert held_out[6]["adjusts"] and held_out[6]["step"] == 7
    # Fetched ahead, several modules share a gather: forward and backward have 2 layers, embedding, norm and head.
    # Only the first step of the engine that the adjustment built is not: DeepSpeed records its order.
    ahead = [step["all"]["all_gather_single"] <= 5 for step in held_out[1:]]
    assert ahead == [True] * 6 + [False] + [True] * 4
