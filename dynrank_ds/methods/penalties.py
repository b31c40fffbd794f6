"""Regularisers with closed-form gradients, added where the factors are gathered."""

from __future__ import annotations

import torch
from torch import Tensor

from dynrank_ds.adapters.linear import BackwardWork, ModuleBackward
from dynrank_ds.methods.base import MicroBatch


def orthogonality_gradient(factor: Tensor) -> Tensor:
    """Gradient (r, n) fp32 of ||F F^T - I||_F by F (r, n), rows as triples.

    AdaLoRA's code, and PE-DyRA's figures, use the norm itself; the papers print its square.
    Zero where F F^T = I, as torch.linalg.norm's subgradient is; entries of F F^T - I that are no larger than the
    rounding of their dot product count as 0: Adam would scale up what they make of a row that has no other gradient.
    """
    f = factor.float()
    gram = f @ f.T
    lengths = gram.diagonal().sqrt()
    rounding = torch.finfo(torch.float32).eps * f.shape[1] ** 0.5 * torch.outer(lengths, lengths)
    residual = gram - torch.eye(len(gram), device=gram.device)
    residual.masked_fill_(residual.abs() <= rounding, 0)
    norm = torch.linalg.vector_norm(residual)
    return (residual * (2 / norm.clamp_min(torch.finfo(torch.float32).tiny))) @ f


def add_orthogonality(backward: ModuleBackward, coefficient: float) -> None:
    """Adds coefficient * (||A A^T - I||_F + ||B B^T - I||_F)'s gradient to a module's."""
    if coefficient:
        for factor, gradient in ((backward.lora_a, backward.grad_a), (backward.lora_b, backward.grad_b)):
            gradient.add_(orthogonality_gradient(factor), alpha=coefficient)


def orthogonality_work(coefficient: float, modules: int, micro_batch: MicroBatch) -> BackwardWork:
    """Backward work that adds the gradient of `coefficient` times the mean of ||F F^T - I||_F over all A and B.

    The mean is over the 2 * `modules` matrices of the model, as AdaLoRA's code has it.
    """

    def work(backward: ModuleBackward) -> None:
        # The weights stand still within a step, and the engine does not scale what is added here: once is enough.
        if micro_batch.last:
            add_orthogonality(backward, coefficient / (2 * modules))

    return work


def variance_gradient(factor: Tensor) -> Tensor:
    """Gradient (r, n) fp32 of sum_i Var(F[i, :]), the sample variance, by F (r, n); 0 for rows of one element."""
    f = factor.float()
    return (f - f.mean(1, keepdim=True)) * (2 / max(1, f.shape[1] - 1))


def add_variance(backward: ModuleBackward, coefficient: float) -> None:
    """Adds coefficient * sum_i (Var(a_i) + Var(b_i))'s gradient to a module's (dynamic DoRA, eq. 10)."""
    if coefficient:
        for factor, gradient in ((backward.lora_a, backward.grad_a), (backward.lora_b, backward.grad_b)):
            gradient.add_(variance_gradient(factor), alpha=coefficient)
