"""Checkpoints on disk: their names, which exist, and whether one is undamaged.

`checkpoints/step-N/` holds `state.safetensors` (fp32; names in `keys.py`), `state.json`, and `SHA256SUMS` of both,
which `sha256sum -c` checks too. `best-N/` is the checkpoint with the lowest held-out loss so far. A folder called
`*.tmp` is incomplete or being removed, one called `*.damaged` failed its check.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from dynrank_ds.errors import RunError
from dynrank_ds.files import write_synced
from dynrank_ds.shared_disk import patiently
from dynrank_ds.tensorfile import file_sha256

FORMAT = 2
TENSORS, STATE, SUMS = "state.safetensors", "state.json", "SHA256SUMS"
STEP, BEST = "step", "best"
_SUMS = re.compile(rf"([0-9a-f]{{64}})  {TENSORS}\n([0-9a-f]{{64}})  {STATE}\n".encode())

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps applied."""
    batch: int = 0
    """Global batches consumed: larger than `step` by the number of discarded ones."""


def checkpoint_path(run: Path, kind: str, step: int) -> Path:
    """Return the folder of the checkpoint of a kind, STEP or BEST, at an optimizer step."""
    return run / "checkpoints" / f"{kind}-{step}"


def complete_checkpoints(run: Path, kind: str = STEP) -> list[Path]:
    """Return the run's checkpoints of a kind, the newest first; damaged ones too."""
    found = [(int(match[1]), path) for path in _folders(run) if (match := _match(path, kind))]
    return [path for _, path in sorted(found, reverse=True)]


def incomplete_checkpoints(run: Path) -> list[Path]:
    """Return the folders that a killed run was writing or removing."""
    return [path for path in _folders(run) if path.suffix == ".tmp"]


def newest_checkpoint(run: Path) -> Path:
    """Return the complete checkpoint of the largest step.

    Raises:
        RunError: there is none.
    """
    found = complete_checkpoints(run)
    if not found:
        raise RunError(
            f"{run / 'checkpoints'} holds no complete checkpoint (step-N): give the directory of a training run"
        )
    return found[0]


def newest_undamaged(run: Path, kind: str = STEP) -> Path | None:
    """Return the newest checkpoint that passes its check, or None; log a warning for each that does not.

    Raises:
        RunError: it has another format.
    """
    for path in complete_checkpoints(run, kind):
        try:
            check(path)
        except RunError as error:
            logger.warning("%s; trying the previous one", error)
        else:
            read_state(path)
            return path
    return None


def remove(checkpoints: Iterable[Path]) -> None:
    """Remove folders under a temporary name, so that a partly removed one is not taken for a checkpoint.

    One that cannot be removed, for instance because another host on a network file system reads it, is left in place
    with a warning.
    """
    for path in checkpoints:
        temporary = path if path.suffix == ".tmp" else path.with_name(f"{path.name}.old.tmp")
        try:
            path.rename(temporary)
            shutil.rmtree(temporary)
        except OSError as error:
            logger.warning("%s could not be removed: %s", path, error)


def rename_damaged(checkpoints: Iterable[Path], undamaged: Path | None) -> None:
    """Rename the checkpoints that come before `undamaged` to `*.damaged`: new ones take their names."""
    for path in takewhile(lambda path: path != undamaged, checkpoints):
        renamed = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(renamed, ignore_errors=True)
        path.rename(renamed)


def write_sums(checkpoint: Path) -> None:
    """Write SHA256SUMS of a checkpoint whose other files are written."""
    sums = [f"{file_sha256(checkpoint / name)}  {name}\n" for name in (TENSORS, STATE)]
    write_synced(checkpoint / SUMS, "".join(sums))


def check(checkpoint: Path) -> None:
    """Compare every file with SHA256SUMS.

    Raises:
        RunError: one is missing or differs.
    """
    _check(checkpoint, STATE)
    check_tensors(checkpoint)


def check_tensors(checkpoint: Path) -> Path:
    """Return the path of the tensor file after comparing it with SHA256SUMS.

    Raises:
        RunError: it is missing or differs.
    """
    return _check(checkpoint, TENSORS)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the content of state.json after comparing it with SHA256SUMS.

    Raises:
        RunError: it is missing, damaged or of another format.
    """
    path = _check(checkpoint, STATE)
    try:
        state = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is no JSON ({error}), although it has its sum") from error
    if not isinstance(state, dict):
        raise RunError(f"{path} holds {type(state).__name__}, not an object")
    if state.get("format") != FORMAT:
        raise RunError(
            f"{checkpoint / STATE} has format {state.get('format')!r}: this version reads format {FORMAT}"
        )
    return state


def _folders(run: Path) -> list[Path]:
    folder = run / "checkpoints"
    return patiently(lambda: list(folder.iterdir()) if folder.is_dir() else [], folder)


def _match(path: Path, kind: str) -> re.Match[str] | None:
    return re.fullmatch(rf"{kind}-(\d+)", path.name)


def _check(checkpoint: Path, name: str) -> Path:
    path = checkpoint / name
    for file in (path, checkpoint / SUMS):
        if file.exists() and not file.is_file():  # a pipe or a device, which could be read for ever
            raise RunError(f"the checkpoint {checkpoint} is damaged: {file.name} is no file")
    try:
        sums = _SUMS.fullmatch(patiently((checkpoint / SUMS).read_bytes, checkpoint))
        digest = patiently(lambda: file_sha256(path), path).encode()
    except OSError as error:
        raise RunError(f"the checkpoint {checkpoint} is damaged: {error}") from error
    if sums is None:
        raise RunError(f"the checkpoint {checkpoint} is damaged: {SUMS} does not hold two sums")
    if digest != sums[{TENSORS: 1, STATE: 2}[name]]:
        raise RunError(f"the checkpoint {checkpoint} is damaged: {name} differs from its sum in {SUMS}")
    return path
