"""What several methods accumulate of their triples, from local shards alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynrank_ds.ranking.layout import BlockShape, ShardLayout

_TOKENS_AT_ONCE = 2048


class Sensitivity:
    """Smoothed sensitivity and its uncertainty, per element (AdaLoRA, eq. 8 to 10, and its code).

    I = |w g|;  Ibar = b1 Ibar + (1 - b1) I;  U = b2 U + (1 - b2) |I - Ibar| with the new Ibar.
    The recursion is linear per element, so it runs on shards and communicates nothing.
    """

    def __init__(
        self, numel: int, beta1: float, beta2: float, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.smoothed = torch.zeros(numel, dtype=dtype, device=device)
        self.uncertainty = torch.zeros(numel, dtype=dtype, device=device)

    def update(self, weights: Tensor, gradients: Tensor) -> None:
        """One optimizer step; flat vectors of the process's layout, gradients unclipped."""
        sensitivity = (weights * gradients).abs_()
        self.smoothed.lerp_(sensitivity, 1 - self.beta1)
        self.uncertainty.lerp_(sensitivity.sub_(self.smoothed).abs_(), 1 - self.beta2)

    def row_sums(self, layout: ShardLayout) -> Tensor:
        """(factors, total_rank) fp64: this process's part of the sum of Ibar * U over each row."""
        return layout.row_sums(self.smoothed.double() * self.uncertainty.double())


class InputEnergy:
    """Smoothed mean square of every input feature of every block: xe_j = mean_n x_nj^2 over the global batch.

    Each process keeps its own part, (1/N) sum over its tokens; the smoothing is linear, so the parts are
    summed only when scores are asked for. One flat vector, blocks' features one after another.
    """

    def __init__(
        self,
        shapes: Sequence[BlockShape],
        beta: float,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.beta = beta
        total = sum(shape.in_features for shape in shapes)
        self.smoothed = torch.zeros(total, dtype=dtype, device=device)
        self._sums = torch.zeros_like(self.smoothed)
        self._views = self._sums.split([shape.in_features for shape in shapes])

    def add(self, block: int, x: Tensor, token_mask: Tensor) -> None:
        """Adds one micro-batch's input x (batch, tokens, in) of a block; token_mask (batch, tokens) drops padding."""
        weights, flat = token_mask.flatten().to(self._sums.dtype), x.flatten(0, -2)
        # In pieces: the squares, wider than a 16-bit input, are larger than it.
        for rows in range(0, flat.shape[0], _TOKENS_AT_ONCE):
            squares = flat[rows : rows + _TOKENS_AT_ONCE].to(self._sums.dtype).square()
            self._views[block].add_(weights[rows : rows + _TOKENS_AT_ONCE] @ squares)

    def update(self, tokens: int) -> None:
        """Closes an optimizer step; `tokens` counts the global batch's tokens without padding."""
        self.smoothed.lerp_(self._sums.div_(tokens), 1 - self.beta)
        self.discard()

    def discard(self) -> None:
        """Forgets the open step, as when it is skipped."""
        self._sums.zero_()
