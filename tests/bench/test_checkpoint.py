"""The benchmark of checkpoints, and the bound on memory that it measures."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.support.launch import outcomes, run_worker, start_processes, wait
from tests.support.recipes import write_recipe
from tests.support.tiny import write_model


def test_it_prints_time_bytes_and_memory(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    command = ["-m", "dynrank_ds.bench", "checkpoint", "--quick", "--recipe", str(recipe)]
    processes = start_processes(2, command, tmp_path / "logs")
    wait(processes)
    assert [process.returncode for process in processes] == [0, 0], [p.output for p in processes]
    for what in (
        "size",
        "writing, with its sums, on the disk",
        "checking and reading",
        "memory above training",
    ):
        assert f"checkpoint {what}" in processes[0].output


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "config"), [(1, "zero3"), (2, "zero3"), (2, "zero2")])
def test_saving_and_loading_hold_less_than_the_models_largest_tensor_above_training(
    world_size: int, config: str, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path)
    write_model(tmp_path / "model", hidden=1024, intermediate=4096, layers=4)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    largest = max(weight.nbytes for weight in weights.values())
    recipe = yaml.safe_load(path.read_text())
    recipe["adapter"] |= {"rank": 64}
    recipe["deepspeed"] = {"config": config}
    path.write_text(yaml.safe_dump(recipe))
    run_worker(world_size, "checkpoint_cost", tmp_path)
    for cost in outcomes(tmp_path, "cost", world_size):
        print(
            {name: round(value / 2**20, 1) for name, value in cost.items()}, "MiB; largest", largest / 2**20
        )
        assert cost["nbytes"] > 6 * largest
        assert cost["save_memory"] < largest and cost["load_memory"] < largest
