"""A frozen linear with triples whose weight is decomposed into a magnitude and a direction for each output row.

DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., 2024), https://arxiv.org/abs/2402.09353:

    y = diag(m / n) (W + dW) x + bias,    dW = s B^T diag(g) A,    n_i = ||W_i + dW_i||

with a trained m (out,) that begins as ||W_i||, and n without a gradient (section 4.3). The paper's columns are the rows
of a weight (out, in), as in its code and PEFT's. It is not the method `dynamic_dora`, which changes ranks.

dW is never made. With w_i = ||W_i||, computed once, and b_k = s g_k B_k

    n_i^2 = w_i^2 + t_i,    t_i = sum_k b_ki (2 (A W^T)_ki + sum_l (A A^T)_kl b_li)

which costs a product of W with r vectors. Trained is the difference m - w, `magnitude_offset`: its gradient and its
steps of Adam are those of m, in 16 bits it is as exact as any other weight (m itself would be rounded by up to 0.4 %,
and the whole row with it), and weight decay draws it to the base. The scale of a row is computed from small numbers,

    m / n - 1 = (offset - (n - w)) / n,    n - w = t / (n + w)

so that it is exactly 0 where nothing was trained. Rounding of n matters where dW cancels W: its relative error is that
of the dtype's products times (w_i / n_i)^2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynrank_ds.adapters.dense import dense_weight
from dynrank_ds.adapters.linear import VECTORS, AdaptedLinear, wide_dtype

[MAGNITUDE_OFFSET] = VECTORS
BASE_NORMS = "base_norms"


class _ScaledRows(torch.autograd.Function):
    """y (..., out) with every output feature multiplied by m / n, its bias aside.

    m / n - 1 is added instead of m / n being multiplied by: 1.003 in bf16 is 1.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, bias: Tensor | None, offset: Tensor, norms: Tensor, growth: Tensor
    ) -> Tensor:
        unbiased = y if bias is None else y - bias
        inverse = torch.where(norms > 0, 1 / norms, 0)  # a row of zeros stays one
        gain = (offset.to(norms.dtype) - growth).mul_(inverse)
        ctx.save_for_backward(unbiased, gain, inverse)
        ctx.offset_dtype = offset.dtype
        return torch.addcmul(y, unbiased, gain.to(y.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        unbiased, gain, inverse = ctx.saved_tensors
        grad = grad_outputs[0]
        grad_y = torch.addcmul(grad, grad, gain.to(grad.dtype)) if ctx.needs_input_grad[0] else None
        summed = (grad * unbiased).flatten(0, -2).sum(0, dtype=gain.dtype)
        return grad_y, None, summed.mul_(inverse).to(ctx.offset_dtype), None, None


class WeightDecomposedLinear(AdaptedLinear):
    """A frozen `nn.Linear` (out, in) that is one module, with a trained magnitude for each output row.

    The magnitudes are there at every rank, 0 too: triples that come and go do not touch them. Methods see the gradients
    of the factors as they are, and as `grad_y` the gradient by W x + dW x, which is the output's times m / n.
    """

    def __init__(self, base: nn.Linear, scale: float, dtype: torch.dtype | None = None) -> None:
        super().__init__(base, scale, dtype)
        zeros = torch.zeros(base.out_features, dtype=self.dtype, device=base.weight.device)
        self.magnitude_offset = nn.Parameter(zeros)
        self._base_norms: Tensor | None = None

    def vectors(self) -> dict[str, nn.Parameter]:
        return {MAGNITUDE_OFFSET: self.magnitude_offset}

    def constants(self) -> dict[str, Tensor]:
        """Return ||W_i||, (out,), which makes magnitudes of the trained differences; W must be whole at the first call.

        It is no buffer: DeepSpeed would round it with the rest of a bf16 model.
        """
        return {BASE_NORMS: self.base_norms()}

    @torch.no_grad()
    def base_norms(self) -> Tensor:
        """Return ||W_i||, (out,) of `wide_dtype`, computed at the first call, when W must be whole."""
        weight = self.base.weight
        if self._base_norms is None:
            dense = dense_weight(self.base)
            self._base_norms = torch.linalg.vector_norm(dense, dim=1, dtype=wide_dtype(dense.dtype))
        elif self._base_norms.device != weight.device:
            self._base_norms = self._base_norms.to(weight.device)
        return self._base_norms

    @torch.no_grad()
    def begin_at(self, magnitude: Tensor | None) -> None:
        """Set the magnitudes (out,), or with None those at which y = (W + dW) x; W must be whole.

        It is for modules that begin with dW other than 0.
        """
        base_norms = self.base_norms()
        offset = self._norms()[1] if magnitude is None else magnitude.to(base_norms) - base_norms
        self.set_vectors({MAGNITUDE_OFFSET: offset})

    def set_vectors(self, vectors: Mapping[str, Tensor]) -> None:
        """Own this `magnitude_offset` where there is one among `vectors`."""
        if MAGNITUDE_OFFSET in vectors:
            self.magnitude_offset = nn.Parameter(vectors[MAGNITUDE_OFFSET].to(self.magnitude_offset))

    @torch.no_grad()
    def _norms(self) -> tuple[Tensor, Tensor]:
        """Return n and n - ||W_i||, (out,) of `wide_dtype`."""
        base_norms = self.base_norms()
        if self.lora_A is None or self.lora_B is None:
            return base_norms, torch.zeros_like(base_norms)
        wide = base_norms.dtype
        gate = self.lora_E if self.lora_E is not None else self.gate
        b = self.lora_B.to(wide) * self.scale
        if gate is not None:
            b *= gate.to(wide).expand(len(b))[:, None]
        dense = dense_weight(self.base)
        with_base = F.linear(self.lora_A.to(dense.dtype), dense).to(wide)
        a = self.lora_A.to(wide)
        squares = (b * (2 * with_base + (a @ a.T) @ b)).sum(0)
        norms = (base_norms.square() + squares).clamp_min_(0).sqrt_()
        both = norms + base_norms
        return norms, torch.where(both > 0, squares / both, 0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        update = self.update(x)
        summed = y if update is None else y + update
        scaled: Tensor = _ScaledRows.apply(summed, self.base.bias, self.magnitude_offset, *self._norms())
        return scaled.to(y.dtype)
