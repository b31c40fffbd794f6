"""The triples that a PiSSA run began with: stored once in the run directory, and never changed.

`initial.safetensors` holds them in the dtype in which they are subtracted; every checkpoint names the file's SHA-256
and, per module, which of them are still subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from dynrank_ds.adapters.linear import FACTORS
from dynrank_ds.checkpoint.keys import factor_key
from dynrank_ds.errors import RunError
from dynrank_ds.files import sync
from dynrank_ds.tensorfile import TensorEntry, TensorFileReader, TensorFileWriter, file_sha256

INITIAL = "initial.safetensors"
UNFINISHED = f"{INITIAL}.tmp"
IN_STATE = "initial_triples"
"""Key of state.json that holds the hash of the file; absent in runs without one."""
INITIAL_OF = "initial_of"
"""Key of a module in state.json: for each triple the number of the initial triple that is subtracted beside it."""
_KEY = "initial"


class InitialWriter:
    """Writes the triples module by module under a temporary name, which `publish` changes.

    shapes: of every factor of every module.
    """

    def __init__(
        self, run: Path, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], dtype: torch.dtype
    ) -> None:
        entries = [
            TensorEntry(factor_key(_KEY, module, factor), dtype, shape)
            for module, factors in shapes.items()
            for factor, shape in factors.items()
            if math.prod(shape)
        ]
        self._file = TensorFileWriter(run / UNFINISHED, entries)

    def write(self, module: str, factors: Mapping[str, Tensor]) -> None:
        for factor, value in factors.items():
            self._file.write(factor_key(_KEY, module, factor), value)

    def close(self) -> None:
        self._file.close()


def publish(run: Path) -> str:
    """Give the file of a run, which is whole, its name; return its SHA-256."""
    (run / UNFINISHED).replace(run / INITIAL)
    sync(run)
    return file_sha256(run / INITIAL)


class InitialTriples:
    """The stored triples of a run.

    Raises:
        RunError: the file is missing, or not the one that a checkpoint names.
    """

    def __init__(self, run: Path, digest: str) -> None:
        self._path = run / INITIAL
        if not self._path.is_file():
            raise RunError(
                f"{self._path} is missing: the run began with PiSSA's initial triples, which are stored there once; "
                "put it back beside the checkpoints"
            )
        if file_sha256(self._path) != digest:
            raise RunError(
                f"{self._path} differs from the hash that the checkpoint names: put the run's own file back"
            )
        self._file = TensorFileReader(self._path)

    def rows(self, module: str, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Return the initial triples of these numbers, {factor: (n, ...)}; {} for none."""
        if not numbers:
            return {}
        keys = {factor: factor_key(_KEY, module, factor) for factor in FACTORS}
        return {
            factor: self._file.read(key)[list(numbers)]
            for factor, key in keys.items()
            if key in self._file.entries
        }

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> InitialTriples:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
