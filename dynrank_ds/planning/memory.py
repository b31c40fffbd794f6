"""Memory of one process at the worst moment of training, by part, in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from dynrank_ds.planning.activations import Activations, MicroBatch, activations
from dynrank_ds.planning.architecture import ITEM, Architecture, Unit
from dynrank_ds.planning.gathers import GatherLimits, Moment, follow
from dynrank_ds.recipe import Recipe

_STEP_VECTORS = 5
"""fp32 vectors of the adapters' shard beside the optimizer's state while it steps: weights and gradients for the
method, and three temporaries of AdamW."""
_BUCKET = 500_000_000
"""DeepSpeed's default of reduce_bucket_size, elements."""


@dataclass(frozen=True)
class Parts:
    """Bytes of one process; the sum is what its tensors need at the moment that needs most."""

    base: int
    """The base, or its shard, with hpZ's copy of it, and the scales of a quantised base."""
    gathers: int
    """Whole parameters that are gathered, prefetched or kept for backward, and buffers that they arrive in."""
    adapters: int
    """Adapter weights in the base's dtype."""
    optimizer: int
    """fp32 master weights, both moments, gradients."""
    statistics: int
    """What the method keeps for each adapter weight."""
    activations: int
    logits: int
    buffers: int
    """The bucket that gradients are reduced in, vectors of the optimizer's step, an unpacked weight."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Memory:
    """Of one process in training, and of the machine while the base is loaded."""

    parts: Parts
    moment: str
    """When the sum is largest."""
    host_of_optimizer: int
    """Bytes of the optimizer's state that is offloaded to the machine, of one process."""
    host_of_parameters: int
    """Bytes of the shards that are offloaded to the machine, of one process."""
    host_while_loading: int
    """Bytes of one process on the machine while the base is loaded."""
    gathered_elements: int
    """Parameters that a process gathers in one micro-batch."""


