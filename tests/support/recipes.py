"""A recipe of seconds: tiny model, tiny data, PE-DyRA that adjusts every few steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.support.tiny import write_data, write_model

STEPS = 20
# AdamW's first update of an element is lr g / (|g| + eps), whose slope is lr / eps where g is near 0: what sums in
# another order leave in such a gradient moves the element by up to a share of lr, not by rounding. A new row has many
# elements, and the gradient of some is always near 0. With the default of 1e-8 losses at other world sizes came up to
# 1.8e-6 apart, by the luck of the seed and of the CPU's matrix kernels (ARD-LoRA: one element of a new row of lora_B,
# its first gradient 3.7e-8 in one process and 3.9e-8 in two).
EPS = 1e-6


def write_recipe(folder: Path, dtype: str = "fp32", micro_batch_size: int = 1) -> Path:
    """recipe.yaml in `folder`, with its model and data: 20 steps, adjustments of 5 triples at 4, 7, 10, 13, 16.

    micro_batch_size: 3 is faster: two micro-batches of one process and one of two. It divides no batch of three.
    """
    write_model(folder / "model")
    write_data(folder / "data.jsonl", longest=30)
    recipe = {
        "model": {"path": str(folder / "model"), "dtype": dtype},
        "data": {"source": str(folder / "data.jsonl"), "max_length": 200},
        "adapter": {"rank": 4, "alpha": 16.0},
        "method": {"name": "pe_dyra", "t_i": 1, "interval": 3, "t_f": 2, "k": 5},
        "train": {
            "steps": STEPS,
            "global_batch_size": 6,
            "micro_batch_size": micro_batch_size,
            "learning_rate": 5e-3,
            "warmup": 3,
            "eps": EPS,
        },
        "output": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def copy_stopped(run: Path, copy: Path, step: int) -> Path:
    """Copy a finished run as it would be if it had stopped at `step`."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "adapter")
    for checkpoint in (copy / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return copy


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
