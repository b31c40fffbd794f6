"""Penalties with closed-form gradients, added in backward, where factors are whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dynrank_ds.adapters.linear import ModuleBackward

Penalty = Callable[[Tensor], tuple[Tensor, Tensor]]
"""factor (r, n) -> value () and gradient (r, n), both fp32."""


def orthogonality(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return ||F F^T - I||_F and its gradient by F (r, n), rows as triples.

    The gradient is 0 where F F^T = I, as torch.linalg.norm's subgradient is. Entries of F F^T - I that are no larger
    than the rounding of their dot product count as 0: Adam would scale up what they make of a row without any other
    gradient.
    """
    f = factor.float()
    gram = f @ f.T
    lengths = gram.diagonal().sqrt()
    rounding = torch.finfo(torch.float32).eps * f.shape[1] ** 0.5 * torch.outer(lengths, lengths)
    residual = gram - torch.eye(len(gram), device=gram.device)
    residual.masked_fill_(residual.abs() <= rounding, 0)
    norm = torch.linalg.vector_norm(residual)
    return norm, (residual * (2 / norm.clamp_min(torch.finfo(torch.float32).tiny))) @ f


def variance(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum_i Var(F[i, :]), sample variances, and its gradient by F (r, n); 0 for rows of one element."""
    f = factor.float()
    away, freedom = f - f.mean(1, keepdim=True), max(1, f.shape[1] - 1)
    return away.square().sum() / freedom, away * (2 / freedom)


def add_penalty(backward: ModuleBackward, penalty: Penalty, coefficient: float) -> Tensor:
    """Add the gradient of coefficient * (penalty(A) + penalty(B)) to a module's gradients; return that value, ()."""
    value = torch.zeros((), device=backward.lora_a.device)
    for factor, gradient in ((backward.lora_a, backward.grad_a), (backward.lora_b, backward.grad_b)):
        of_factor, by_factor = penalty(factor)
        gradient.add_(by_factor, alpha=coefficient)
        value = value + coefficient * of_factor
    return value
