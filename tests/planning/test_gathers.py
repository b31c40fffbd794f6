"""The parameters that a process holds at each turn are those that DeepSpeed gathers, keeps and releases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynrank_ds.planning.architecture import Unit, describe
from dynrank_ds.planning.gathers import GatherLimits, follow
from dynrank_ds.recipe import load_recipe
from dynrank_ds.zero.config import load_config
from tests.support.launch import start_processes, wait
from tests.support.recipes import write_recipe
from tests.support.tiny import write_model

DEFAULTS: dict[str, Any] = {}
SMALL = {"stage3_max_reuse_distance": 9_000, "stage3_prefetch_bucket_size": 2_000}
NO_PREFETCH = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
FAR_AHEAD = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 30_000}
FEW_LIVE = {"stage3_max_live_parameters": 30_000, "stage3_max_reuse_distance": 20_000}


@pytest.mark.parametrize(
    ("zero", "recomputed"),
    [
        pytest.param(SMALL, True, id="small"),
        pytest.param(FEW_LIVE, False, id="few live, not recomputed"),
        pytest.param(FAR_AHEAD, True, id="far ahead"),
        *(
            pytest.param(zero, recomputed, id=f"{name}, {recomputed}", marks=pytest.mark.slow)
            for name, zero, recomputed in (
                ("defaults", DEFAULTS, True),
                ("defaults", DEFAULTS, False),
                ("no prefetch", NO_PREFETCH, True),
                ("no prefetch", NO_PREFETCH, False),
                ("small", SMALL, False),
                ("few live", FEW_LIVE, True),
                ("far ahead", FAR_AHEAD, False),
            )
        ),
    ],
)
def test_parameters_held_at_every_turn_are_those_that_deepspeed_holds(
    zero: dict[str, Any], recomputed: bool, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path)
    write_model(tmp_path / "model", layers=5)
    config = load_config("zero3", bf16=False)
    config["zero_optimization"] |= zero
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    values = yaml.safe_load(path.read_text())
    values["method"] = {"name": "lora"}
    values["train"] |= {"steps": 2, "activation_checkpointing": recomputed}
    values["deepspeed"] = {"config": str(tmp_path / "zero3.json")}
    path.write_text(yaml.safe_dump(values))
    command = ["-m", "tests.planning.gathers_worker", str(path), str(tmp_path)]
    processes = start_processes(2, command, tmp_path / "logs")
    wait(processes, timeout=300)
    assert all(process.returncode == 0 for process in processes), processes[0].output[-4000:]
    seen = json.loads((tmp_path / "turns-0.json").read_text())

    architecture = describe(load_recipe(str(path)))
    limits = GatherLimits.of(config["zero_optimization"])
    moments, _ = follow(architecture.units, architecture.tied, recomputed, limits)
    assert [m.parameters for m in moments] == [held for _, _, held in seen]
    assert all(m.held >= m.parameters for m in moments)


def units(layers: int) -> tuple[Unit, ...]:
    middle = [Unit(f"layer {i}", (60, 30, 10), True) for i in range(layers)]
    return (Unit("embedding", (500,)), *middle, Unit("norm", (1,)), Unit("head", (500,)))


def test_without_prefetch_and_reuse_one_unit_is_held_at_a_time() -> None:
    moments, gathered = follow(units(8), False, False, GatherLimits(prefetch=0, reuse_distance=0, live=10**9))
    # The head has a turn in forward alone.
    assert [m.parameters for m in moments] == [500, *[100] * 8, 1, 500, 1, *[100] * 8, 500]
    # A layer's parameters arrive in one buffer, and exist twice while they are copied; the head arrives alone.
    assert moments[1].arriving == 200 and moments[10].arriving == 500
    assert gathered == 2 * (500 + 8 * 100 + 1) + 500


def test_what_is_used_again_soon_is_kept_and_not_gathered_twice() -> None:
    moments, gathered = follow(units(8), False, False, GatherLimits(0, reuse_distance=10**9, live=10**9))
    # Even the embedding, whose backward comes last: DeepSpeed does not count layers on the way to it.
    assert max(m.parameters for m in moments) == gathered == 500 + 8 * 100 + 1 + 500
