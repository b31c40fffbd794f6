"""A recipe of seconds: tiny model, tiny data, PE-DyRA that adjusts every few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.support.tiny import write_data, write_model

STEPS = 20


def write_recipe(folder: Path, dtype: str = "fp32") -> Path:
    """recipe.yaml in `folder`, with its model and data: 20 steps, adjustments of 5 triples at 4, 7, 10, 13, 16."""
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
            "micro_batch_size": 1,
            "learning_rate": 5e-3,
            "warmup": 3,
        },
        "output": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
