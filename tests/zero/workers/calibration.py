"""Calibration passes in one process group: FOLDER, then the scores that are wanted; writes what each found."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import torch

from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.calibration import Score, calibrate
from tests.support.watching import main, write

BATCHES, COMPONENTS = 3, 14


def scores(folder: Path) -> None:
    recipe = load_recipe(str(folder / "recipe.yaml"))
    for score in get_args(Score):
        if score in sys.argv[2:]:
            found = calibrate(recipe, score, BATCHES, COMPONENTS, torch.device("cpu"))
            names = [shape.name for shape in found.shapes]
            write(folder, score, dict(zip(names, found.scores, strict=True)))


if __name__ == "__main__":
    main([scores])
