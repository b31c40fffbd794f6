"""What loading the base of the recipe in FOLDER costs, and the logits of the sharded model."""

from __future__ import annotations

import gc
from pathlib import Path

import deepspeed
import torch

from dynrank_ds.bench.load import load_cost
from dynrank_ds.bench.memory import added_memory
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.model import DTYPES, adapt, load_model
from dynrank_ds.zero.partitioner import make_partitioner
from tests.support.watching import main, write
from tests.zero.workers.loading import configuration


def measure(folder: Path) -> None:
    recipe = load_recipe(str(folder / "recipe.yaml"))
    cost = load_cost(recipe)
    write(folder, "cost", {"share": cost.share, "peak": cost.peak, "bound": cost.bound})
    gc.collect()  # the shards, which DeepSpeed's functions on each parameter hold in a cycle


def logits(folder: Path) -> None:
    recipe = load_recipe(str(folder / "recipe.yaml"))
    config = configuration(recipe)
    model = load_model(recipe.model, False, make_partitioner(config, DTYPES[recipe.model.dtype]))
    adapt(model, recipe)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    engines = []

    def start() -> None:
        engines.append(deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0])

    write(folder, "engine", added_memory(start))
    with torch.no_grad():
        found = engines[0](input_ids=torch.arange(3, 19).view(2, 8)).logits
    torch.save(found, folder / f"logits-{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main([measure, logits])
