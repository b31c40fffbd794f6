"""One run of cycles: two steps, an adjustment, a checkpoint, a held-out loss.

FOLDER SECONDS [section.key=value ...]
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dynrank_ds.recipe import load_recipe
from dynrank_ds.training import run
from dynrank_ds.training.saving import Saving
from dynrank_ds.zero import processes
from dynrank_ds.zero.peer_failure import name_failed_peer
from tests.support.watching import HOOKS, main, resident, write

_LIBC = ctypes.CDLL("libc.so.6")


class Watching(Saving):
    """Ends the run when the time is over, on every process after the same step."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.end, self.before = time.monotonic() + float(sys.argv[2]), time.process_time()
        self.cycles: list[dict[str, Any]] = []

    def after_step(self, result: Any) -> None:
        super().after_step(result)
        trainer = self._trainer
        if trainer.progress.step % 2:
            return
        now = time.process_time()  # of this process: what else runs on the machine does not count
        _LIBC.malloc_trim(0)  # what was freed is not held
        modules = trainer.engine._model.modules()
        self.cycles.append(
            {
                "resident": resident(),
                "files": len(os.listdir("/proc/self/fd")),
                "threads": threading.active_count(),
                "hooks": sum(len(getattr(module, kind)) for module in modules for kind in HOOKS),
                "checkpoints": len(list((trainer.directory.path / "checkpoints").glob("step-*"))),
                "seconds": now - self.before,
            }
        )
        self.before = now
        over = torch.tensor(float(time.monotonic() > self.end))
        if processes.all_reduce_sum(over) > 0:
            trainer.total_steps = min(trainer.total_steps, trainer.progress.step + 2)

    def save_last(self) -> Path:
        write(Path(sys.argv[1]), "cycles", self.cycles)
        return super().save_last()


def soak(folder: Path) -> None:
    overrides = [
        "train.steps=1000000",
        "train.checkpoint_interval=2",
        "data.held_out=4",
        "train.held_out_interval=2",
        "method.interval=2",
        "method.k=3",
        "train.micro_batch_size=3",
        "train.schedule=constant",
        "train.learning_rate=1e-4",
        *sys.argv[3:],
    ]
    with patch.object(run, "Saving", Watching), name_failed_peer(print):
        run.train(load_recipe(str(folder / "recipe.yaml"), overrides), False, torch.device("cpu"))


if __name__ == "__main__":
    main([soak])
