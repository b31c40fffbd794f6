"""Which samples make up a step, which process computes which of them, and the tensors of a micro-batch.

The order is a function of (seed, global step) alone: neither the world size nor the past of a run changes
which samples a step sees.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from dynrank_ds.data.tokenising import TokenisedDataset

IGNORED = -100
"""The label of a position that is no target; torch's cross_entropy leaves it out by default."""


@dataclass(frozen=True)
class GlobalBatches:
    """The samples of every step: each exactly once an epoch, in an order drawn anew for each epoch.

    A batch that an epoch's end cuts goes on with the next epoch's order, so all batches are full.
    """

    n_samples: int
    global_batch_size: int
    seed: int

    def indices(self, step: int) -> NDArray[np.int64]:
        """(global_batch_size,) sample indices of the 0-based `step`."""
        positions = np.arange(self.global_batch_size) + step * self.global_batch_size
        epochs, places = np.divmod(positions, self.n_samples)
        chosen = np.empty(self.global_batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = _epoch_order(self.seed, int(epoch), self.n_samples)[places[here]]
        return chosen


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, n_samples: int) -> NDArray[np.int64]:
    order = np.random.default_rng([seed, epoch]).permutation(n_samples)
    order.flags.writeable = False
    return order


def local_micro_batches(
    indices: NDArray[np.int64],
    lengths: NDArray[np.int64],
    rank: int,
    world_size: int,
    micro_batch_size: int,
) -> list[NDArray[np.int64]]:
    """The micro-batches, each (micro_batch_size,), that process `rank` computes of a global batch.

    indices: (global batch,) sample indices; lengths: (all samples,) tokens of each sample.
    The batch is sorted by length and dealt out like cards, so that the samples of one micro-batch, and those
    that other processes compute at the same time, are of like length: little padding, little waiting.
    Over all processes each sample appears exactly once. The global batch must be a whole number of
    world_size * micro_batch_size.
    """
    together = world_size * micro_batch_size
    assert len(indices) % together == 0, (len(indices), world_size, micro_batch_size)
    order = indices[np.lexsort((indices, lengths[indices]))]
    return [group[rank::world_size] for group in order.reshape(-1, together)]


@dataclass(frozen=True)
class Batch:
    """A micro-batch, padded on the right to its longest sample; each tensor (samples, tokens) int64.

    labels are aligned with input_ids, not shifted: position t holds the token to be predicted from the
    tokens before t, or IGNORED for prompt and padding.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


def collate(dataset: TokenisedDataset, indices: NDArray[np.int64], pad_id: int) -> Batch:
    """The samples `indices`, in that order, as one batch.

    What is padding follows from the lengths, never from comparing with pad_id: the end-of-text token stays
    a target where it is the padding token too.
    """
    samples = [dataset.sample(int(i)) for i in indices]
    shape = (len(samples), max(len(s.ids) for s in samples))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, (ids, targets) in enumerate(samples):
        input_ids[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        attention_mask[row, : len(ids)] = 1
        labels[row, : len(ids)] = torch.from_numpy(np.where(targets, ids, IGNORED).astype(np.int64))
    return Batch(input_ids, attention_mask, labels)
