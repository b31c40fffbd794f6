"""The training command in which one process kills itself: POINT STEP PROCESS (or all), then the command's arguments.

It happens the first time the point is passed in a step of at least STEP. Where DYNRANK_TEST_WAIT names a folder, the
process waits there instead: it makes the file `reached`, and goes on once there is a file `go`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

from dynrank_ds.checkpoint import files, writing
from dynrank_ds.export import folder
from dynrank_ds.tensorfile import TensorFileWriter
from dynrank_ds.training import run, rundir
from dynrank_ds.training.loop import Trainer
from dynrank_ds.zero import engine, peer_failure
from tests.support.launch import ROOT, run_script

POINT, STEP, PROCESS = sys.argv[1], int(sys.argv[2]), sys.argv[3]
WAIT_IN = os.environ.get("DYNRANK_TEST_WAIT")

step = 0


def die() -> None:
    if step >= STEP and PROCESS in (os.environ["RANK"], "all"):
        if WAIT_IN is None:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            wait_in(Path(WAIT_IN))


def wait_in(folder: Path) -> None:
    (folder / "reached").touch()
    while not (folder / "go").exists():
        time.sleep(0.05)


def before(owner: Any, name: str) -> None:
    original = getattr(owner, name)

    @wraps(original)
    def dying(*arguments: Any, **options: Any) -> Any:
        die()
        return original(*arguments, **options)

    setattr(owner, name, dying)


def after(owner: Any, name: str) -> None:
    original = getattr(owner, name)

    @wraps(original)
    def dying(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        die()
        return result

    setattr(owner, name, dying)


def half_a_line(self: rundir.RunDirectory, name: str, values: dict[str, Any]) -> None:
    with (self.path / name).open("a") as file:
        text = rundir.json.dumps(values) + "\n"
        file.write(text[: len(text) // 2])
        file.flush()
        die()
        file.write(text[len(text) // 2 :])


def half_a_text(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text[: len(text) // 2])
    die()
    rundir_replace_text(path, text)


def half_removed(checkpoints: Iterable[Path]) -> None:
    for path in checkpoints:
        (path / "state.json").unlink(missing_ok=True)
        aside = path.with_name(f"{path.name}.old.tmp")
        path.rename(aside)
        die()
        files_remove([aside])


files_remove, rundir_replace_text = files.remove, rundir.replace_text

POINTS: dict[str, Callable[[], Any]] = {
    "before the model is loaded": lambda: before(run, "load_model"),
    "in a forward": lambda: before(engine.ZeroEngine, "__call__"),
    "after a backward": lambda: after(engine.ZeroEngine, "backward"),
    "after an optimizer step": lambda: after(engine.ZeroEngine, "step"),
    "before an adjustment": lambda: before(engine.ZeroEngine, "resize"),
    "with changed modules gathered": lambda: after(engine, "migrate"),
    "before the engine is rebuilt": lambda: before(engine.ZeroEngine, "_build"),
    "after an adjustment": lambda: after(engine.ZeroEngine, "resize"),
    "with a checkpoint's folder made": lambda: after(writing._Writer, "_open"),
    "with one tensor written": lambda: after(TensorFileWriter, "write"),
    "with all tensors written": lambda: before(writing._Writer, "publish"),
    "before the sums": lambda: before(files, "write_sums"),
    "before the rename": lambda: after(files, "write_sums"),
    "after the rename": lambda: after(writing._Writer, "publish"),
    "after the checkpoint": lambda: after(writing, "save"),
    "while an old checkpoint is removed": lambda: setattr(files, "remove", half_removed),
    "with half a line logged": lambda: setattr(rundir.RunDirectory, "_append", half_a_line),
    "with half a recipe written": lambda: setattr(rundir, "replace_text", half_a_text),
    "with the adapter written but not renamed": lambda: after(folder, "sync"),
    "with the adapter exported": lambda: after(run, "export_checkpoint"),
    "nowhere": lambda: None,
}


class Counting(Trainer):
    """Tells `die` where the run is."""

    def _step(self, indices: Any) -> Any:
        global step
        step = self.progress.step + 1
        return super()._step(indices)


if __name__ == "__main__":
    POINTS[POINT]()
    run.Trainer = Counting  # type: ignore[misc]
    if WAIT_IN is None:
        peer_failure.GRACE = 1.0
    run_script(str(ROOT / "launcher/train.py"), *sys.argv[4:])
