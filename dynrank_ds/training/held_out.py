"""The loss on samples that are never trained on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from dynrank_ds.data.collating import Collator
from dynrank_ds.data.tokenising import TokenisedDataset
from dynrank_ds.zero import processes
from dynrank_ds.zero.engine import ZeroEngine


def held_out_loss(
    engine: ZeroEngine,
    dataset: TokenisedDataset,
    collator: Collator,
    micro_batch_size: int,
    device: torch.device,
) -> float:
    """Return the mean cross entropy over all target tokens of `dataset`; one all-reduce, the same on every process."""
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    for chosen, counts in _shares(
        dataset.lengths, processes.rank(), processes.world_size(), micro_batch_size
    ):
        inputs = collator.collate(dataset, chosen).inputs()
        summed = engine.evaluate(**{name: value.to(device) for name, value in inputs.items()})
        loss += summed.double() * counts
    return float(processes.all_reduce_sum(loss)) / int(dataset.target_counts.sum())


def _shares(
    lengths: NDArray[np.int64], rank: int, world_size: int, micro_batch_size: int
) -> Iterator[tuple[NDArray[np.int64], bool]]:
    """Yield (samples, whether they count) of each micro-batch: samples of similar length together, each counted once.

    A process that has no samples left computes one that does not count: under ZeRO-3 all must go forward together.
    """
    order = np.argsort(lengths, kind="stable")
    per_forward = world_size * micro_batch_size
    for start in range(0, len(order), per_forward):
        own = order[start : start + per_forward][rank::world_size]
        yield (own, True) if len(own) else (order[:1], False)
