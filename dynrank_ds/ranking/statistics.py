"""Statistics of triples that several methods accumulate, from local shards alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynrank_ds.ranking.layout import ModuleShape, ShardLayout

# What is worked on at once stays in the cache: an L2 of 1 or 2 MiB on CPU, of 40 MiB on an A100.
_CPU_BYTES, _GPU_BYTES = 2**19, 2**25


class Sensitivity:
    """Smoothed sensitivity and its uncertainty, per element (AdaLoRA, eq. 8 to 10, and its code).

    I = |w g|;  Ibar = b1 Ibar + (1 - b1) I;  U = b2 U + (1 - b2) |I - Ibar| with the new Ibar.
    The recursion is linear per element, so it runs on shards and communicates nothing.
    """

    def __init__(
        self,
        state: dict[str, Tensor],
        numel: int,
        beta1: float,
        beta2: float,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Put zeros into `state`, under "sensitivity" and "uncertainty", and keep both there from then on."""
        self.beta1, self.beta2, self._state = beta1, beta2, state
        for name in ("sensitivity", "uncertainty"):
            state[name] = torch.zeros(numel, dtype=dtype, device=device)

    @property
    def smoothed(self) -> Tensor:
        """Ibar, (numel,)."""
        return self._state["sensitivity"]

    @property
    def uncertainty(self) -> Tensor:
        """U, (numel,)."""
        return self._state["uncertainty"]

    def update(self, weights: Tensor, gradients: Tensor) -> None:
        """Update for one optimizer step; flat vectors of the process's layout, gradients unclipped."""
        sensitivity = (weights * gradients).abs_()
        self.smoothed.lerp_(sensitivity, 1 - self.beta1)
        self.uncertainty.lerp_(sensitivity.sub_(self.smoothed).abs_(), 1 - self.beta2)

    def row_sums(self, layout: ShardLayout) -> Tensor:
        """Return (factors, total_rank) fp64: this process's part of the sum of Ibar * U over each row."""
        return layout.row_sums(self.smoothed.double() * self.uncertainty.double())


@dataclass(frozen=True)
class _Summed:
    """An input's sums of squares. The input is held, so that no other tensor can take its place in memory."""

    x: Tensor
    version: int
    squares: Tensor

    def is_of(self, x: Tensor) -> bool:
        """Return whether x is a view of all of the input, which nothing has written to since."""
        return (
            x.data_ptr() == self.x.data_ptr()
            and x.shape == self.x.shape
            and x.stride() == self.x.stride()
            and x._version == self.version
        )


class InputEnergy:
    """Smoothed mean square of every input feature of every module: xe_j = mean_n x_nj^2 over the global batch.

    Each process keeps its own part, (1/N) sum over its tokens; the smoothing is linear, so the parts are
    summed only when scores are asked for. One flat vector, modules' features one after another.
    """

    def __init__(
        self,
        shapes: Sequence[ModuleShape],
        beta: float,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.beta = beta
        total = sum(shape.in_features for shape in shapes)
        self.smoothed = torch.zeros(total, dtype=dtype, device=device)
        self._sums = torch.zeros_like(self.smoothed)
        self._views = self._sums.split([shape.in_features for shape in shapes])
        self._last: _Summed | None = None

    def add(self, module: int, x: Tensor, token_mask: Tensor) -> None:
        """Add one micro-batch's input x (n, in) of a module; token_mask (batch, tokens) of n drops padding.

        Linears that share their input (q, k and v; gate and up) come one after another: it is squared once for them.
        """
        if self._last is None or not self._last.is_of(x):
            self._last = _Summed(x, x._version, self._summed_squares(x, token_mask))
        self._views[module].add_(self._last.squares)

    def _summed_squares(self, x: Tensor, token_mask: Tensor) -> Tensor:
        weights, summed = token_mask.flatten().to(self._sums.dtype), self._sums.new_zeros(x.shape[-1])
        rows = max(1, (_CPU_BYTES if x.device.type == "cpu" else _GPU_BYTES) // summed.nbytes)
        squares = summed.new_empty(rows, len(summed))
        for piece, weight in zip(x.split(rows), weights.split(rows), strict=True):
            summed.addmv_(squares[: len(piece)].copy_(piece).square_().T, weight)
        return summed

    def update(self, tokens: int) -> None:
        """Close an optimizer step; `tokens` counts the global batch's tokens without padding."""
        self.smoothed.lerp_(self._sums.div_(tokens), 1 - self.beta)
        self.discard()

    def discard(self) -> None:
        """Forget the open step, as when it is skipped."""
        self._sums.zero_()
        self._last = None
