"""How the samples of a global batch are dealt to processes and become the tensors of micro-batches.

Padded: a sample a row, rows of similar length together. Packed: samples one after another in a single row, no padding.
Both take the same global batch of `train.global_batch_size` samples, and give the same number of micro-batches, of
`train.micro_batch_size` samples each (packed: on average), so that packing changes neither losses nor gradients,
nor what an epoch, a step or a learning rate means: only how fast a step is.
"""

import heapq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynrank_ds.data.tokenising import TokenisedDataset

IGNORED = -100
"""The label of a position that is no target; torch's cross_entropy leaves it out by default."""


@dataclass(frozen=True)
class Batch:
    """The tensors of a micro-batch, each (rows, tokens) int64.

    labels are aligned with input_ids, not shifted: position t holds the token to be predicted from the
    tokens before t, or IGNORED for prompt and padding. packed: lengths of the samples that stand one after
    another in the only row; () where each row is a sample.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    packed: tuple[int, ...] = ()

    def inputs(self) -> dict[str, Tensor]:
        """Return the arguments of SummedLoss."""
        rows, columns = (self.labels != IGNORED).nonzero(as_tuple=True)
        inputs = {
            "input_ids": self.input_ids,
            "positions": rows * self.labels.shape[1] + columns - 1,
            "targets": self.labels[rows, columns],
        }
        if self.packed:
            inputs["position_ids"] = torch.cat([torch.arange(length) for length in self.packed])[None]
        return inputs


class Collator(Protocol):
    """Samples to micro-batches."""

    def micro_batches(
        self,
        indices: NDArray[np.int64],
        lengths: NDArray[np.int64],
        rank: int,
        world_size: int,
        micro_batch_size: int,
    ) -> list[NDArray[np.int64]]:
        """Return the samples of each micro-batch that process `rank` computes of a global batch.

        indices: (global batch,) sample indices; lengths: (all samples,) tokens of each sample. The global
        batch must be a whole number of world_size * micro_batch_size. Over all processes each sample appears
        exactly once, and all have the same number of micro-batches.
        """

    def collate(self, dataset: TokenisedDataset, indices: NDArray[np.int64]) -> Batch:
        """Return the samples `indices`, in that order, as one batch."""


@dataclass(frozen=True)
class PaddedCollator:
    """A sample a row, padded on the right with `pad_id` to the longest."""

    pad_id: int

    def micro_batches(
        self,
        indices: NDArray[np.int64],
        lengths: NDArray[np.int64],
        rank: int,
        world_size: int,
        micro_batch_size: int,
    ) -> list[NDArray[np.int64]]:
        """Return micro-batches of micro_batch_size samples each.

        The batch is sorted by length and dealt out like cards, so that the samples of one micro-batch, and those
        that other processes compute at the same time, are of similar length: little padding, little waiting.
        """
        per_forward = world_size * micro_batch_size
        assert len(indices) % per_forward == 0, (len(indices), world_size, micro_batch_size)
        order = indices[np.lexsort((indices, lengths[indices]))]
        return [group[rank::world_size] for group in order.reshape(-1, per_forward)]

    def collate(self, dataset: TokenisedDataset, indices: NDArray[np.int64]) -> Batch:
        """Return one batch; padding is found from the lengths, never by comparing with pad_id.

        So the end-of-text token stays a target where it is the padding token too.
        """
        samples = [dataset.sample(int(i)) for i in indices]
        shape = (len(samples), max(len(s.ids) for s in samples))
        input_ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        for row, (ids, targets) in enumerate(samples):
            input_ids[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            attention_mask[row, : len(ids)] = 1
            labels[row, : len(ids)] = torch.from_numpy(np.where(targets, ids, IGNORED).astype(np.int64))
        return Batch(input_ids, attention_mask, labels)


@dataclass(frozen=True)
class PackedCollator:
    """Samples one after another in a single row; none sees another."""

    def micro_batches(
        self,
        indices: NDArray[np.int64],
        lengths: NDArray[np.int64],
        rank: int,
        world_size: int,
        micro_batch_size: int,
    ) -> list[NDArray[np.int64]]:
        """Return as many micro-batches as PaddedCollator does, with nearly equal numbers of tokens.

        Longest sample first, each to the shortest row so far (Graham's LPT rule, within 4/3 of the best partition; on
        dozens of samples within a few tokens). Rows of similar length are computed at the same time.
        """
        per_forward = world_size * micro_batch_size
        assert len(indices) % per_forward == 0, (len(indices), world_size, micro_batch_size)
        n_rows = len(indices) // micro_batch_size
        rows: list[list[int]] = [[] for _ in range(n_rows)]
        filled = [(0, row) for row in range(n_rows)]
        for index in indices[np.lexsort((indices, -lengths[indices]))]:
            tokens, row = filled[0]
            rows[row].append(int(index))
            heapq.heapreplace(filled, (tokens + int(lengths[index]), row))
        order = [row for _, row in sorted(filled)]
        return [np.array(rows[row], dtype=np.int64) for row in order[rank::world_size]]

    def collate(self, dataset: TokenisedDataset, indices: NDArray[np.int64]) -> Batch:
        """Return one row; a sample's first token is never a target, so no sample predicts another's."""
        samples = [dataset.sample(int(i)) for i in indices]
        ids = np.concatenate([s.ids for s in samples])
        targets = np.concatenate([s.targets for s in samples])
        return Batch(
            torch.from_numpy(ids.astype(np.int64))[None],
            torch.ones(1, len(ids), dtype=torch.int64),
            torch.from_numpy(np.where(targets, ids, IGNORED).astype(np.int64))[None],
            packed=tuple(len(s.ids) for s in samples),
        )
