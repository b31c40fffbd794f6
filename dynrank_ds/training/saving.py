"""When a run writes checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynrank_ds.checkpoints import BEST, STEP, finished, read_state
from dynrank_ds.training import checkpoint
from dynrank_ds.training.loop import StepResult, Trainer


class Saving:
    """At every interval, on a signal, at the lowest held-out loss so far, and at the end."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._section, self._about = trainer, trainer.recipe.train, trainer.about
        best = finished(trainer.run.path, BEST)[:1]
        self._best: float = read_state(best[0])["held_out_loss"] if best else math.inf

    def after_step(self, result: StepResult) -> None:
        """Writes what is due after a step; every process calls it."""
        step, interval = self._trainer.progress.step, self._section.checkpoint_interval
        if result.held_out_loss is not None and result.held_out_loss < self._best:
            self._best = result.held_out_loss
            self._save({**self._about, "held_out_loss": self._best}, 1, BEST)
        due = interval is not None and step % interval == 0 and result.applied
        if (due or result.stop) and step < self._trainer.total_steps:
            self._save_step()

    def last(self) -> Path:
        """The checkpoint of the last step, written now."""
        self._save_step()
        return self._trainer.run.path / "checkpoints" / f"{STEP}-{self._trainer.progress.step}"

    def _save_step(self) -> None:
        self._save(self._about, self._section.checkpoints_kept, STEP)

    def _save(self, about: Mapping[str, Any], kept: int, kind: str) -> None:
        trainer = self._trainer
        checkpoint.save(trainer.run.path, trainer.progress, trainer.engine, trainer.method, about, kept, kind)
