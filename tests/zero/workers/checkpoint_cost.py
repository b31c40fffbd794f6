"""What a checkpoint of the recipe in FOLDER costs in this group of processes."""

from __future__ import annotations

import ctypes
from dataclasses import asdict
from pathlib import Path

import torch

from dynrank_ds.bench.checkpoint import cost
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.run import set_up
from tests.support.watching import main, write

M_MMAP_THRESHOLD = -3


def measure(folder: Path) -> None:
    # Otherwise malloc keeps what was freed before, and what is taken from that is not seen.
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**16)
    recipe = load_recipe(
        str(folder / "recipe.yaml"), ["train.global_batch_size=2", "train.micro_batch_size=1"]
    )
    trainer = set_up(recipe, False, torch.device("cpu"))
    trainer.train(lambda _: setattr(trainer, "total_steps", trainer.progress.step))  # one step
    cost(trainer)  # what is allocated once
    write(folder, "cost", asdict(cost(trainer)))


if __name__ == "__main__":
    main([measure])
