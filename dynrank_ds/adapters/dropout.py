"""Dropout of the adapters' inputs, whose masks do not depend on how a global batch is computed.

torch's generators give other masks for another world size, micro-batch, packing or after a resume. Here the mask of an
element is a hash of the seed, the optimizer step, the linear, the sample, the token's position in it and the feature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dynrank_ds.errors import ModelError

InputFactors = Callable[[Tensor], Tensor]
"""x (n, in) -> what it is multiplied by, (n, in) of its dtype: 0, or 1 / (1 - p)."""


def _shifted(z: Tensor, bits: int, width: int) -> Tensor:
    """Return z >> bits for signed integers of `width` bits, filled up with zeros."""
    return (z >> bits).bitwise_and_((1 << (width - bits)) - 1)


def _mixed(z: Tensor) -> Tensor:
    """Return the finalizer of splitmix64 (Steele et al., 2014) of each element, int64 modulo 2^64."""
    z = (z ^ _shifted(z, 30, 64)) * -0x40A7B892E31B1A47
    z = (z ^ _shifted(z, 27, 64)) * -0x6B2FB644ECCEEE15
    return z ^ _shifted(z, 31, 64)


class TokenDropout:
    """Inverted dropout with probability p on the inputs of all adapted linears; the base sees its inputs unchanged."""

    def __init__(self, probability: float, seed: int) -> None:
        self.probability, self.seed = probability, seed
        self._tokens = torch.empty(0, dtype=torch.int64)

    def of_linear(self, name: str) -> InputFactors:
        """Return what gives the factors of the linear `name` in the micro-batch that is computed."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return partial(self._factors, name, int.from_bytes(digest[:8], "little", signed=True))

    def begin_micro_batch(
        self, step: int, samples: Sequence[int], sizes: Sequence[int], device: torch.device
    ) -> None:
        """Set the tokens of the next forward and backward.

        samples: their indices in the data set; sizes: positions of each, padding included, in the order of the input.
        """
        sample_of_token = torch.repeat_interleave(torch.tensor(samples), torch.tensor(sizes))
        positions = torch.cat([torch.arange(size) for size in sizes])
        keys = _mixed(torch.tensor(step))
        for index in (sample_of_token, positions):
            keys = _mixed(keys ^ index)
        self._tokens = keys.to(device)

    def _factors(self, name: str, key: int, x: Tensor) -> Tensor:
        if len(x) != len(self._tokens):
            raise ModelError(
                f"adapter.dropout: {name} has {len(x)} inputs for the {len(self._tokens)} tokens of a micro-batch: "
                "leave it out of adapter.targets, or set adapter.dropout to 0"
            )
        # A product of two random numbers for each element, and one round of mixing: few passes over (n, in).
        tokens = _mixed(self._tokens ^ key).to(torch.int32) | 1
        features = _mixed(torch.arange(x.shape[1], device=x.device) + 1).to(torch.int32) | 1
        hashed = tokens[:, None] * features
        hashed ^= _shifted(hashed, 16, 32)
        hashed *= 0x7FEB352D
        kept = hashed >= round(self.probability * 2**32) - 2**31
        return kept.to(x.dtype).mul_(1 / (1 - self.probability))
