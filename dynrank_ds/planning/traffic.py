"""Bytes that a process receives over the links, per optimizer step and per adjustment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynrank_ds.methods.base import Method
from dynrank_ds.methods.elalora import ElaLoRAConfig
from dynrank_ds.methods.pe_dyra import PEDyRAConfig
from dynrank_ds.planning.architecture import Architecture
from dynrank_ds.planning.memory import hpz_group, offloads
from dynrank_ds.recipe import Recipe


@dataclass(frozen=True)
class Traffic:
    """Bytes of one process."""

    parameters: int
    """Gathered in a step: of the base and the adapters, forward and backward of all micro-batches."""
    within_node: int
    """Of these what comes from the process's own node because hpZ keeps a copy there."""
    gradients: int
    """Reduced in a step."""
    adjustment: int
    """At most, of scores and of the rows of the modules that change."""
    from_host: int
    """Copied in a step from the machine's memory: shards of offloaded parameters, for each gather."""


def traffic(
    recipe: Recipe,
    architecture: Architecture,
    method: Method,
    processes: int,
    zero: Mapping[str, Any],
    gathered: int,
    trainable: int,
    item: int,
) -> Traffic:
    """Return a process's traffic.

    Args:
        recipe: of the run.
        architecture: of its model.
        method: of the recipe, on that model.
        processes: the world size.
        zero: `zero_optimization` of the DeepSpeed configuration.
        gathered: elements that ZeRO-3 gathers in a micro-batch.
        trainable: adapter parameters.
        item: bytes of an element of the base.
    """
    share = (processes - 1) / processes
    accumulation = recipe.accumulation(processes)
    within = 0.0
    if int(zero["stage"]) == 3:
        parameters, gradients = gathered * item * accumulation * share, trainable * 4 * accumulation
        if (
            group := hpz_group(zero)
        ) > 1:  # the base comes from the node's own copy, adapters from everywhere
            adapters = trainable / (architecture.held_elements + trainable)
            within = parameters * (1 - adapters) / share * (group - 1) / group
            parameters = parameters * adapters + within
    else:  # adapters alone: gathered once after the step, gradients summed everywhere
        parameters, gradients = trainable * item * share, 2 * trainable * 4
    from_host = gathered * item * accumulation / processes if offloads(zero, "param") else 0.0
    return Traffic(
        parameters=round(parameters),
        within_node=round(within),
        gradients=round(gradients * share),
        adjustment=round(2 * share * _adjustment(recipe, architecture, method)),
        from_host=round(from_host),
    )


def _adjustment(recipe: Recipe, architecture: Architecture, method: Method) -> int:
    """Bytes of the tensors that are summed over all processes."""
    if not method.planned_adjustments():
        return 0
    shapes, rank = method.shapes, recipe.adapter.rank
    triples = rank * len(shapes)
    scores = 8 * len(method.factors) * triples
    changed = len(shapes)
    if isinstance(
        recipe.method, PEDyRAConfig
    ):  # input energies and gradient norms, then sensitivities and magnitudes
        scores = 8 * (sum(shape.in_features for shape in shapes) + 3 * len(shapes)) + 2 * scores
        changed = 2 * (recipe.method.k_max if recipe.method.k == "auto" else recipe.method.k)
    elif isinstance(recipe.method, ElaLoRAConfig):
        changed = 2 * recipe.method.b
    costs = sorted((shape.triple_parameters(method.factors) for shape in shapes), reverse=True)
    states = 3 + len(("sensitivity", "uncertainty")) * (
        recipe.method.name in ("pe_dyra", "adalora", "elalora")
    )
    return scores + 4 * states * sum((rank + 1) * cost for cost in costs[:changed])
