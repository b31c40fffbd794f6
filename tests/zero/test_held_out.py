"""Packed runs with a held-out split, at several world sizes, are the plain run: losses, plans, best checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from dynrank_ds.data.collating import PaddedCollator
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.samples import prepare_data, split_held_out
from tests.support.launch import train
from tests.support.recipes import lines, write_recipe

STEPS = 11  # adjustments at 4 and 7
HELD_OUT = 7  # no multiple of any world size below, nor of their micro-batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("held-out")
    write_recipe(path)
    return path


def run(folder: Path, name: str, world_size: int, *overrides: str) -> list[dict[str, Any]]:
    out = f"output.dir={folder / name}"
    chosen = (f"train.steps={STEPS}", f"data.held_out={HELD_OUT}", out)
    train(world_size, folder / "recipe.yaml", *chosen, *overrides)
    return lines(folder / name / "metrics.jsonl")


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[dict[str, Any]]:
    """One process, padded, evaluated every 3 steps."""
    return run(folder, "plain", 1, "train.held_out_interval=3")


@pytest.fixture(scope="module")
def packed(folder: Path) -> list[dict[str, Any]]:
    """Two processes, packed, evaluated at the end only."""
    return run(folder, "packed", 2, "data.packing=true", "train.micro_batch_size=3")


def largest_difference(a: list[dict[str, Any]], b: list[dict[str, Any]], key: str) -> float:
    return max(abs(x[key] - y[key]) for x, y in zip(a, b, strict=True) if key in x and key in y)


def test_a_packed_run_has_the_losses_and_plans_of_the_padded_one(
    folder: Path, plain: list[dict[str, Any]], packed: list[dict[str, Any]]
) -> None:
    difference = largest_difference(plain, packed, "loss")
    print(f"largest loss difference {difference:.1e}")
    assert difference <= 1e-6
    plans = [
        [(line["step"], line["plan_sha256"]) for line in lines(folder / name / "ranks.jsonl")]
        for name in ("plain", "packed")
    ]
    assert plans[0] == plans[1] and len(plans[0]) == 2


def test_held_out_losses_do_not_depend_on_processes_and_packing(
    plain: list[dict[str, Any]], packed: list[dict[str, Any]]
) -> None:
    assert [x["step"] for x in plain if "held_out_loss" in x] == [*range(3, STEPS, 3), STEPS]
    assert [x["step"] for x in packed if "held_out_loss" in x] == [STEPS]
    assert largest_difference(plain, packed, "held_out_loss") <= 1e-6


def test_the_best_checkpoint_is_kept_with_its_adapter_beside_the_last(
    folder: Path, plain: list[dict[str, Any]]
) -> None:
    evaluated = {x["step"]: x["held_out_loss"] for x in plain if "held_out_loss" in x}
    best = min(evaluated, key=evaluated.__getitem__)
    checkpoints = folder / "plain" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"best-{best}", f"step-{STEPS}"]
    state = json.loads((checkpoints / f"best-{best}" / "state.json").read_text())
    assert (state["step"], state["held_out_loss"]) == (best, evaluated[best])
    assert transformers_loss(folder, folder / "plain" / "adapter-best") == pytest.approx(
        evaluated[best], abs=1e-5
    )
    assert transformers_loss(folder, folder / "plain" / "adapter") == pytest.approx(
        evaluated[STEPS], abs=1e-5
    )


def transformers_loss(folder: Path, adapter: Path) -> float:
    """The loss of the exported adapter on the held-out samples, by PEFT and transformers' own loss."""
    recipe = load_recipe(str(folder / "recipe.yaml"), [f"data.held_out={HELD_OUT}"])
    samples, pad_id = prepare_data(recipe)
    trained, held_out = split_held_out(samples, recipe)
    assert len(trained) + len(held_out) == len(samples) and len(held_out) == HELD_OUT
    assert not set(trained.starts) & set(held_out.starts)
    model = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, adapter)
    batch = PaddedCollator(pad_id).collate(held_out, np.arange(HELD_OUT))
    with torch.no_grad():
        return float(
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        )


@pytest.mark.slow
def test_a_run_continues_from_its_best_checkpoint_where_that_is_the_newest_and_keeps_it(
    folder: Path, plain: list[dict[str, Any]]
) -> None:
    """Three processes, stopped in the middle by having only the best checkpoint left."""
    options = (
        "train.held_out_interval=3",
        "train.checkpoint_interval=6",
        "train.micro_batch_size=2",
        "data.packing=true",
    )
    run(folder, "resumed", 3, *options)
    checkpoints = folder / "resumed" / "checkpoints"
    for last in checkpoints.glob("step-*"):
        shutil.rmtree(last)
    [best] = checkpoints.iterdir()
    before = (best / "state.json").read_text()
    out = f"output.dir={folder / 'resumed'}"
    chosen = (f"train.steps={STEPS}", f"data.held_out={HELD_OUT}", out, *options)
    first, *_ = train(3, folder / "recipe.yaml", *chosen, "resume=auto")
    assert f"resumed from {best}" in first.output
    again = lines(folder / "resumed" / "metrics.jsonl")
    assert [x["step"] for x in again] == [x["step"] for x in plain]
    assert largest_difference(plain, again, "held_out_loss") <= 1e-6
    assert largest_difference(plain, again, "loss") <= 1e-6
    assert (best / "state.json").read_text() == before
    assert sorted(path.name for path in checkpoints.iterdir()) == [best.name, f"step-{STEPS}", "step-6"]
