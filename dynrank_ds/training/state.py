"""state.json of a run directory: how the run stands or ended, for scripts."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from pathlib import Path

from dynrank_ds.checkpoint.files import Progress
from dynrank_ds.files import replace_text

STATE = "state.json"
RUNNING, STOPPED, FINISHED, FAILED = "running", "stopped", "finished", "failed"
HOW_TO_RESUME = "resume with the same command and resume=auto"

logger = logging.getLogger(__name__)


class RunState:
    """The state of a run whose training has begun; before that, nothing is written.

    A run that was killed leaves `running` behind.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / STATE
        self._progress: Progress | None = None
        self._total_steps = 0

    def begin(self, progress: Progress, total_steps: int) -> None:
        """Note that training begins; `progress` is read again at its end. Every process must call it."""
        self._progress, self._total_steps = progress, total_steps

    def write(self, state: str, how_to_continue: str, error: str | None = None) -> None:
        """Replace the file; one process must call it."""
        assert self._progress is not None
        values = {
            "state": state,
            "step": self._progress.step,
            "total_steps": self._total_steps,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "how_to_continue": how_to_continue,
            "error": error,
        }
        replace_text(self.path, json.dumps(values, indent=2) + "\n")

    def write_failure(self, error: str) -> None:
        """Write `failed` where a step was made; a disk on which that is impossible is no second failure."""
        if self._progress is None or not self.path.parent.is_dir():  # which goes where no step was made
            return
        try:
            self.write(FAILED, f"see to the error, then {HOW_TO_RESUME}", error)
        except OSError as failure:
            logger.warning("%s could not be written: %s", self.path, failure.strerror)
