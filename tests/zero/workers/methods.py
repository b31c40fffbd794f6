"""Every method of tests/support/methods.py, trained in one process group under the setups of the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from dynrank_ds.recipe import load_recipe
from dynrank_ds.training import run
from dynrank_ds.zero import processes
from tests.support.watching import main


def matrix(folder: Path) -> None:
    for name, method in json.loads((folder / "methods.json").read_text()).items():
        for setup in sys.argv[2:]:
            config, *overrides = setup.split(",")
            output = folder / f"{name}-{processes.world_size()}-{setup}"
            recipe = load_recipe(
                str(folder / "recipe.yaml"),
                [
                    f"method={json.dumps(method)}",
                    f"deepspeed.config={config}",
                    f"output.dir={output}",
                    *overrides,
                ],
            )
            run.train(recipe, False, torch.device("cpu"))


if __name__ == "__main__":
    main([matrix])
