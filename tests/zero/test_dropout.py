"""Adapter dropout is the same however the global batch is computed, and after a resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.launch import run_worker, train
from tests.support.recipes import lines, write_recipe

# eps as in test_methods.py: Adam's first update of a new row is lr g / (|g| + eps), which scales up rounding.
DROPOUT = "adapter.dropout=0.2,train.eps=1e-6"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dropout")
    write_recipe(folder)
    checkpoints = "train.checkpoint_interval=10"
    run_worker(
        1,
        "runs",
        folder,
        f"output.dir={folder / 'alone'},{checkpoints},{DROPOUT}",
        f"output.dir={folder / 'without'},train.eps=1e-6",
        f"output.dir={folder / 'packed'},train.micro_batch_size=3,data.packing=true,"
        f"train.activation_checkpointing=true,{DROPOUT}",
    )
    run_worker(2, "runs", folder, f"output.dir={folder / 'two'},{DROPOUT}")
    shutil.copytree(folder / "alone", folder / "resumed")
    for written_after_step_10 in ("checkpoints/step-20", "adapter"):
        shutil.rmtree(folder / "resumed" / written_after_step_10)
    resumed = ["resume=auto", f"output.dir={folder / 'resumed'}", *DROPOUT.split(","), checkpoints]
    train(2, folder / "recipe.yaml", *resumed)
    return folder


def losses(folder: Path, name: str) -> list[float]:
    return [line["loss"] for line in lines(folder / name / "metrics.jsonl")]


@pytest.mark.parametrize("name", ["packed", "two", "resumed"])
def test_masks_depend_on_the_seed_the_step_and_the_tokens_alone(folder: Path, name: str) -> None:
    """Packed with activation checkpointing; in two processes; in two processes from one process's checkpoint."""
    pairs = list(zip(losses(folder, "alone"), losses(folder, name), strict=True))
    difference = max(abs(a - b) for a, b in pairs)
    print(f"{name}: largest loss difference {difference:.1e}")
    assert len(pairs) == 20 and difference <= 1e-6


def test_dropout_changes_the_losses_of_training(folder: Path) -> None:
    alone, without = losses(folder, "alone"), losses(folder, "without")
    assert alone[0] == without[0]  # e = 0 at the first step
    assert max(abs(a - b) for a, b in zip(alone, without, strict=True)) > 1e-3
