"""A shared disk that fails for a while: the run waits for it, says so, and ends as if nothing had been."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dynrank_ds import shared_disk
from dynrank_ds.checkpoint.files import check, newest_undamaged
from dynrank_ds.files import append_line, replace_text
from dynrank_ds.tensorfile import TensorEntry, TensorFileReader, TensorFileWriter
from tests.support.launch import Started, start_processes, train_command, wait
from tests.support.recipes import STEPS, copy_stopped
from tests.zero.test_kills import check_the_same_run

EVERY_TWO = "train.checkpoint_interval=2"


def trained(uninterrupted: Path, run: Path, number: str) -> list[Started]:
    """The whole run, or what is left of it, on a disk that fails with this error now and then."""
    _, *arguments = train_command(
        uninterrupted / "recipe.yaml", EVERY_TWO, f"output.dir={run}", "resume=auto"
    )
    command = ["-m", "tests.zero.workers.faulty", str(run), number, *arguments]
    processes = start_processes(2, command, uninterrupted / "logs")
    wait(processes)
    assert [process.returncode for process in processes] == [0, 0], [p.output for p in processes]
    return processes


@pytest.mark.parametrize("number", ["ESTALE", pytest.param("EIO", marks=pytest.mark.slow)])
def test_a_run_on_it_is_the_run_on_a_disk_that_works(number: str, uninterrupted: Path) -> None:
    run = uninterrupted / f"faulty-{number}"
    first, _ = trained(uninterrupted, run, number)
    said = [line for line in first.output.splitlines() if "it is tried again for up to" in line]
    for name in ("metrics.jsonl", "ranks.jsonl", "checkpoint", "adapter"):
        assert any(name in line for line in said), (name, first.output)
    assert os.strerror(getattr(errno, number)) in said[0]
    check_the_same_run(run, uninterrupted)
    for checkpoint in (run / "checkpoints").iterdir():
        check(checkpoint)


def test_a_checkpoint_that_cannot_be_read_for_a_while_is_not_taken_for_a_damaged_one(
    uninterrupted: Path,
) -> None:
    run = copy_stopped(uninterrupted / "run", uninterrupted / "faulty-resumed", 10)
    processes = trained(uninterrupted, run, "ESTALE")
    assert "resumed from" in processes[0].output and "step-10" in processes[0].output
    # Each process reads the checkpoint, and says what it waits for.
    for process in processes:
        assert "state.safetensors: Stale file handle; it is tried again" in process.output
    assert not [*run.rglob("*.damaged")]
    check_the_same_run(run, uninterrupted)


class Failing:
    """Raises the error so many times, then calls the function."""

    def __init__(self, function: Any, times: int, number: int = errno.EIO) -> None:
        self.function, self.left, self.number = function, times, number

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left >= 0:
            raise OSError(self.number, os.strerror(self.number))
        return self.function(*arguments, **options)


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(shared_disk, "PAUSE", 0.0)
    return monkeypatch


def test_an_error_that_does_not_pass_is_raised_after_the_time_for_it(
    no_pause: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert shared_disk.PATIENCE == 120
    no_pause.setattr(shared_disk, "PATIENCE", 0.05)
    with caplog.at_level(logging.WARNING), pytest.raises(OSError, match="Input/output error"):
        shared_disk.patiently(Failing(None, 10**9), "the disk")
    assert caplog.messages[0].startswith("the disk: Input/output error; it is tried again for up to 0 s")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.ENOENT, errno.EISDIR])
def test_other_errors_are_raised_at_once(number: int, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OSError):
        shared_disk.patiently(Failing(None, 1, number), "the disk")
    assert not caplog.messages


def test_a_line_that_was_half_written_is_written_once(no_pause: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "log"
    append_line(path, "one")
    opened, calls = Path.open, 0

    def writing_two_bytes_first(self: Path, mode: str) -> Any:
        nonlocal calls
        calls += 1
        file = opened(self, mode)
        return CutShort(file) if calls == 1 else file

    no_pause.setattr(Path, "open", writing_two_bytes_first)
    append_line(path, "two")
    no_pause.undo()
    assert path.read_text() == "one\ntwo\n"


class CutShort:
    """A file of which a write fails after two bytes."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> CutShort:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def tell(self) -> int:
        return int(self.file.tell())

    def write(self, data: bytes) -> None:
        self.file.write(data[:2])
        raise OSError(errno.EIO, "Input/output error")


def test_a_file_is_replaced_once_the_disk_is_there_again(
    no_pause: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_pause.setattr(os, "fsync", Failing(os.fsync, 3, errno.ESTALE))
    replace_text(tmp_path / "state.json", "new")
    assert (tmp_path / "state.json").read_text() == "new" and len([*tmp_path.iterdir()]) == 1


def test_a_tensor_is_read_through_a_new_handle_where_the_old_one_is_stale(
    no_pause: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, value = tmp_path / "f", torch.arange(12.0)
    with TensorFileWriter(path, [TensorEntry("x", torch.float32, (12,))]) as writer:
        writer.write("x", value)
    with TensorFileReader(path) as reader:
        # A handle that no read succeeds with any more, as of a server that forgot it.
        os.close(reader._file.fileno())
        directory = os.open(tmp_path, os.O_RDONLY)
        assert directory == reader._file.fileno()
        no_pause.setattr(shared_disk, "PASSING", (*shared_disk.PASSING, errno.EISDIR))
        assert torch.equal(reader.read("x"), value)


def test_a_checkpoint_on_a_part_of_a_disk_that_is_broken_for_good_counts_as_damaged(
    no_pause: pytest.MonkeyPatch, uninterrupted: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(uninterrupted / "run", tmp_path / "run")
    no_pause.setattr(shared_disk, "PATIENCE", 0.0)
    newest = run / "checkpoints" / f"step-{STEPS}" / "state.safetensors"
    opened = Path.open

    def broken(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == newest:
            raise OSError(errno.EIO, "Input/output error")
        return opened(self, *arguments, **options)

    no_pause.setattr(Path, "open", broken)
    assert newest_undamaged(run) == run / "checkpoints/step-10"
