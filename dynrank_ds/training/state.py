"""state.json of a run directory: how the run stands or ended, for scripts."""

from __future__ import annotations

import json
import logging
import threading
from datetime import datetime, timezone
from pathlib import Path

from dynrank_ds.checkpoint.files import BEST, STEP, Progress, complete_checkpoints
from dynrank_ds.errors import RunError
from dynrank_ds.files import read_json, replace_text
from dynrank_ds.training.rundir import STATE, RunDirectory

STARTING, RUNNING, STOPPED, FINISHED, FAILED = "starting", "running", "stopped", "finished", "failed"
HOW_TO_RESUME = "resume with the same command and resume=auto"

logger = logging.getLogger(__name__)


class RunState:
    """The state of a run, from when its recipe, data and checkpoint were accepted; before that, nothing is written.

    A run that was killed leaves `starting` or `running` behind.
    """

    def __init__(self, run: Path) -> None:
        self.directory = RunDirectory(run)
        self.path = run / STATE
        self._progress: Progress | None = None
        self._total_steps: int | None = None
        self._writing = threading.RLock()
        """An early stop is written by another thread than the rest."""
        self._is_last = False

    def begin(self, progress: Progress, total_steps: int) -> None:
        """Note where the run stands; `progress` is read again at its end. Every process must call it."""
        self._progress, self._total_steps = progress, total_steps

    def write(self, state: str, how_to_continue: str, error: str | None = None) -> None:
        """Replace the file; one process must call it. After an early stop nothing is written any more."""
        with self._writing:
            if not self._is_last:
                self._write(state, how_to_continue, error)

    def _write(self, state: str, how_to_continue: str, error: str | None) -> None:
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
        """Write `failed`, of a run that was accepted; a disk on which that is impossible is no second failure."""
        if self._progress is None or not self.path.parent.is_dir():  # which goes where no step was made
            return
        try:
            self.write(FAILED, f"see to the error, then {HOW_TO_RESUME}", error)
        except OSError as failure:
            self._warn(failure)

    def write_early_stop(self) -> None:
        """Write `stopped`, of a run whose training has not begun, unless another run is in its directory."""
        with self._writing:
            try:
                if self._progress is None:
                    if not (self.directory.is_locked or self.directory.lock()):
                        return
                    self._progress = Progress(_newest_step(self.directory.path))
                    self._total_steps = _total_steps_so_far(self.path)
                self.write(STOPPED, HOW_TO_RESUME)
            except OSError as failure:
                self._warn(failure)
            self._is_last = True

    def unlock(self) -> None:
        """Let other runs into the directory; after an early stop, whose state stays there, the process's end does."""
        with self._writing:
            if not self._is_last:
                self.directory.unlock()

    def _warn(self, failure: OSError) -> None:
        logger.warning("%s could not be written: %s", self.path, failure.strerror)


def _total_steps_so_far(state: Path) -> int | None:
    """Return what the run said of its length when it trained before; None where it has not."""
    try:
        total: int | None = read_json(state).get("total_steps") if state.is_file() else None
    except RunError:  # what is no JSON is replaced; an early stop must end its process
        return None
    return total


def _newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint, 0 where there is none."""
    saved = [path for kind in (STEP, BEST) for path in complete_checkpoints(run, kind)]
    return max((int(path.name.split("-")[1]) for path in saved), default=0)
