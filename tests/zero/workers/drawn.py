"""Trains drawn recipes, FOLDER/NUMBER.yaml, in one process group, and writes what became of each."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

from dynrank_ds.errors import DynrankError
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training import run
from dynrank_ds.zero import processes
from tests.support.watching import main, write


def recipes(folder: Path) -> None:
    warnings.simplefilter("ignore")
    for number in sys.argv[2:]:
        options = [f"output.dir={folder / f'run-{number}'}"]
        try:
            run.train(load_recipe(str(folder / f"{number}.yaml"), options), False, torch.device("cpu"))
        except DynrankError as error:
            outcome = str(error)
        else:
            outcome = ""
        write(folder, f"outcome-{number}", outcome)
        processes.barrier()


if __name__ == "__main__":
    main([recipes])
