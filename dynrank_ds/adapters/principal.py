"""The principal triples of a weight: its largest singular values with their vectors, and how wrong they can be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-3
"""Of a singular value: what the error of each may be before the search for them ends."""
_OVERSAMPLED = 8
"""Columns of a block beyond the rank."""
_BLOCKS = 24
"""Blocks of the Krylov space at most."""


@dataclass(frozen=True)
class PrincipalTriples:
    """The r largest singular values of W (out, in), approximately: u_i sigma_i v_i^T."""

    u: Tensor
    """(r, out), orthonormal rows."""
    sigma: Tensor
    """(r,), descending."""
    v: Tensor
    """(r, in), orthonormal rows; of each the entry of largest magnitude is positive."""
    error: float
    """The largest ||W v_i - sigma_i u_i|| / sigma_i: W has a singular value that is no farther from sigma_i than this
    share of it (W^T u_i is sigma_i v_i)."""

    def factors(self, scale: float, with_gate: bool) -> dict[str, Tensor]:
        """Return A, e and B with scale * b_i e_i a_i = u_i sigma_i v_i^T; without e, half of it in A and half in B."""
        share = self.sigma / scale
        if with_gate:
            return {"lora_A": self.v, "lora_E": share, "lora_B": self.u}
        root = share.sqrt()[:, None]
        return {"lora_A": self.v * root, "lora_B": self.u * root}


def principal_triples(weight: Tensor, rank: int, generator: torch.Generator) -> PrincipalTriples:
    """Return the principal triples of `weight` (out, in), fp32.

    By block Krylov iteration from a random block (Musco and Musco, "Randomized Block Krylov Methods for Stronger and
    Faster Approximate Singular Value Decomposition", 2015), until the error is at most TOLERANCE; exactly where the
    weight is hardly larger than the space that would be searched. The result depends on weight and generator alone.
    """
    width, smaller = rank + _OVERSAMPLED, min(weight.shape)
    if smaller <= 4 * width:
        return _of_space(weight, None, rank)
    block = weight @ torch.randn(weight.shape[1], width, generator=generator).to(weight.device)
    space = torch.linalg.qr(block).Q
    for number in range(1, _BLOCKS + 1):
        found = _of_space(weight, space, rank)
        if found.error <= TOLERANCE or number == _BLOCKS or space.shape[1] + width > smaller:
            break
        block = weight @ (weight.T @ space[:, -width:])
        # Twice, for what is left after the first time is small and has a large share of the space in it.
        for _ in range(2):
            block = block - space @ (space.T @ block)
            block = torch.linalg.qr(block).Q
        space = torch.cat([space, block], dim=1)
    return found


def _of_space(weight: Tensor, space: Tensor | None, rank: int) -> PrincipalTriples:
    """Return the triples of the projection of W on a space (out, k) of orthonormal columns; None is the whole."""
    u, sigma, v = torch.linalg.svd(weight if space is None else space.T @ weight, full_matrices=False)
    u, sigma, v = u[:, :rank], sigma[:rank], v[:rank]
    u = (u if space is None else space @ u).T
    largest = v.gather(1, v.abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    residual = torch.linalg.vector_norm(weight @ v.T - (u * sigma[:, None]).T, dim=0)
    error = float((residual / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)).max())
    return PrincipalTriples((u * sign).contiguous(), sigma, (v * sign).contiguous(), error)
