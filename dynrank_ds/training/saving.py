"""When a run writes checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynrank_ds.checkpoint import writing
from dynrank_ds.checkpoint.files import BEST, STEP, checkpoint_path, complete_checkpoints, read_state
from dynrank_ds.training.loop import StepResult, Trainer


class Saving:
    """Checkpoints at every interval, on a signal, at the lowest held-out loss so far, and at the end."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._section, self._metadata = trainer, trainer.recipe.train, trainer.metadata
        best = complete_checkpoints(trainer.directory.path, BEST)[:1]
        self._best: float = read_state(best[0])["held_out_loss"] if best else math.inf

    def after_step(self, result: StepResult) -> None:
        """Write the checkpoints that are due after a step; every process must call it."""
        step, interval = self._trainer.progress.step, self._section.checkpoint_interval
        if result.held_out_loss is not None and result.held_out_loss < self._best:
            self._best = result.held_out_loss
            self._save({**self._metadata, "held_out_loss": self._best}, 1, BEST)
        due = interval is not None and step % interval == 0 and result.applied
        if (due or result.stop) and step < self._trainer.total_steps:
            self._save_step()

    def save_last(self) -> Path:
        """Write the checkpoint of the last step and return its path."""
        self._save_step()
        return checkpoint_path(self._trainer.directory.path, STEP, self._trainer.progress.step)

    def _save_step(self) -> None:
        self._save(self._metadata, self._section.checkpoints_kept, STEP)

    def _save(self, metadata: Mapping[str, Any], kept: int, kind: str) -> None:
        trainer = self._trainer
        writing.save(
            trainer.directory.path, trainer.progress, trainer.engine, trainer.method, metadata, kept, kind
        )
