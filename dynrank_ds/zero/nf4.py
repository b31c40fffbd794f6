"""NF4 weights of the base as ZeRO-3 shards, quantised by bitsandbytes block by block while they are read.

64 weights in a row share one scale, their largest magnitude, and nothing else: quantising whole blocks of a shard gives
exactly that part of the packed tensor. Only the scales, 1/64 of the weights, are needed by every process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    get_4bit_type,
    quantize_4bit,
    quantize_blockwise,
)
from torch import Tensor, nn

from dynrank_ds.zero import processes
from dynrank_ds.zero.partitioner import LocalShard, Partitioner

BLOCK = 64
_SCALES_IN_A_BLOCK = 256
"""bitsandbytes' own, of double quantisation."""
_WEIGHTS_AT_ONCE = 1 << 17
"""Quantising on a CPU takes some 24 bytes of temporary memory a weight."""


class _PackedProduct(torch.autograd.Function):
    """x W^T for a packed W that may be partitioned between forward and backward.

    bitsandbytes' own function keeps the gathered weight until backward: all layers' weights at once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, state: QuantState, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)  # the parameter, whose data ZeRO-3 exchanges
        ctx.state = state
        product: Tensor = bnb.matmul_4bit(x, weight, quant_state=state, bias=bias)
        return product

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (grad_y,) = ctx.saved_tensors, grad_outputs
        return grad_y @ dequantize_4bit(weight.view(-1, 1), ctx.state).to(grad_y.dtype), None, None, None


class ShardedLinear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' frozen 4-bit linear layer with a partitioned weight, in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _PackedProduct.apply(x, self.weight, self.quant_state, self.bias)
        return product


class Nf4Quantiser:
    """Turns 4-bit layers without weights into partitioned ones, and quantises what is read on the device that trains.

    Args:
        linears: on the meta device, by the full names of their weights, whose elements are multiples of BLOCK.
        dtype: of the model.
        double: quantise the scales too.
    """

    def __init__(
        self,
        linears: Mapping[str, bnb.nn.Linear4bit],
        dtype: torch.dtype,
        double: bool,
        partitioner: Partitioner,
    ) -> None:
        self.linears = linears
        self._double = double
        self._dtype, self._partitioner, self._device = dtype, partitioner, partitioner.device
        self._read = torch.empty(_WEIGHTS_AT_ONCE, dtype=dtype)
        self._code = get_4bit_type("nf4", device=self._device)

    def parameter(self, name: str) -> nn.Parameter:
        """Return the packed weight of a layer, to be partitioned."""
        linear = self.linears[name]
        linear.__class__ = ShardedLinear4bit
        storage = linear.quant_storage
        packed = linear.in_features * linear.out_features // (2 * storage.itemsize)
        return bnb.nn.Params4bit(
            self._partitioner.parameter((packed, 1), storage).data,
            quant_type="nf4",
            quant_storage=storage,
            compress_statistics=self._double,
            blocksize=BLOCK,
            bnb_quantized=True,
            module=linear,
        )

    def fill(self, name: str, shard: LocalShard, read: Callable[[int, Tensor], None]) -> None:
        """Fill this process's shard of a layer's weight and give every process its scales; one all-reduce.

        Args:
            name: of the weight, which `parameter` made and which is in its place.
            read: fills a tensor (n,) with elements [start, start + n) of the weight as it was before.
        """
        linear = self.linears[name]
        numel = linear.in_features * linear.out_features
        absmax = torch.zeros(numel // BLOCK, device=self._device)
        self._pack(shard, 2 * linear.quant_storage.itemsize, absmax, read)
        processes.all_reduce_sum(absmax)  # of disjoint parts
        kind = {
            "shape": torch.Size((linear.out_features, linear.in_features)),
            "dtype": self._dtype,
            "blocksize": BLOCK,
            "quant_type": "nf4",
            "code": self._code,
        }
        if self._double:
            offset = absmax.mean()
            bits, second = quantize_blockwise(absmax.sub_(offset), blocksize=_SCALES_IN_A_BLOCK)
            state = QuantState(absmax=bits, offset=offset, state2=second, **kind)
        else:
            state = QuantState(absmax=absmax, **kind)
        weight: Any = linear.weight
        weight.quant_state = linear.quant_state = state

    def _pack(
        self, shard: LocalShard, weights_in_element: int, absmax: Tensor, read: Callable[[int, Tensor], None]
    ) -> None:
        """Quantise every block that the shard has a part of, and keep that part."""
        first = shard.start * weights_in_element
        last = first + len(shard.data) * weights_in_element
        stop = -(-last // BLOCK) * BLOCK
        for at in range(first // BLOCK * BLOCK, stop, _WEIGHTS_AT_ONCE):
            weights = self._read[: stop - at]
            read(at, weights)
            packed, state = quantize_4bit(
                weights.to(self._device),
                blocksize=BLOCK,
                quant_type="nf4",
                quant_storage=shard.data.dtype,
            )
            begin, end = max(at, first), min(at + len(weights), last)
            part = slice((begin - at) // weights_in_element, (end - at) // weights_in_element)
            start = (begin - first) // weights_in_element
            shard.data[start : start + part.stop - part.start] = packed.flatten()[part]
            # Of a block that two processes have parts of, the one with its first weight gives the scale.
            own = -(-begin // BLOCK)
            absmax[own : (at + len(weights)) // BLOCK] = state.absmax[own - at // BLOCK :]
