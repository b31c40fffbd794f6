"""What writing and reading a checkpoint costs, in time, bytes and memory."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dynrank_ds.bench.figures import Figure
from dynrank_ds.bench.memory import added_memory
from dynrank_ds.checkpoint import files, writing
from dynrank_ds.checkpoint.files import STEP, check, newest_checkpoint
from dynrank_ds.checkpoint.reading import Checkpoint
from dynrank_ds.recipe import Recipe
from dynrank_ds.training.loop import Trainer
from dynrank_ds.training.run import set_up
from dynrank_ds.zero import processes

MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """Seconds and bytes; memory is what this process held at most beyond what it held before."""

    nbytes: int
    save_seconds: float
    save_memory: int
    load_seconds: float
    load_memory: int


def measure_checkpoint(recipe: Recipe, quick: bool) -> Iterator[Figure]:
    """Yield (what, figure) of a checkpoint of the recipe's run at its beginning; the best of 2 (quick) or 5."""
    device = processes.start(recipe.deepspeed.timeout)
    with tempfile.TemporaryDirectory() as folder:
        mine = torch.tensor(list(os.fsencode(folder)), dtype=torch.uint8, device=device)
        first, *_ = processes.from_each_process(mine)
        output = recipe.output.model_copy(update={"dir": os.fsdecode(bytes(first.tolist())) + "/run"})
        trainer = set_up(recipe.model_copy(update={"output": output}), False, device)
        costs = [cost(trainer) for _ in range(2 if quick else 5)]
        processes.barrier()
    processes.stop()
    size = costs[0].nbytes
    save, load = min(c.save_seconds for c in costs), min(c.load_seconds for c in costs)
    memory = max(c.save_memory for c in costs), max(c.load_memory for c in costs)
    yield Figure("size", f"{size / MIB:.1f} MiB")
    yield Figure("writing, with its sums, on the disk", f"{save:.2f} s, {size / MIB / save:.0f} MiB/s")
    yield Figure("checking and reading", f"{load:.2f} s, {size / MIB / load:.0f} MiB/s")
    yield Figure(
        "memory above training, writing and reading", f"{memory[0] / MIB:.1f} and {memory[1] / MIB:.1f} MiB"
    )


def cost(trainer: Trainer) -> Cost:
    """Write the trainer's checkpoint, restores and removes it, in all processes."""

    def save() -> None:
        writing.save(
            trainer.directory.path,
            trainer.progress,
            trainer.engine,
            trainer.method,
            trainer.metadata,
            1,
            STEP,
        )

    save_seconds, save_memory = _timed(save)
    path = newest_checkpoint(trainer.directory.path)

    def load() -> None:
        check(path)
        whole = Checkpoint(path)
        for _ in whole.factors():  # of which the modules would be built
            pass
        whole.restore(trainer.engine, trainer.method)

    load_seconds, load_memory = _timed(load)
    nbytes = _size(path)
    processes.barrier()
    if processes.rank() == 0:
        files.remove([path])
    return Cost(nbytes, save_seconds, save_memory, load_seconds, load_memory)


def _timed(work: Callable[[], None]) -> tuple[float, int]:
    started = time.perf_counter()
    memory = added_memory(work)
    return time.perf_counter() - started, memory


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
