"""Output folders that appear whole or not at all, and replace nothing but an earlier output of the same."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dynrank_ds.errors import RunError
from dynrank_ds.files import read_json, sync

RECORD = "dynrank.json"
_UNFINISHED = ".dynrank-unfinished"
"""Marks a folder that may be removed: one that is being written, or is being replaced."""
_HINT = "name a folder that is new or empty"


@contextmanager
def staged_folder(
    output: Path,
    record: Mapping[str, object],
    same: Callable[[Mapping[str, Any]], bool],
    inputs: Sequence[Path] = (),
) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `output` once the `with` block ends without an error.

    `record` is written beside the files as dynrank.json, with the name, size and time of each file: a later call
    replaces the folder if it holds these and nothing else.

    Args:
        output: the folder to make.
        record: where the files come from.
        same: whether the record of a folder that is there says that the same command made it of the same source.
        inputs: folders that the files are made from.

    Raises:
        RunError: `output` is a file, an input, made by something else, or holds files that were added or changed.
    """
    output = output.resolve()
    for folder in inputs:
        _refuse_input(output, folder)
    _refuse_others_work(output, same)
    staging, replaced = (output.with_name(f".{output.name}.{end}") for end in ("tmp", "old"))
    for path in (staging, replaced):
        _remove_leftover(path)
    staging.mkdir(parents=True)
    (staging / _UNFINISHED).touch()
    try:
        yield staging
        files = {path.name: _stamp(path) for path in sorted(staging.iterdir()) if path.name != _UNFINISHED}
        (staging / RECORD).write_text(json.dumps({**record, "files": files}, indent=2) + "\n")
        for path in [*staging.iterdir(), staging]:
            sync(path)
        if output.exists():
            # Aside first, marked for removal: a folder half removed would look like another's.
            (output / _UNFINISHED).touch()
            output.rename(replaced)
        staging.rename(output)
        sync(output.parent)
        (output / _UNFINISHED).unlink()
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_record(folder: Path) -> dict[str, Any]:
    """Return what dynrank.json of a folder says; {} where there is none, as in adapters of PEFT's.

    Raises:
        RunError: it is damaged.
    """
    path = folder / RECORD
    record = read_json(path) if path.is_file() else {}
    if not isinstance(record, dict):
        raise RunError(f"{path} holds {type(record).__name__}, not an object")
    return record


def _refuse_input(output: Path, folder: Path) -> None:
    folder = folder.resolve()
    read_from = (
        {folder, *(path.resolve().parent for path in folder.iterdir())} if folder.is_dir() else {folder}
    )
    if output in read_from:
        raise RunError(f"The output folder {output} is one that is read from ({folder}): {_HINT}")


def _refuse_others_work(output: Path, same: Callable[[Mapping[str, Any]], bool]) -> None:
    if output.exists() and not output.is_dir():
        raise RunError(f"The output {output} is a file: {_HINT}")
    present = {path.name: path for path in output.iterdir()} if output.is_dir() else {}
    if not present:
        return
    record = read_json(output / RECORD) if RECORD in present else None
    if not isinstance(record, dict) or "files" not in record:
        raise RunError(
            f"The output folder {output} holds {min(present)}, which this command did not write: {_HINT}"
        )
    if not same(record):
        raise RunError(
            f"The output folder {output} was made of something else, as its {RECORD} says: {_HINT}"
        )
    files = record["files"]
    for name, path in sorted(present.items()):
        if name not in (RECORD, _UNFINISHED) and name not in files:
            raise RunError(
                f"The output folder {output} holds {name}, which this command did not write: {_HINT}"
            )
        # Records of earlier versions list names alone.
        if isinstance(files, dict) and name in files and files[name] != _stamp(path):
            raise RunError(
                f"The output folder {output} holds {name}, which was changed since it was written: {_HINT}"
            )


def _remove_leftover(path: Path) -> None:
    """Remove what a call that was killed left under a name that only this module gives."""
    if not path.exists():
        return
    if not path.is_dir() or (any(path.iterdir()) and not (path / _UNFINISHED).exists()):
        raise RunError(f"{path} is in the way and was not made by this command: move it")
    shutil.rmtree(path)


def _stamp(path: Path) -> list[int]:
    """Return size and time of the last change."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
