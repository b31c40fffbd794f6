"""What a method is: initial values, work inside backward, statistics of each step, and a policy.

A method knows neither DeepSpeed nor processes. It sees flat vectors of the elements held here
(dynrank_ds.ranking.layout) and is handed a sum over processes when it needs one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dynrank_ds.adapters.linear import AdaptedLinear, FactorInit
from dynrank_ds.errors import RecipeError
from dynrank_ds.ranking.layout import BlockShape, ShardLayout
from dynrank_ds.ranking.plan import RankPlan, RankState

SumOverProcesses = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes, in place, and returns it; one collective."""

Steps = Annotated[int | float, Field(ge=0, description="whole steps, or a fraction of training below 1")]


class MethodConfig(BaseModel):
    """Base of the methods' recipe sections; each stands beside its method."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def resolve_steps(value: int | float, total_steps: int, key: str) -> int:
    """A method time in steps; a float below 1 is a fraction of `total_steps`.

    Raises:
        RecipeError: the value is a float that is no fraction.
    """
    if isinstance(value, int):
        return value
    if value >= 1:
        raise RecipeError(f"{key} is {value}: give whole steps, or a fraction of training below 1")
    return round(value * total_steps)


@dataclass
class MicroBatch:
    """What the backward work knows of the micro-batch under way; the loop sets it."""

    token_mask: Tensor = field(default_factory=lambda: torch.ones(1, 1))
    """(batch, tokens): 1 for tokens, 0 for padding."""
    share: float = 1.0
    """1 / accumulation steps: what one micro-batch adds of a term that belongs to the whole step."""


class Method:
    """A method that never changes ranks and accumulates nothing; dynamic methods override what they do."""

    init: FactorInit
    factors: tuple[str, ...]

    def __init__(self, blocks: Mapping[str, AdaptedLinear], device: torch.device) -> None:
        self.shapes = tuple(BlockShape(n, b.in_features, b.out_features) for n, b in blocks.items())
        self.device = device
        self.micro_batch = MicroBatch()

    def start(self, layout: ShardLayout) -> None:
        """Creates the statistics for this process's elements, all zero."""

    def observe(
        self, step: int, weights: Tensor, gradients: Tensor, layout: ShardLayout, tokens: int
    ) -> None:
        """Accumulates optimizer step `step` (from 1), before it is applied.

        weights, gradients: flat fp32 vectors of `layout`; gradients are the data-parallel mean, unclipped.
        tokens: tokens of the global batch without padding.
        """

    def discard_step(self) -> None:
        """Forgets what backward gathered for a step that is skipped."""

    def adjusts_at(self, step: int) -> bool:
        """Whether ranks are planned at optimizer step `step` (from 1)."""
        return False

    def planned_adjustments(self) -> int:
        """How many adjustments a whole run makes."""
        return 0

    def scores(
        self, weights: Tensor, gradients: Tensor, layout: ShardLayout, total: SumOverProcesses
    ) -> Sequence[Tensor]:
        """Per block, the scores (rank,) fp64 of its triples; at most two sums over processes."""
        raise TypeError(f"{type(self).__name__} never adjusts ranks")

    def plan(self, scores: Sequence[Tensor], state: RankState) -> RankPlan:
        """A pure function of CPU tensors."""
        raise TypeError(f"{type(self).__name__} never adjusts ranks")

    def row_statistics(self) -> dict[str, Tensor]:
        """Statistics that belong to the elements, as flat vectors of the layout: they follow their triples."""
        return {}

    def set_row_statistics(self, values: Mapping[str, Tensor]) -> None:
        """Takes them back, after ranks changed or from a checkpoint."""

    def partial_statistics(self) -> dict[str, Tensor]:
        """Statistics of which each process holds a part and that do not depend on ranks."""
        return {}

    def set_partial_statistics(self, values: Mapping[str, Tensor]) -> None:
        """Takes this process's part back."""
