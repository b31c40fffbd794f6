"""What the processes of a check do: python -m launcher.gpu_check.worker TASK ARGUMENTS, under torchrun."""

from __future__ import annotations

import json
import logging
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dynrank_ds import dtypes
from dynrank_ds.bench.contenders import Arrays, Ours, PeftDeepSpeed
from dynrank_ds.data.collating import PaddedCollator
from dynrank_ds.errors import DynrankError
from dynrank_ds.recipe import Recipe, load_recipe
from dynrank_ds.training.run import train
from dynrank_ds.training.samples import make_batches, prepare_data
from dynrank_ds.zero import processes
from launcher.gpu_check.reference import first_losses, lora_losses
from launcher.gpu_check.setting import STEPS, STOPPED_AT

_TIMED, _WARM_UP = 12, 4
"""Steps of which a time is the median, and those before."""
_MEBI = 2**20
TIMEOUT = 120
"""Seconds that processes wait for one another."""


def collectives(output: str) -> None:
    """Sum and gather over all processes; write the bytes a second of a large sum, and bf16's error in a product."""
    device = processes.start(TIMEOUT)
    rank, count = processes.rank(), processes.world_size()
    for dtype in (torch.float32, torch.bfloat16):
        summed = processes.all_reduce_sum(torch.full((1000,), rank + 1.0, dtype=dtype, device=device))
        assert (summed == count * (count + 1) / 2).all(), (dtype, summed[:3])
        gathered = processes.gather_flat(torch.full((7,), float(rank), dtype=dtype, device=device))
        assert (gathered == torch.arange(count, device=device)[:, None]).all(), (dtype, gathered)
    large = torch.zeros(16 * _MEBI, device=device)
    processes.all_reduce_sum(large)
    started = time.perf_counter()
    for _ in range(5):
        processes.all_reduce_sum(large)
    float(large[0])  # waits for the device
    seconds = (time.perf_counter() - started) / 5
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator).to(device) for _ in range(2))
    error = float(((a.bfloat16() @ b.bfloat16()).float() - a @ b).norm() / (a @ b).norm())
    result = {
        "bytes_per_second": 2 * (count - 1) / count * large.nbytes / seconds,  # sent by each in a ring
        "bf16_error": error,
        "native_bf16": dtypes.native_bf16(device.type),
    }
    _write(output, result)


def run(*recipes: str) -> None:
    """Train by each recipe, or go on from its newest checkpoint."""
    device = processes.start(TIMEOUT)
    for recipe in recipes:
        train(load_recipe(recipe), True, device)


def run_and_resume(path: str) -> None:
    """Train, and train again in NAME-resumed from the checkpoint of STOPPED_AT."""
    recipe, device = load_recipe(path), processes.start(TIMEOUT)
    train(recipe, True, device)
    whole = Path(recipe.output.dir)
    resumed = whole.with_name(f"{whole.name}-resumed")
    processes.barrier()
    if processes.rank() == 0:
        stop_at_checkpoint(whole, resumed)
    processes.barrier()
    other = recipe.model_copy(update={"output": recipe.output.model_copy(update={"dir": str(resumed)})})
    train(other, True, device)


def stop_at_checkpoint(whole: Path, stopped: Path) -> None:
    """Copy a finished run as if it had been stopped after the checkpoint of STOPPED_AT."""
    shutil.copytree(whole, stopped, ignore=shutil.ignore_patterns(".run.lock"))
    shutil.rmtree(stopped / "checkpoints" / f"step-{STEPS}")
    shutil.rmtree(stopped / "adapter")
    assert (stopped / "checkpoints" / f"step-{STOPPED_AT}").is_dir()


def plain(path: str, adapter: str, merged: str, output: str) -> None:
    """Write losses by plain PyTorch, of a recipe of LoRA."""
    recipe, device = load_recipe(path), processes.start(TIMEOUT)
    found = {
        "lora": lora_losses(recipe, device),
        **first_losses(recipe, Path(adapter), Path(merged), device),
    }
    _write(output, found)


@dataclass(frozen=True)
class _OnDevice(PeftDeepSpeed):
    """PEFT under DeepSpeed with its batches on this process's device."""

    def inputs(self, rank: int) -> list[dict[str, Any]]:
        """Return the model's arguments for every micro-batch of a process."""
        gpu = torch.cuda.is_available() and os.environ["DS_ACCELERATOR"] == "cuda"
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
        return [
            {
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
            }
            for batch in super().inputs(rank)
        ]


def time_step(side: str, path: str, output: str) -> None:
    """Write the median seconds of an optimizer step of ours or of PEFT's LoRA, and the peak memory in GiB."""
    recipe = load_recipe(path)
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ends: list[float] = []

    def after_step(_: float) -> bool:
        ends.append(time.perf_counter())
        return len(ends) < _WARM_UP + _TIMED

    contender = Ours("ours", recipe) if side == "ours" else _peft(recipe, count)
    contender.train(rank, count, after_step)
    seconds = [after - before for before, after in zip(ends[_WARM_UP - 1 :], ends[_WARM_UP:], strict=False)]
    _write(output, {"seconds": statistics.median(seconds), "gib": processes.peak_memory_gib()})


def _peft(recipe: Recipe, world_size: int) -> PeftDeepSpeed:
    dataset, pad_id = prepare_data(recipe)
    indices, collator = make_batches(dataset, recipe).indices(0), PaddedCollator(pad_id)

    def of(rank: int) -> tuple[Arrays, ...]:
        chosen = collator.micro_batches(
            indices, dataset.lengths, rank, world_size, recipe.train.micro_batch_size
        )
        batches = [collator.collate(dataset, some) for some in chosen]
        names = ("input_ids", "attention_mask", "labels")
        return tuple({name: getattr(batch, name).numpy() for name in names} for batch in batches)

    targets = int(dataset.target_counts[indices].sum())
    return _OnDevice("peft", recipe, tuple(map(of, range(world_size))), targets)


def _write(output: str, result: dict[str, Any]) -> None:
    if processes.rank() == 0:
        Path(output).write_text(json.dumps(result))


TASKS: dict[str, Callable[..., None]] = {
    "collectives": collectives,
    "run": run,
    "run_and_resume": run_and_resume,
    "plain": plain,
    "time": time_step,
}


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    task, *arguments = sys.argv[1:]
    try:
        TASKS[task](*arguments)
    except DynrankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    processes.barrier()
    processes.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
