"""Runs of one process group, begun or resumed: FOLDER, names of runs METHOD or METHOD-POINT, overrides with commas."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dynrank_ds.recipe import load_recipe
from dynrank_ds.training import run
from tests.support.watching import main


def runs(folder: Path) -> None:
    *names, overrides = sys.argv[2:]
    for name in names:
        method = name.partition("-")[0]
        recipe = load_recipe(
            str(folder / f"{method}.yaml"), [*overrides.split(","), f"output.dir={folder / name}"]
        )
        run.train(recipe, True, torch.device("cpu"))


if __name__ == "__main__":
    main([runs])
