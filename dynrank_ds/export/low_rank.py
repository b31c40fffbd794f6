"""Singular values of low-rank updates, from their factors alone: no out x in matrix is ever made.

s B A has the singular values of the small core s R_B R_A^T, where Q_B R_B = B and Q_A R_A = A^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynrank_ds.export.peft_adapter import Update


def singular_values(update: Update) -> Tensor:
    """Return the singular values of scale * b @ a in descending order, (min(r, in, out),) fp64."""
    return torch.linalg.svdvals(_core(update)[1])


def svd(update: Update) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, k), S (k,) and V^T (k, in) of scale * b @ a in fp64, k = min(r, in, out)."""
    q_b, core, q_a = _core(update)
    u, s, vt = torch.linalg.svd(core, full_matrices=False)
    return q_b @ u, s, vt @ q_a.T


def difference_norm(left: Update, right: Update) -> float:
    """Return the Frobenius norm of the difference of two updates of one module, computed in fp64."""
    a = torch.cat([left.a, right.a]).double()
    b = torch.cat([left.b.double() * left.scale, right.b.double() * -right.scale], dim=1)
    return float(singular_values(Update(a, b, 1.0)).norm())


def effective_rank(singular: Tensor) -> float:
    """Return exp(entropy) of singular values scaled to a sum of 1 (Roy and Vetterli, 2007); 0 where all are 0."""
    total = singular.sum()
    if total == 0:
        return 0.0
    shares = singular / total
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def _core(update: Update) -> tuple[Tensor, Tensor, Tensor]:
    q_a, r_a = torch.linalg.qr(update.a.double().T)
    q_b, r_b = torch.linalg.qr(update.b.double())
    return q_b, update.scale * r_b @ r_a.T, q_a