def _shard(elements: int, processes: int) -> int:
    return -(-elements // processes)


def memory(
    recipe: Recipe,
    architecture: Architecture,
    zero: Mapping[str, Any],
    processes: int,
    batch: MicroBatch,
    trainable: int,
    row_statistics: int,
    on_cpu: bool = False,
) -> Memory:
    """Return the memory of a process.

    Args:
        recipe: with model.dtype bf16 or fp32.
        architecture: of its model.
        zero: `zero_optimization` of its DeepSpeed configuration.
        processes: the world size.
        batch: the largest micro-batch.
        trainable: adapter parameters at most.
        row_statistics: vectors that the method keeps of the adapters' size.
        on_cpu: where what is allocated and never touched, such as the end of a bucket, takes no memory.
    """
    item, partitioned = ITEM[recipe.model.dtype], int(zero["stage"]) == 3
    shard = _shard(trainable, processes)
    moments, gathered = _gathers(recipe, architecture, zero, processes)
    acts = activations(architecture, batch, item, recipe.model.attention)
    bucket = int(zero.get("reduce_bucket_size", _BUCKET))
    filled = 4 * min(bucket, trainable)
    unpacked = architecture.packed.largest * item
    # gloo receives into a copy of each buffer, which is gone when weights are unpacked or the head's logits largest.
    if on_cpu and not unpacked:
        layers = [architecture.units[m.unit].whole_layer for m in moments]
        moments = [
            replace(m, held=m.held + m.on_their_way * of_layer)
            for m, of_layer in zip(moments, layers, strict=True)
        ]
    turns = _moments(architecture.units, moments, acts, recipe.train.activation_checkpointing, item, unpacked)
    # Gradients that are reduced are copied for it.
    live = max((replace(each, buffers=each.buffers + filled) for each in turns), key=lambda each: each.total)
    live = max(live, _Live("optimizer step", 0, 0, 0, _STEP_VECTORS * 4 * shard), key=lambda each: each.total)
    states = 16 * shard
    held = architecture.held_elements
    base = (_shard(held, processes) if partitioned else held) * item
    adapters = (shard if partitioned else trainable) * (item if recipe.adapter.dtype == "model" else 4)
    host_optimizer = offloads(zero, "optimizer")
    host_parameters = offloads(zero, "param")
    elsewhere = host_parameters and not on_cpu
    parts = Parts(
        base=(0 if elsewhere else base) + _hpz_copy(zero, held) * item + architecture.packed.constants,
        gathers=live.gathers,
        adapters=0 if elsewhere else adapters,
        optimizer=0 if host_optimizer and not on_cpu else states,
        statistics=4 * row_statistics * shard,
        activations=live.activations,
        logits=live.logits,
        buffers=live.buffers + (filled if on_cpu else 4 * bucket),
    )
    largest = max(n for unit in architecture.units for n in unit.parameters)
    while_loading = _shard(largest, processes) * item if partitioned else base
    if recipe.adapter.init == "pissa":  # weights are decomposed one by one, whole
        weights = (m.in_features * m.out_features for m in architecture.modules.values())
        while_loading = max(while_loading, item * max(weights))
    return Memory(
        parts=parts,
        moment=live.name,
        host_of_optimizer=states if host_optimizer else 0,
        host_of_parameters=base + adapters if host_parameters else 0,
        host_while_loading=while_loading,
        gathered_elements=gathered,
    )


def offloads(zero: Mapping[str, Any], what: str) -> bool:
    """Return whether the machine's memory holds the shards of `what`, "optimizer" or "param"."""
    return bool((zero.get(f"offload_{what}") or {}).get("device", "none") != "none")


def hpz_group(zero: Mapping[str, Any]) -> int:
    """Return how many processes hold the base once more together under hpZ; 1 without it."""
    return int(zero.get("zero_hpz_partition_size", 1))


def _hpz_copy(zero: Mapping[str, Any], held: int) -> int:
    return _shard(held, hpz_group(zero)) if hpz_group(zero) > 1 else 0


def _gathers(
    recipe: Recipe, architecture: Architecture, zero: Mapping[str, Any], processes: int
) -> tuple[list[Moment], int]:
    moments, gathered = follow(
        architecture.units, architecture.tied, recipe.train.activation_checkpointing, GatherLimits.of(zero)
    )
    if int(zero["stage"]) == 3 and (processes > 1 or offloads(zero, "param")):
        return moments, gathered
    # Every parameter is there: under stages 1 and 2 whole, and with one process the shard is the parameter.
    return [Moment(m.unit, m.backward, 0, 0, 0, 0) for m in moments], 0


@dataclass(frozen=True)
class _Live:
    """What is held at one moment beside what is always held, bytes."""

    name: str
    gathers: int
    activations: int
    logits: int
    buffers: int

    @property
    def total(self) -> int:
        return self.gathers + self.activations + self.logits + self.buffers


def _moments(
    units: Sequence[Unit],
    moments: Sequence[Moment],
    acts: Activations,
    recomputed: bool,
    item: int,
    unpacked: int,
) -> list[_Live]:
    """Every turn of forward and backward, while parameters arrive and while it computes.

    unpacked: bytes of the largest weight of a layer that is unpacked while the layer computes.
    """
    kept = acts.layer_input if recomputed else acts.layer_input + acts.layer
    found = []
    for moment in moments:
        unit = units[moment.unit]
        before = kept * sum(u.whole_layer for u in units[: moment.unit])
        during = logits = 0
        if unit.whole_layer and moment.backward:
            before += kept  # of the layer itself
            during = acts.layer_backward + (acts.layer if recomputed else 0)
        elif unit.whole_layer:
            during = acts.layer_input + acts.layer
        elif unit.name == "head":
            logits = acts.logits
        where = f"{'backward' if moment.backward else 'forward'} of {unit.name}"
        found.append(_Live(f"parameters arriving for {where}", moment.arriving * item, before, 0, 0))
        buffers = unpacked if unit.whole_layer else 0
        found.append(_Live(where, moment.held * item, before + during, logits, buffers))
    return found
