"""A checkpoint resumes at any world size and ZeRO stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.launch import start_processes, train, train_command, wait
from tests.support.recipes import STEPS, lines, write_recipe

# Four processes need a batch of 12; adjustments are at steps 4, 7, 10, 13 and 16.
TOGETHER = ("train.global_batch_size=12", "train.checkpoint_interval=2")
# (processes, configuration, the step after whose checkpoint the run ends)
LEGS = [(1, "zero3", 2), (2, "zero2", 6), (3, "zero3_offload", 8), (4, "zero1", 12), (2, "zero3", 20)]
MORE_LEGS = [(4, "zero3", 4), (3, "zero1", 8), (1, "zero2", 12), (4, "zero3_offload", 16), (1, "zero1", 20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with its run in two processes under ZeRO-3, and a configuration of stage 1."""
    folder = tmp_path_factory.mktemp("elsewhere")
    train(2, write_recipe(folder), *TOGETHER)
    (folder / "zero1.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    return folder


@pytest.mark.parametrize(
    "legs", [LEGS, pytest.param(MORE_LEGS, marks=pytest.mark.slow)], ids=["legs", "more legs"]
)
def test_a_run_that_changes_processes_and_stage_on_its_way_is_the_one_that_does_not(
    legs: list[tuple[int, str, int]], folder: Path
) -> None:
    run = folder / "moving"
    shutil.rmtree(run, ignore_errors=True)
    for world_size, config, end in legs:
        config = str(folder / "zero1.json") if config == "zero1" else config
        _, *arguments = train_command(
            folder / "recipe.yaml",
            *TOGETHER,
            f"deepspeed.config={config}",
            f"output.dir={run}",
            "resume=auto",
        )
        point = "nowhere" if end == STEPS else "after the checkpoint"
        command = ["-m", "tests.zero.workers.killed", point, str(end), "all", *arguments]
        processes = start_processes(world_size, command, folder / "logs")
        wait(processes)
        expected = 0 if end == STEPS else -9
        assert [p.returncode for p in processes] == [expected] * world_size, [p.output for p in processes]
    whole, moving = lines(folder / "run/metrics.jsonl"), lines(run / "metrics.jsonl")
    assert [line["step"] for line in moving] == [line["step"] for line in whole]
    difference = max(abs(a["loss"] - b["loss"]) for a, b in zip(whole, moving, strict=True))
    print("largest difference of losses", difference)
    assert difference <= 1e-6
    plans = [[line["plan_sha256"] for line in lines(r / "ranks.jsonl")] for r in (folder / "run", run)]
    assert plans[0] == plans[1] and len(plans[0]) == 5
