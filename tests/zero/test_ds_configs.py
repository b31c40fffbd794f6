"""Every shipped DeepSpeed configuration trains, adjusts ranks, stops and resumes with ZeRO-3's losses."""

from __future__ import annotations

import json
import os
import shutil
from importlib import resources
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dynrank_ds.errors import RecipeError
from dynrank_ds.zero.config import check_processes, load_config
from tests.support.launch import outcomes, run_worker
from tests.support.recipes import lines, write_recipe

ALONE = ("zero3", "zero1", "zero2", "zero3_offload", "zero3_offload_params")
NAMES = (*ALONE, "zero3_hpz")


def processes(name: str) -> int:
    return 4 if name == "zero3_hpz" else 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME and, from its third step on, NAME-resumed; DeepSpeed would compile into `extensions`."""
    folder = tmp_path_factory.mktemp("ds_configs")
    write_recipe(folder)
    hpz = load_config("zero3_hpz", bf16=False)
    hpz["zero_optimization"]["zero_hpz_partition_size"] = 2
    (folder / "hpz.json").write_text(json.dumps(hpz))
    recipe = {
        "base": "recipe.yaml",
        "method": {"name": "pe_dyra", "t_i": 1, "interval": 2, "t_f": 0, "k": 5},
        "train": {"steps": 6, "global_batch_size": 4, "checkpoint_interval": 3},
    }
    for name in NAMES:
        config = str(folder / "hpz.json") if name == "zero3_hpz" else name
        (folder / f"{name}.yaml").write_text(json.dumps(recipe | {"deepspeed": {"config": config}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
        for names in (ALONE, ("zero3_hpz",)):
            run_worker(processes(names[0]), "ds_configs", folder, *names)
            for name in names:
                shutil.copytree(folder / name, folder / f"{name}-resumed")
                shutil.rmtree(folder / f"{name}-resumed/checkpoints/step-6")
                shutil.rmtree(folder / f"{name}-resumed/adapter")
            run_worker(processes(names[0]), "ds_configs", folder, *(f"{name}-resumed" for name in names))
    return folder


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run / "metrics.jsonl")]


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_has_the_losses_and_plans_of_zero_3(folder: Path, name: str) -> None:
    plans = lines(folder / name / "ranks.jsonl")
    assert [line["step"] for line in plans] == [3, 5]
    assert all(line["before"] != line["after"] for line in plans)
    expected = lines(folder / "zero3" / "ranks.jsonl")
    assert [line["plan_sha256"] for line in plans] == [line["plan_sha256"] for line in expected]
    assert losses(folder / name) == pytest.approx(losses(folder / "zero3"), abs=1e-6, rel=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_has_the_losses_and_adapter_of_one_that_never_stopped(folder: Path, name: str) -> None:
    resumed = folder / f"{name}-resumed"
    # The sum of four gradients depends on their order, which is that of the engine's parameters.
    tolerance = 0 if processes(name) == 2 else 1e-6
    assert losses(resumed) == pytest.approx(losses(folder / name), abs=tolerance, rel=0)
    assert len(losses(resumed)) == 6
    found, expected = (
        load_file(run / "adapter/adapter_model.safetensors") for run in (resumed, folder / name)
    )
    for key, weights in expected.items():
        assert (found[key] - weights).abs().max() <= tolerance, key


@pytest.mark.parametrize("name", NAMES)
def test_a_process_holds_of_the_base_what_its_configuration_says(folder: Path, name: str) -> None:
    for held in outcomes(folder, f"held-{name}", processes(name)):
        parts = processes(name) if name.startswith("zero3") else 1
        assert held["base"] / parts <= held["shard"] < held["base"] / parts * 1.01
        # After the last step: nodes need not exchange the base again.
        copy = held["base"] / 2 if name == "zero3_hpz" else 0
        assert copy <= held["copy"] <= copy * 1.01


def test_nothing_was_compiled(folder: Path) -> None:
    built = [name for _, _, names in os.walk(folder / "extensions") for name in names]
    assert built == []


def test_every_shipped_configuration_is_tested_and_documented() -> None:
    root = Path(__file__).parents[2] / "ds_configs"
    shipped = {
        file.name for file in resources.files("dynrank_ds.ds_configs").iterdir() if file.name.endswith("json")
    }
    assert shipped == {f"{name}.json" for name in NAMES}
    rows = [line for line in (root / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(shipped)


def test_a_group_that_does_not_divide_the_processes_is_refused() -> None:
    config = load_config("zero3_hpz", bf16=False)
    check_processes(config, "zero3_hpz", 16)
    with pytest.raises(
        RecipeError, match=r"zero_hpz_partition_size 8, which does not divide 12 processes: give"
    ):
        check_processes(config, "zero3_hpz", 12)
