"""Runs of a method's recipe in one process group: FOLDER, then METHOD:OVERRIDE,OVERRIDE of each."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dynrank_ds.recipe import load_recipe
from dynrank_ds.training import run
from tests.support.watching import main


def runs(folder: Path) -> None:
    for name in sys.argv[2:]:
        method, overrides = name.split(":")
        recipe = load_recipe(
            str(folder / f"{method}.yaml"), [*overrides.split(","), f"output.dir={folder / name}"]
        )
        run.train(recipe, False, torch.device("cpu"))


if __name__ == "__main__":
    main([runs])
