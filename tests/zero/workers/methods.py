"""Every method of tests/support/methods.py, trained in one process group under the setups of the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dynrank_ds.recipe import load_recipe
from dynrank_ds.training import run
from dynrank_ds.zero import processes
from tests.support.methods import METHODS
from tests.support.watching import main


def matrix(folder: Path) -> None:
    for name in METHODS:
        for setup in sys.argv[2:]:
            config, *overrides = setup.split(",")
            output = folder / f"{name}-{processes.world_size()}-{setup}"
            overrides += [f"deepspeed.config={config}", f"output.dir={output}"]
            recipe = load_recipe(str(folder / f"{name}.yaml"), overrides)
            run.train(recipe, False, torch.device("cpu"))


if __name__ == "__main__":
    main([matrix])
