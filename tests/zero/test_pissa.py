"""PiSSA under ZeRO: one start at every world size and stage, sharded, and pruned without loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.support.launch import (
    outcomes,
    run_worker,
)
from tests.support.recipes import write_recipe

PISSA = "adapter.init=pissa"
ZERO3, ZERO2 = f"{PISSA},deepspeed.config=zero3", f"{PISSA},deepspeed.config=zero2"
NF4 = f"{ZERO3},model.quantisation=nf4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pissa")
    write_recipe(folder)
    run_worker(1, "pissa", folder, ZERO2)
    run_worker(2, "pissa", folder, ZERO3, ZERO2, NF4, f"{ZERO3},model.dtype=bf16")
    run_worker(3, "pissa", folder, ZERO3)
    return folder


RUNS = [f"{ZERO2}-1", f"{ZERO3}-2", f"{ZERO2}-2", f"{ZERO3}-3"]


def logits_of_base(folder: Path) -> Tensor:
    tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        logits: Tensor = model(input_ids=tokens).logits
    return logits


@pytest.mark.parametrize("run", RUNS)
def test_pruning_and_growing_right_after_the_start_leave_the_logits_of_the_base(
    folder: Path, run: str
) -> None:
    expected = logits_of_base(folder)
    found = torch.load(folder / run / "logits.pt", weights_only=True)
    assert set(found) == {"start", "pruned", "masked"}
    for when, logits in found.items():
        assert (logits - expected).abs().max() < 1e-5, when


@pytest.mark.parametrize("run", [f"{NF4}-2", f"{ZERO3},model.dtype=bf16-2"])
def test_in_bf16_and_on_an_nf4_base_too(folder: Path, run: str) -> None:
    found = torch.load(folder / run / "logits.pt", weights_only=True)
    away = (found["pruned"] - found["start"]).abs().max() / found["start"].abs().max()
    assert away < (2e-2 if "bf16" in run else 1e-5)


@pytest.mark.parametrize("world_size", [2, 3])
def test_under_zero_3_initial_triples_are_sharded_before_and_after_a_rank_change(
    folder: Path, world_size: int
) -> None:
    run = folder / f"{ZERO3}-{world_size}"
    for name in ("shards", "pruned-shards"):
        for held in outcomes(run, name, world_size):
            for module, (own, whole) in held.items():
                assert own <= whole // world_size + 2, module


def test_the_stored_initial_triples_depend_neither_on_world_size_nor_on_stage_nor_on_nf4(
    folder: Path,
) -> None:
    stored = {(folder / run / "initial.safetensors").read_bytes() for run in [*RUNS, f"{NF4}-2"]}
    assert len(stored) == 1
