"""Checkpoints on disk: their names, which there are, and whether one is whole.

`checkpoints/step-N/` holds `state.safetensors` (fp32, names like `master/MODULE.lora_A`), `state.json`, and
`SHA256SUMS` of both, which `sha256sum -c` checks too. `best-N/` is that of the lowest held-out loss so far. A folder
called `*.tmp` is unfinished or on its way out, one called `*.damaged` was found so. Training writes and restores
checkpoints, export reads them.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from dynrank_ds.errors import RunError
from dynrank_ds.files import write_synced
from dynrank_ds.tensorfile import file_sha256

FORMAT = 2
TENSORS, STATE, SUMS = "state.safetensors", "state.json", "SHA256SUMS"
STEP, BEST = "step", "best"
_SUMS = re.compile(rf"([0-9a-f]{{64}})  {TENSORS}\n([0-9a-f]{{64}})  {STATE}\n".encode())

logger = logging.getLogger(__name__)


def finished(run: Path, kind: str = STEP) -> list[Path]:
    """The run's checkpoints of a kind, STEP or BEST, the newest first; damaged ones too."""
    found = [(int(match[1]), path) for path in _folder(run) if (match := _name(path, kind))]
    return [path for _, path in sorted(found, reverse=True)]


def leftovers(run: Path) -> list[Path]:
    """What a run that was killed left unfinished, of writing a checkpoint or of removing one."""
    return [path for path in _folder(run) if path.suffix == ".tmp"]


def newest_checkpoint(run: Path) -> Path:
    """The finished checkpoint of the largest step.

    Raises:
        RunError: there is none.
    """
    found = finished(run)
    if not found:
        raise RunError(
            f"{run / 'checkpoints'} holds no finished checkpoint (step-N): name the folder of a training run"
        )
    return found[0]


def newest_whole(run: Path, kind: str = STEP) -> Path | None:
    """The newest checkpoint that is as it was written, or None; a warning tells of each that is not.

    Raises:
        RunError: it is of another format.
    """
    for path in finished(run, kind):
        try:
            check(path)
        except RunError as error:
            logger.warning("%s; trying the one before", error)
        else:
            read_state(path)
            return path
    return None


def seal(checkpoint: Path) -> None:
    """Writes SHA256SUMS of a checkpoint whose files are there."""
    sums = [f"{file_sha256(checkpoint / name)}  {name}\n" for name in (TENSORS, STATE)]
    write_synced(checkpoint / SUMS, "".join(sums))


def check(checkpoint: Path) -> None:
    """Compares every file with SHA256SUMS.

    Raises:
        RunError: one is missing or differs.
    """
    _check(checkpoint, STATE)
    check_tensors(checkpoint)


def check_tensors(checkpoint: Path) -> Path:
    """The path of the tensor file, whose checksum is that of SHA256SUMS.

    Raises:
        RunError: it is missing or differs.
    """
    return _check(checkpoint, TENSORS)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The content of state.json, whose checksum is that of SHA256SUMS.

    Raises:
        RunError: it is missing, damaged or of another format.
    """
    state: dict[str, Any] = json.loads(_check(checkpoint, STATE).read_bytes())
    if state.get("format") != FORMAT:
        raise RunError(
            f"{checkpoint / STATE} has format {state.get('format')!r}: this version reads format {FORMAT}"
        )
    return state


def _folder(run: Path) -> list[Path]:
    folder = run / "checkpoints"
    return list(folder.iterdir()) if folder.is_dir() else []


def _name(path: Path, kind: str) -> re.Match[str] | None:
    return re.fullmatch(rf"{kind}-(\d+)", path.name)


def _check(checkpoint: Path, name: str) -> Path:
    path = checkpoint / name
    try:
        sums = _SUMS.fullmatch((checkpoint / SUMS).read_bytes())
        digest = file_sha256(path).encode()
    except OSError as error:
        raise RunError(f"the checkpoint {checkpoint} is damaged: {error}") from error
    if sums is None:
        raise RunError(f"the checkpoint {checkpoint} is damaged: {SUMS} is not two sums")
    if digest != sums[{TENSORS: 1, STATE: 2}[name]]:
        raise RunError(f"the checkpoint {checkpoint} is damaged: {name} differs from its sum in {SUMS}")
    return path
