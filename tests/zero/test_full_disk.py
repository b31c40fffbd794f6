"""A disk that is full ends the run with one sentence and leaves the checkpoints that were there whole."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynrank_ds.checkpoint.files import check, complete_checkpoints
from tests.support.launch import (
    Started,
    reported_errors,
    start_processes,
    train,
    train_command,
    wait,
    wait_until,
)
from tests.support.recipes import STEPS, lines, write_recipe

OPTIONS = ("train.checkpoint_interval=4", "train.checkpoints_kept=9")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def with_a_checkpoint(recipe: Path, run: Path) -> list[Started]:
    """Processes of a run that has written one."""
    command = train_command(recipe, f"output.dir={run}", *OPTIONS)
    processes = start_processes(2, command, recipe.parent / "logs")
    wait_until(lambda: complete_checkpoints(run), processes)
    return processes


def assert_reported_and_whole(processes: list[Started], run: Path, why: str) -> None:
    wait(processes)
    assert [process.returncode for process in processes] == [2, 2], [p.output for p in processes]
    [message] = reported_errors(processes)
    assert "could not be written" in message and why in message
    assert "Traceback" not in processes[0].output + processes[1].output
    left = complete_checkpoints(run)
    assert left and not [path for path in run.rglob("*.tmp")]
    for checkpoint in left:
        check(checkpoint)


def assert_goes_on(recipe: Path, run: Path) -> None:
    train(2, recipe, f"output.dir={run}", *OPTIONS, "resume=auto")
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, STEPS + 1))


def test_a_checkpoint_that_does_not_fit_is_reported_and_the_run_continues_once_there_is_room(
    tmp_path: Path, small_disk: Path
) -> None:
    recipe, run = write_recipe(tmp_path), small_disk / "run"
    processes = with_a_checkpoint(recipe, run)
    disk = os.statvfs(small_disk)
    with (small_disk / "filler").open("wb") as filler:  # all but a few modules, for the log
        os.posix_fallocate(filler.fileno(), 0, (disk.f_bavail - 4) * disk.f_bsize)
    assert_reported_and_whole(processes, run, "No space left on device")
    (small_disk / "filler").unlink()
    assert_goes_on(recipe, run)


def test_a_checkpoint_over_the_limit_of_a_file_is_reported_and_the_run_continues_without_it(
    tmp_path: Path,
) -> None:
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    processes = with_a_checkpoint(recipe, run)
    for process in processes:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
    assert_reported_and_whole(processes, run, "File too large")
    assert_goes_on(recipe, run)


def test_a_log_that_cannot_grow_is_reported(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    processes = start_processes(2, train_command(recipe, "train.steps=5000"), tmp_path / "logs")
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and metrics.stat().st_size, processes)
    resource.prlimit(processes[0].pid, resource.RLIMIT_FSIZE, (metrics.stat().st_size + 900,) * 2)
    wait(processes)
    assert [process.returncode for process in processes] == [2, 1], [p.output for p in processes]
    first, second = (process.output for process in processes)
    assert f"error: {tmp_path / 'run'}: File too large; checkpoints are undamaged: free disk space" in first
    assert "process 0" in second and "Traceback" not in first + second
