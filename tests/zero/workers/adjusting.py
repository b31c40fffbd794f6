"""What the benchmark notes of three adjustments by FOLDER's recipe, and of collectives of known number and size."""

from __future__ import annotations

from pathlib import Path

import torch

from dynrank_ds.bench.adjusting import Adjusting
from dynrank_ds.bench.collectives import Collectives
from dynrank_ds.recipe import load_recipe
from dynrank_ds.zero import processes
from tests.support.watching import main, write


def watch(folder: Path) -> None:
    answers = iter([True, True, False])
    recipe = load_recipe(str(folder / "recipe.yaml"))
    rank, world_size = processes.rank(), processes.world_size()
    Adjusting("ours", recipe, folder).train(rank, world_size, lambda _: next(answers))
    with Collectives().counting() as counted:
        processes.all_reduce_sum(torch.zeros(10))
        processes.gather_flat(torch.zeros(3, dtype=torch.int64))
        processes.broadcast(torch.zeros(5), 1)
        processes.barrier()
    processes.all_reduce_sum(torch.zeros(10))
    write(folder, "known", [counted.calls.total(), counted.bytes])


if __name__ == "__main__":
    main([watch])
