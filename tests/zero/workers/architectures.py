"""Runs of several recipes in one process group: FOLDER, then the names of its folders that hold a recipe.yaml."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dynrank_ds.recipe import load_recipe
from dynrank_ds.training import run
from tests.support.watching import main


def runs(folder: Path) -> None:
    for name in sys.argv[2:]:
        run.train(load_recipe(str(folder / name / "recipe.yaml")), False, torch.device("cpu"))


if __name__ == "__main__":
    main([runs])
