"""A hash of what each process trained on in a step, by which two runs are seen to have the same batches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from dynrank_ds.zero import processes

_DIGITS = 15
"""Hexadecimal digits that fit an int64."""


class BatchDigest:
    """The SHA-256 of the micro-batches of this process in a step: names, dtypes, shapes and bytes of their tensors."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, inputs: Mapping[str, Tensor]) -> None:
        """Take in a micro-batch, on the CPU."""
        for name, value in sorted(inputs.items()):
            self._sha256.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            self._sha256.update(value.contiguous().numpy().data)

    def of_each_process(self, device: torch.device) -> list[str]:
        """Return the first 15 hexadecimal digits of every process's digest and begin a new one; one collective."""
        mine = torch.tensor([int(self._sha256.hexdigest()[:_DIGITS], 16)], dtype=torch.int64, device=device)
        self._sha256 = hashlib.sha256()
        return [f"{digest:0{_DIGITS}x}" for digest in processes.gather_flat(mine).flatten().tolist()]
