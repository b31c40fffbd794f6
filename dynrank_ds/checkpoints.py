"""A checkpoint on disk: where the newest is, what it says, and whether it is whole.

`checkpoints/step-N/` holds `state.safetensors` (fp32, names like `master/BLOCK.lora_A`) and `state.json`.
While being written it is called `step-N.tmp`. Training writes and restores it, export reads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynrank_ds.errors import RunError
from dynrank_ds.tensorfile import file_sha256

FORMAT = 1
TENSORS, STATE = "state.safetensors", "state.json"


def newest_checkpoint(run: Path) -> Path:
    """The finished checkpoint of the largest step.

    Raises:
        RunError: there is none.
    """
    found = find_newest(run)
    if found is None:
        raise RunError(
            f"{run / 'checkpoints'} holds no finished checkpoint (step-N): name the folder of a training run"
        )
    return found


def find_newest(run: Path) -> Path | None:
    """The finished checkpoint of the largest step, or None."""
    found = [p for p in (run / "checkpoints").glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return max(found, key=lambda p: int(p.name.removeprefix("step-")), default=None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The content of state.json.

    Raises:
        RunError: it is missing, unreadable or of another format.
    """
    path = checkpoint / STATE
    try:
        state: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(
            f"{path} cannot be read, so {checkpoint} is not a finished checkpoint: {error}"
        ) from error
    if state.get("format") != FORMAT:
        raise RunError(f"{path} has format {state.get('format')!r}: this version reads format {FORMAT}")
    return state


def check_tensors(checkpoint: Path, state: dict[str, Any]) -> Path:
    """The path of the tensor file, whose checksum is that of state.json.

    Raises:
        RunError: it is missing or differs.
    """
    path = checkpoint / TENSORS
    if not path.is_file():
        raise RunError(f"{path} does not exist: {checkpoint} is not a finished checkpoint")
    if file_sha256(path) != state["sha256"]:
        raise RunError(f"{path} differs from its sha256 in {STATE}: the checkpoint is damaged")
    return path
