"""What a process holds of adapters, master weights, moments and gradients under each ZeRO stage.

Both classes offer the same: views of this process's fp32 elements in the order of all fragments of a ShardLayout, the
gradients between the last backward and the step, fresh optimizer state, and gates set to zero. Only where the elements
lie differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_local_grad
from torch import Tensor

from dynrank_ds.ranking.layout import FragmentOf, ModuleShape, ShardLayout
from dynrank_ds.zero.deepspeed_internals import zero2_gradients, zero2_master, zero3_masters

MOMENTS = ("exp_avg", "exp_avg_sq")


def zero3_rules(
    shapes: Sequence[ModuleShape],
    ranks: Sequence[int],
    factors: Sequence[str],
    world_size: int,
    vectors: Sequence[str] = (),
) -> list[FragmentOf]:
    """Return ZeRO-3's rules: each tensor in pieces of ceil(numel / world_size) elements, the last short or empty."""

    def rule(process: int) -> FragmentOf:
        def fragment(factor: str, module: int, numel: int) -> tuple[int, int]:
            piece = -(-numel // world_size)
            return min(process * piece, numel), min((process + 1) * piece, numel)

        return fragment

    return [rule(process) for process in range(world_size)]


def zero2_rules(
    shapes: Sequence[ModuleShape],
    ranks: Sequence[int],
    factors: Sequence[str],
    world_size: int,
    vectors: Sequence[str] = (),
) -> list[FragmentOf]:
    """Return ZeRO-1's and 2's rules: tensors concatenated, padded to a multiple of 2 * world_size, in equal pieces."""
    offsets: dict[tuple[str, int], int] = {}
    end = 0
    for factor in factors:
        for module, (shape, rank) in enumerate(zip(shapes, ranks, strict=True)):
            offsets[factor, module] = end
            end += rank * shape.row_length(factor)
    for vector in vectors:
        for module, shape in enumerate(shapes):
            offsets[vector, module] = end
            end += shape.vector_length(vector)
    piece = -(-end // (2 * world_size)) * 2

    def rule(process: int) -> FragmentOf:
        def fragment(factor: str, module: int, numel: int) -> tuple[int, int]:
            start = process * piece - offsets[factor, module]
            return min(max(start, 0), numel), min(max(start + piece, 0), numel)

        return fragment

    return [rule(process) for process in range(world_size)]


class Zero3Shards:
    """ZeRO-3: every adapter tensor is cut on its own, and the 16-bit copy with it."""

    rules = staticmethod(zero3_rules)

    def __init__(self, optimizer: Any, params: Sequence[Any], layout: ShardLayout) -> None:
        self._optimizer, self._params, self._layout = optimizer, params, layout

    def seed(self, births: Sequence[Tensor], rates: Mapping[str, float], updates: int) -> None:
        """Reset the optimizer's state to zero moments after `updates` steps; see `_runs`."""
        padded = {}
        for param, fragment, runs in zip(
            self._params, self._layout.all_fragments, _runs(births, rates, self._layout), strict=True
        ):
            padded[param.ds_id] = _padded(runs, param.partition_numel(), rates[fragment.factor])
        # Not by DeepSpeed's safe_get_local_fp32_param, which copies what is offloaded to the GPU: these must be views.
        pieces: dict[str, dict[int, Tensor]] = {name: {} for name in ("master", *MOMENTS)}
        for flat, group in zero3_masters(self._optimizer):
            runs = torch.cat([padded[param.ds_id] for param in group], dim=1)
            self._optimizer.optimizer.set_state(flat, updates, *runs.to(flat.device))
            states = {"master": flat.detach(), **self._optimizer.optimizer.state[flat]}
            for name, found in pieces.items():
                parts = states[name].split([param.partition_numel() for param in group])
                found.update(zip((param.ds_id for param in group), parts, strict=True))
        self.masters = self._local(pieces.pop("master"))
        self.moments = {name: self._local(found) for name, found in pieces.items()}

    def gradients(self) -> Tensor:
        return torch.cat(self._local({p.ds_id: safe_get_local_grad(p) for p in self._params}))

    def zero_gates(self, masked: Sequence[Sequence[int]]) -> None:
        """Set lora_E of these triples to 0, in master and 16-bit copy."""
        for number, local, triples in _masked_gates(self._layout, masked):
            self.masters[number][local] = 0
            param = self._params[number]
            param.ds_tensor.view(-1)[local] = 0
            if param.ds_status == ZeroParamStatus.AVAILABLE:  # kept gathered between uses
                param.data.view(-1)[triples] = 0

    def _local(self, pieces: Mapping[int, Tensor]) -> list[Tensor]:
        """Return every parameter's local shard without its padding, by ds_id."""
        pairs = zip(self._params, self._layout.all_fragments, strict=True)
        return [pieces[p.ds_id].view(-1)[: f.stop - f.start] for p, f in pairs]


class Zero2Shards:
    """ZeRO-1 and 2: master and moments are one flat piece of all tensors; the 16-bit copy is whole everywhere."""

    rules = staticmethod(zero2_rules)

    def __init__(self, optimizer: Any, params: Sequence[Any], layout: ShardLayout) -> None:
        self._optimizer, self._params, self._layout = optimizer, params, layout

    def seed(self, births: Sequence[Tensor], rates: Mapping[str, float], updates: int) -> None:
        """Reset the optimizer's state to zero moments after `updates` steps; see `_runs`."""
        flat = zero2_master(self._optimizer)
        runs = _padded(torch.cat(_runs(births, rates, self._layout), dim=1), flat.numel(), 1.0)
        self._optimizer.optimizer.set_state(flat, updates, *runs.to(flat.device))
        state = self._optimizer.optimizer.state[flat]
        self.masters = self._split(flat.detach())
        self.moments = {name: self._split(state[name]) for name in MOMENTS}

    def gradients(self) -> Tensor:
        held = sum(f.stop - f.start for f in self._layout.all_fragments)
        return zero2_gradients(self._optimizer)[:held].to(self._layout.device, torch.float32)

    def _split(self, flat: Tensor) -> list[Tensor]:
        """Return views of every fragment in a flat vector, which may end in padding."""
        sizes = [f.stop - f.start for f in self._layout.all_fragments]
        return list(flat[: sum(sizes)].split(sizes))

    def zero_gates(self, masked: Sequence[Sequence[int]]) -> None:
        """Set lora_E of these triples to 0, in master and 16-bit copy."""
        for number, local, triples in _masked_gates(self._layout, masked):
            self.masters[number][local] = 0
            self._params[number].data[triples] = 0


Shards = Zero3Shards | Zero2Shards


def _runs(births: Sequence[Tensor], rates: Mapping[str, float], layout: ShardLayout) -> list[Tensor]:
    """Return per fragment (3, rows) fp64: the step at which each row was added, its rate, its number of local elements.

    births: the (rank,) of every module, the optimizer step after which each triple was born; vectors were always there.
    """
    parts = []
    for f in layout.all_fragments:
        length = layout.row_length(f)
        born = torch.zeros(1) if f.factor in layout.vectors else births[f.module]
        rows = torch.arange(f.start // length, -(-f.stop // length))
        held = (rows * length + length).clamp(max=f.stop) - (rows * length).clamp(min=f.start)
        rate = torch.full(rows.shape, rates[f.factor], dtype=torch.float64)
        parts.append(torch.stack([born[rows].double(), rate, held.double()]))
    return parts


def _padded(runs: Tensor, length: int, rate: float) -> Tensor:
    """Append one run, up to `length` elements: the padding after a fragment is never read."""
    missing = length - runs[2].sum()
    return torch.cat([runs, torch.tensor([[0.0], [rate], [missing]], dtype=torch.float64)], dim=1)


def _masked_gates(
    layout: ShardLayout, masked: Sequence[Sequence[int]]
) -> list[tuple[int, list[int], list[int]]]:
    """Return (number of the fragment, masked elements inside it, masked triples of its module) of every lora_E."""
    return [
        (number, [i - f.start for i in masked[f.module] if f.start <= i < f.stop], list(masked[f.module]))
        for number, f in enumerate(layout.fragments)
        if f.factor == "lora_E"
    ]
