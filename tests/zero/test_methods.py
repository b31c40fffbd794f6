"""Every method makes the same plans and losses whatever the number of processes, the ZeRO stage and the memory options.

That one process under ZeRO-3 is plain training is shown in test_parity.py and in tests/methods.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynrank_ds.recipe import load_recipe
from tests.support.launch import run_worker
from tests.support.methods import METHODS
from tests.support.recipes import lines, write_recipe
from tests.support.replay import check_plans_follow_from_the_log

# Configuration and overrides; 6 samples a step, so 3 micro-batches in one process and 3 or 1 in two.
ALONE = "zero3,train.micro_batch_size=2"
BF16 = f"{ALONE},model.dtype=bf16"
TOGETHER = ["zero3"]
MORE = [
    "zero2,train.micro_batch_size=3",
    "zero3_offload",
    "zero2,train.activation_checkpointing=true",
    "zero3,train.activation_checkpointing=true",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    write_recipe(folder, micro_batch_size=3)
    for name, method in METHODS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"base": "recipe.yaml", "method": method}))
    run_worker(1, "methods", folder, ALONE)
    return folder


@pytest.fixture(scope="module")
def bf16(folder: Path) -> Path:
    run_worker(1, "methods", folder, BF16)
    return folder


@pytest.fixture(scope="module")
def two_processes(folder: Path) -> Path:
    run_worker(2, "methods", folder, *TOGETHER)
    return folder


@pytest.fixture(scope="module")
def more_setups(folder: Path) -> Path:
    run_worker(2, "methods", folder, *MORE)
    return folder


def history(
    folder: Path, method: str, world_size: int, setup: str
) -> tuple[list[float], list[dict[str, Any]]]:
    """Losses, and what every adjustment did."""
    run = folder / f"{method}-{world_size}-{setup}"
    plans = [
        {key: line[key] for key in ("step", "after", "pruned", "added", "masked")}
        for line in lines(run / "ranks.jsonl")
    ]
    return [line["loss"] for line in lines(run / "metrics.jsonl")], plans


def check(folder: Path, method: str, setups: list[str]) -> None:
    losses, plans = history(folder, method, 1, ALONE)
    assert any(plan["pruned"] or plan["added"] for plan in plans)
    for setup in setups:
        other_losses, other_plans = history(folder, method, 2, setup)
        assert other_plans == plans, setup
        difference = max(abs(a - b) for a, b in zip(losses, other_losses, strict=True))
        print(f"{method}, {setup}: largest loss difference {difference:.2e}")
        assert difference <= 1e-6, setup


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_plan_and_train_as_one_does(two_processes: Path, method: str) -> None:
    check(two_processes, method, TOGETHER)


@pytest.mark.parametrize("method", METHODS)
def test_every_adjustment_can_be_recomputed_from_the_log(folder: Path, method: str) -> None:
    check_plans_follow_from_the_log(
        folder / f"{method}-1-{ALONE}", load_recipe(str(folder / f"{method}.yaml"))
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_bf16_plans_by_the_same_rule_and_trains_within_two_percent(bf16: Path, method: str) -> None:
    check_plans_follow_from_the_log(bf16 / f"{method}-1-{BF16}", load_recipe(str(bf16 / f"{method}.yaml")))
    exact, rounded = (history(bf16, method, 1, setup)[0] for setup in (ALONE, BF16))
    difference = max(abs(a - b) / a for a, b in zip(exact, rounded, strict=True))
    print(f"{method}: largest relative difference {difference:.2%}")
    assert difference <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_zero_2_offload_and_checkpointing_change_nothing(more_setups: Path, method: str) -> None:
    check(more_setups, method, MORE)
