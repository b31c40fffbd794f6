"""Every method goes on from a checkpoint as if it had not stopped, before and after its last adjustment."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.launch import run_worker
from tests.support.methods import METHODS
from tests.support.recipes import STEPS, lines, write_recipe

NAMES = ("lora", *METHODS)
# A checkpoint while ranks and gates still move, and one after the last adjustment.
POINTS = (6, 18)
EVERY_SIX = "train.checkpoint_interval=6,train.checkpoints_kept=10"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method's whole run, and the same run resumed from each point."""
    folder = tmp_path_factory.mktemp("resume")
    write_recipe(folder)
    for name in NAMES:
        (folder / f"{name}.yaml").write_text(
            json.dumps({"base": "recipe.yaml", "method": METHODS.get(name, {"name": name})})
        )
    run_worker(1, "resuming", folder, *NAMES, EVERY_SIX)
    for name in NAMES:
        for point in POINTS:
            run = folder / f"{name}-{point}"
            shutil.copytree(folder / name, run)
            shutil.rmtree(run / "adapter")
            for checkpoint in (run / "checkpoints").iterdir():
                if int(checkpoint.name.removeprefix("step-")) > point:
                    shutil.rmtree(checkpoint)
    run_worker(1, "resuming", folder, *(f"{name}-{point}" for name in NAMES for point in POINTS), EVERY_SIX)
    return folder


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(folder: Path, name: str, point: int) -> None:
    whole, resumed = folder / name, folder / f"{name}-{point}"
    for log, keys in (
        ("metrics.jsonl", ["loss", "total_rank_stored"]),
        ("ranks.jsonl", ["step", "scores", "after"]),
    ):
        expected, actual = (
            [[line[k] for k in keys] for line in lines(run / log)] for run in (whole, resumed)
        )
        assert actual == expected, log
    assert len(lines(resumed / "metrics.jsonl")) == STEPS
    weights = "adapter/adapter_model.safetensors"
    assert (resumed / weights).read_bytes() == (whole / weights).read_bytes()
