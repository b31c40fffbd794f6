"""The training command on a disk that fails for a while at some points: RUN ERRNO, then the command's arguments.

While it fails, no file in RUN can be opened, renamed, listed or flushed, and what is open can be neither read nor
written: each such call raises ERRNO.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import time
from functools import wraps
from typing import Any

from dynrank_ds import shared_disk
from dynrank_ds.export import folder
from dynrank_ds.tensorfile import TensorFileReader, TensorFileWriter
from dynrank_ds.training import resume, rundir
from tests.support.launch import ROOT, run_script

RUN, NUMBER = sys.argv[1], getattr(errno, sys.argv[2])
SECONDS = 0.5

failing_until = 0.0
points_passed: set[str] = set()


def fail_for_a_while(point: str) -> None:
    """The first time that this process is there."""
    global failing_until
    if point not in points_passed:
        points_passed.add(point)
        failing_until = time.monotonic() + SECONDS


def fail_if_it_is_time(path: object) -> None:
    if time.monotonic() < failing_until and str(path).startswith(RUN):
        raise OSError(NUMBER, os.strerror(NUMBER), str(path))


def failing(owner: Any, name: str) -> None:
    """Makes a function of a path fail, whose first argument that is one may be a file descriptor."""
    original = getattr(owner, name)

    @wraps(original)
    def call(*arguments: Any, **options: Any) -> Any:
        first = arguments[0]
        fail_if_it_is_time(os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else first)
        return original(*arguments, **options)

    setattr(owner, name, call)


def failing_method(owner: Any, name: str) -> None:
    original = getattr(owner, name)

    @wraps(original)
    def call(self: Any, *arguments: Any) -> Any:
        if name == "_read_at" and not self._is_stale:
            if str(self._path).startswith(RUN):
                fail_for_a_while("the first read of a tensor")
            try:
                fail_if_it_is_time(self._path)
            except OSError:
                self._is_stale = True
                raise
        fail_if_it_is_time(self._path)
        return original(self, *arguments)

    setattr(owner, name, call)


def before(owner: Any, name: str) -> None:
    """The disk begins to fail when this function is called first."""
    original = getattr(owner, name)

    @wraps(original)
    def call(*arguments: Any, **options: Any) -> Any:
        fail_for_a_while(name)
        return original(*arguments, **options)

    setattr(owner, name, call)


if __name__ == "__main__":
    shared_disk.PAUSE = 0.1
    for module, names in (
        (io, ["open"]),
        (os, ["rename", "replace", "fsync", "mkdir", "listdir", "scandir"]),
    ):
        for name in names:
            failing(module, name)
    failing_method(TensorFileWriter, "write")
    failing_method(TensorFileReader, "_read_at")
    before(rundir.RunDirectory, "log_step")
    before(rundir.RunDirectory, "log_adjustment")
    before(TensorFileWriter, "write")
    before(TensorFileWriter, "close")
    before(folder, "sync")
    before(resume.files, "newest_undamaged")
    run_script(str(ROOT / "launcher/train.py"), *sys.argv[3:])
