"""Files that a kill or a power cut leaves whole: the old content or the new, never half of one."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from dynrank_ds.errors import RunError
from dynrank_ds.shared_disk import patiently

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors of writing that making room mends."""


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        RunError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bytes that are no text too
        raise RunError(f"{path} is no JSON ({error}): is it cut short?") from error


def sync(path: Path) -> None:
    """Wait until the disk has a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """Write a file that nobody reads yet, and waits until the disk has it."""
    path.write_text(text)
    sync(path)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file that nobody else writes; what a failed try has written of it is cut off."""
    start: int | None = None

    def append() -> None:
        nonlocal start
        with path.open("ab") as file:
            if start is None:
                start = file.tell()
            else:
                file.truncate(start)
            file.write(line.encode() + b"\n")

    patiently(append, path)


def replace_text(path: Path, text: str) -> None:
    """Give a file, new or old, this content at once; where the disk is full, it keeps the content that it has."""
    patiently(lambda: _replace_text(path, text), path)


def _replace_text(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        write_synced(unfinished, text)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)
