"""Runs that discard a batch before a checkpoint and one after it, whole and resumed from that checkpoint."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from numpy.typing import NDArray
from torch import Tensor

from dynrank_ds.recipe import load_recipe
from dynrank_ds.training import run
from dynrank_ds.training.loop import Trainer
from dynrank_ds.zero import processes
from tests.support.watching import main

DISCARDED = (3, 7)
CHECKPOINT = 6
OPTIONS = ["train.steps=12", "train.checkpoint_interval=2", "train.checkpoints_kept=10"]


class Poisoned(Trainer):
    """The loss of one process is NaN in two batches."""

    def _accumulate(self, indices: NDArray[Any], targets: int) -> Tensor:
        loss = super()._accumulate(indices, targets)
        here = processes.rank() == 1 and self.progress.batch in DISCARDED
        return loss * torch.nan if here else loss


def runs(folder: Path) -> None:
    for setup in sys.argv[2:]:
        whole, resumed = folder / setup / "whole", folder / setup / "resumed"

        def train(out: Path, resume: bool, setup: str = setup) -> None:
            overrides = [*OPTIONS, *setup.split(","), f"output.dir={out}"]
            run.train(load_recipe(str(folder / "recipe.yaml"), overrides), resume, torch.device("cpu"))

        train(whole, resume=False)
        if processes.rank() == 0:
            shutil.copytree(whole, resumed)
            shutil.rmtree(resumed / "adapter")
            for step in range(CHECKPOINT + 2, 13, 2):
                shutil.rmtree(resumed / "checkpoints" / f"step-{step}")
        processes.barrier()
        train(resumed, resume=True)


def copied(optimizer: Any, param: Any, state: str | None = None) -> Tensor:
    """What DeepSpeed gives of offloaded state on a GPU; on a CPU it would be the state itself."""
    return of_deepspeed(optimizer, param, state).clone()


of_deepspeed = DeepSpeedZeroOptimizer_Stage3.get_local_fp32_param

if __name__ == "__main__":
    with (
        patch.object(run, "Trainer", Poisoned),
        patch.object(DeepSpeedZeroOptimizer_Stage3, "get_local_fp32_param", copied),
    ):
        main([runs])
