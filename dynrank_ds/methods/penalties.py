"""Regularisers with closed-form gradients, added where the factors are gathered."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonality_gradient(factor: Tensor) -> Tensor:
    """Gradient (r, n) fp32 of ||F F^T - I||_F by F (r, n), rows as triples.

    AdaLoRA's code, and PE-DyRA's figures, use the norm itself; the papers print its square.
    Zero where F F^T = I exactly, as torch.linalg.norm's subgradient is.
    """
    f = factor.float()
    residual = f @ f.T - torch.eye(f.shape[0], device=f.device)
    norm = torch.linalg.matrix_norm(residual)
    return (2 / norm.clamp_min(torch.finfo(torch.float32).tiny)) * (residual @ f)
