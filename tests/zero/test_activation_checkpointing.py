"""Recomputing activations changes neither losses nor what is observed of the inputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.launch import run_worker
from tests.support.recipes import STEPS, lines, write_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs at world size 2: {kept, recomputed}{1, 3}, by micro-batches of a step."""
    folder = tmp_path_factory.mktemp("activation_checkpointing")
    write_recipe(folder)
    runs = [
        f"output.dir={folder}/{name}{micro_batches},train.micro_batch_size={3 // micro_batches},"
        f"train.activation_checkpointing={recompute}"
        for micro_batches in (1, 3)
        for name, recompute in (("kept", "false"), ("recomputed", "true"))
    ]
    run_worker(2, "runs", folder, *runs)
    return folder


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_losses_equal_those_without_recomputing(folder: Path, micro_batches: int) -> None:
    kept, recomputed = (
        [line["loss"] for line in lines(folder / f"{name}{micro_batches}" / "metrics.jsonl")]
        for name in ("kept", "recomputed")
    )
    assert len(kept) == STEPS
    assert max(abs(a - b) for a, b in zip(kept, recomputed, strict=True)) <= 1e-6


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_scores_and_plans_equal_those_without_recomputing(folder: Path, micro_batches: int) -> None:
    kept, recomputed = (
        lines(folder / f"{name}{micro_batches}" / "ranks.jsonl") for name in ("kept", "recomputed")
    )
    assert len(kept) == 5
    assert [line["plan_sha256"] for line in kept] == [line["plan_sha256"] for line in recomputed]
    for one, other in zip(kept, recomputed, strict=True):
        for name, scores in one["scores"].items():
            assert other["scores"][name] == pytest.approx(scores, rel=1e-4)
