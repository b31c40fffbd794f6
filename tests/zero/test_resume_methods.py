"""Every method goes on from a checkpoint as if it had not stopped, before and after its last adjustment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import run_worker
from tests.support.methods import METHODS
from tests.support.recipes import STEPS, copy_stopped, lines, write_recipe

NAMES = ("lora", *METHODS)
# A checkpoint while ranks and gates still move, and one after the last adjustment.
POINTS = (6, 18)
EVERY_SIX = "train.checkpoint_interval=6,train.checkpoints_kept=10"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method's whole run in one process, resumed from each point in one and in two, and one in two, resumed."""
    folder = tmp_path_factory.mktemp("resume")
    write_recipe(folder)
    for name in NAMES:
        (folder / f"{name}.yaml").write_text(
            json.dumps({"base": "recipe.yaml", "method": METHODS.get(name, {"name": name})})
        )
    run_worker(1, "resuming", folder, *NAMES, EVERY_SIX)
    for world_size in (1, 2):
        copies = [_stopped(folder, name, point, str(world_size)) for name in NAMES for point in POINTS]
        run_worker(world_size, "resuming", folder, *copies, EVERY_SIX)
    together = [f"{name}-together" for name in NAMES]
    run_worker(2, "resuming", folder, *together, EVERY_SIX)
    copies = [_stopped(folder, name, POINTS[0], "resumed") for name in together]
    run_worker(2, "resuming", folder, *copies, EVERY_SIX)
    return folder


def _stopped(folder: Path, name: str, point: int, what: str) -> str:
    """A copy of the whole run as if it had stopped at `point`."""
    return copy_stopped(folder / name, folder / f"{name}-{point}-{what}", point).name


def _logged(run: Path, log: str, *keys: str) -> list[list[Any]]:
    """LoRA has no adjustments to log."""
    return [[line[key] for key in keys] for line in lines(run / log)] if (run / log).is_file() else []


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(folder: Path, name: str, point: int) -> None:
    check_bits(folder / name, folder / f"{name}-{point}-1")


@pytest.mark.parametrize("name", NAMES)
def test_so_it_is_in_two_processes(folder: Path, name: str) -> None:
    check_bits(folder / f"{name}-together", folder / f"{name}-together-{POINTS[0]}-resumed")


def check_bits(whole: Path, resumed: Path) -> None:
    for log, keys in (
        ("metrics.jsonl", ["step", "loss", "total_rank_stored"]),
        ("ranks.jsonl", ["step", "scores", "after"]),
    ):
        assert _logged(resumed, log, *keys) == _logged(whole, log, *keys), log
    assert len(lines(resumed / "metrics.jsonl")) == STEPS
    weights = "adapter/adapter_model.safetensors"
    assert (resumed / weights).read_bytes() == (whole / weights).read_bytes()


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", NAMES)
def test_resumed_by_two_processes_it_has_the_same_losses_and_plans(
    folder: Path, name: str, point: int
) -> None:
    whole, resumed = folder / name, folder / f"{name}-{point}-2"
    losses = [[loss for [loss] in _logged(run, "metrics.jsonl", "loss")] for run in (whole, resumed)]
    difference = max(abs(one - other) for one, other in zip(*losses, strict=True))
    print("largest difference of losses", difference)
    assert difference <= 1e-6
    plans = [_logged(run, "ranks.jsonl", "step", "plan_sha256") for run in (whole, resumed)]
    assert plans[0] == plans[1]
