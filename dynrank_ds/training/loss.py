"""The loss: the model's own logits, made only where there is a target, and their check against its own forward."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from dynrank_ds.data.collating import Collator
from dynrank_ds.data.tokenising import TokenisedDataset
from dynrank_ds.errors import ModelError
from dynrank_ds.training.logits import ChunkedCrossEntropy, Head, WithGradient, rows_at_once

_COMPARED = (40, 24)
"""Tokens of the samples that are compared, of unequal length so that there is padding."""
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest `relative_difference` of two mean losses that rounding explains; tests/training/test_architecture.py measures
what it comes to."""


class SummedLoss(nn.Module):
    """Cross entropy (fp32) summed over the targets of a micro-batch, fp64; whoever calls it knows what to divide by.

    Padding is on the right, so under causal attention no token ever sees it and no mask is needed. Where samples are
    packed into one row, their position ids restart: transformers then calls FlashAttention's kernel for samples of
    unequal lengths, or with other attentions masks all but each sample's own tokens.
    Logits are made only where there is a target, a chunk of them at a time. The hidden states there leave the decoder
    as rows and go the model's own way from there, whatever it does to them or to the logits (`logit_scale` of Cohere,
    soft caps of Gemma-2).
    """

    def __init__(self, model: PreTrainedModel, rows: int | None = None) -> None:
        """`rows` of logits are made at one time, by default as many as `rows_at_once` says."""
        super().__init__()
        self.model = model
        self._head = Head(model)
        rows = rows or rows_at_once(model.config.get_text_config().vocab_size)
        self.cross_entropy = ChunkedCrossEntropy(self._head.layer, rows)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        targets: Tensor,
        position_ids: Tensor | None = None,
        every_position: bool = False,
    ) -> Tensor:
        """Return the summed loss of a micro-batch, fp64.

        Args:
            input_ids: (samples, tokens), int64.
            positions: (n,), flat, of the tokens that predict, int64.
            targets: (n,), int64.
            position_ids: (1, tokens), for packed samples, counted from 0 in each.
            every_position: make logits of all positions at once, by the model's forward as it stands.
        """
        inputs = {"input_ids": input_ids}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        if every_position:
            logits = self.model(**inputs).logits.flatten(0, 1)[positions]
            return F.cross_entropy(logits.float(), targets, reduction="none").double().sum()
        output = self._head.decode(positions, inputs)
        hidden = output.last_hidden_state[0]
        with self._head.logits(output, inputs) as logits_of:
            loss, gradient = self.cross_entropy(hidden.detach(), targets, logits_of)
        if gradient is not None:
            loss = WithGradient.apply(hidden, loss, gradient)
        return loss


def check_loss(
    evaluate: Callable[..., Tensor],
    dataset: TokenisedDataset,
    collator: Collator,
    dtype: str,
    device: torch.device,
) -> None:
    """Compare the loss of a small micro-batch with the model's own forward on each of its samples alone.

    Two samples, or one if there is no more, are cut to 64 tokens in all, and every token but the first of each is a
    target. What differs: logits that are not made from the decoder's hidden states alone, and models whose samples
    see padding or, packed, one another.

    Args:
        evaluate: `SummedLoss.forward` without gradients; every process must call it.
        dtype: "bf16" or "fp32", that the model computes in.

    Raises:
        ModelError: the losses differ by more than rounding.
    """
    few = _beginnings(dataset)
    everything = np.arange(len(few))

    def loss(samples: NDArray[np.int64], every_position: bool) -> float:
        inputs = collator.collate(few, samples).inputs()
        if every_position:
            inputs.pop("position_ids", None)
        return float(evaluate(**{k: v.to(device) for k, v in inputs.items()}, every_position=every_position))

    n_targets = int(few.target_counts.sum())
    ours = loss(everything, every_position=False) / n_targets
    own = sum(loss(everything[i : i + 1], every_position=True) for i in everything) / n_targets
    if math.isnan(ours) and math.isnan(own):
        return  # no difference: the loop discards such steps, and names their samples
    if not relative_difference(ours, own) <= TOLERANCES[dtype]:
        raise ModelError(
            f"the loss of {len(few)} samples in one micro-batch is {ours:.6f} a token, by the model's own forward "
            f"on each alone {own:.6f}: this model cannot be trained with {type(collator).__name__}"
        )


def relative_difference(ours: float, own: float) -> float:
    """Return how far two mean losses are apart, of the larger of the second and 1; nan where one is nan."""
    return abs(ours - own) / max(abs(own), 1)


def _beginnings(dataset: TokenisedDataset) -> TokenisedDataset:
    """Return the first tokens of the first samples, all targets that can be."""
    cut = [dataset.sample(i).ids[:length] for i, length in zip(range(len(dataset)), _COMPARED, strict=False)]
    lengths = np.array([len(ids) for ids in cut], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    tokens = np.concatenate(cut)
    targets = np.ones(len(tokens), dtype=np.bool_)
    targets[starts] = False
    return TokenisedDataset(tokens, targets, starts, lengths, lengths - 1)
