"""Processes that are threads: enough to test what is summed without a process group."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch
from torch import Tensor


class ThreadProcess:
    """One of `size` processes that run at the same time; counts its sums."""

    def __init__(self, rank: int, slots: list[Any], barrier: Barrier) -> None:
        self.rank, self.size, self.sums = rank, len(slots), 0
        self._slots, self._barrier = slots, barrier

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        self.sums += 1
        return tensor.copy_(torch.stack(self._exchange(tensor)).sum(0))

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self._slots[self.rank] = tensor.clone()
        self._barrier.wait()
        everyone = list(self._slots)
        self._barrier.wait()
        return everyone


def run_in_threads(size: int, work: Callable[[ThreadProcess], Any]) -> list[Any]:
    """What `work` returns in each of `size` simulated processes."""
    slots: list[Any] = [None] * size
    barrier = Barrier(size, timeout=20)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(ThreadProcess(rank, slots, barrier)), range(size)))


def shard(whole: list[Tensor], rank: int, size: int) -> Tensor:
    """What process `rank` holds of these tensors under ZeRO-3: of each its rank-th piece of ceil(numel / size)."""
    held = []
    for tensor in whole:
        piece = -(-tensor.numel() // size)
        held.append(tensor.flatten()[rank * piece : (rank + 1) * piece])
    return torch.cat(held)
