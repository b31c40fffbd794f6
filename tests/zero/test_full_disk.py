"""A disk that is full ends the run with one sentence and leaves the checkpoints that were there whole."""

from __future__ import annotations

import resource
from pathlib import Path

from dynrank_ds.checkpoints import check, finished
from tests.support.launch import errors_told, start_processes, train, train_command, wait, wait_until
from tests.support.recipes import STEPS, lines, write_recipe


def test_a_checkpoint_that_does_not_fit_is_told_and_the_run_goes_on_once_there_is_room(
    tmp_path: Path,
) -> None:
    recipe = write_recipe(tmp_path)
    options = ("train.checkpoint_interval=4", "train.checkpoints_kept=9")
    processes = start_processes(2, train_command(recipe, *options), tmp_path / "logs")
    run = tmp_path / "run"
    wait_until(lambda: finished(run), processes)
    for process in processes:  # no file may grow beyond this, as on a full disk
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
    wait(processes)
    assert [process.returncode for process in processes] == [2, 2], [p.output for p in processes]
    told = errors_told(processes)
    assert len(told) == 1 and "could not be written" in told[0] and "File too large" in told[0]
    assert "Traceback" not in processes[0].output + processes[1].output
    left = finished(run)
    assert left and not [path for path in run.rglob("*.tmp")]
    for checkpoint in left:
        check(checkpoint)
    train(2, recipe, *options, "resume=auto")
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, STEPS + 1))


def test_a_log_that_cannot_grow_is_told(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    processes = start_processes(2, train_command(recipe, "train.steps=5000"), tmp_path / "logs")
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and metrics.stat().st_size, processes)
    resource.prlimit(processes[0].pid, resource.RLIMIT_FSIZE, (metrics.stat().st_size + 900,) * 2)
    wait(processes)
    assert [process.returncode for process in processes] == [2, 1], [p.output for p in processes]
    first, second = (process.output for process in processes)
    assert f"error: {tmp_path / 'run'}: File too large; checkpoints are whole: make room" in first
    assert "process 0" in second and "Traceback" not in first + second
