"""What a method is: initial values, gates, work inside backward, statistics of each step, and a policy.

A method knows neither DeepSpeed nor processes. It sees flat vectors of the elements held here
(dynrank_ds.ranking.layout) and is handed a sum over processes when it needs one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dynrank_ds.adapters.linear import AdaptedModule, FactorInit, wide_dtype
from dynrank_ds.errors import RecipeError
from dynrank_ds.ranking.layout import ModuleShape, ShardLayout
from dynrank_ds.ranking.plan import RankPlan, RankState
from dynrank_ds.section import Section

AllReduceSum = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes, in place, and returns it; one collective."""

Steps = Annotated[int | float, Field(ge=0, description="whole steps, or a fraction of training below 1")]


class MethodConfig(Section):
    """Base of the methods' recipe sections; each stands beside its method."""


def resolve_steps(value: int | float, total_steps: int, key: str, at_least: int = 0) -> int:
    """A method time in steps; a float below 1 is a fraction of `total_steps`.

    Raises:
        RecipeError: the value is a float that is no fraction, or comes to fewer than `at_least` steps.
    """
    if isinstance(value, float) and value >= 1:
        raise RecipeError(f"{key} is {value}: give whole steps, or a fraction of training below 1")
    steps = value if isinstance(value, int) else round(value * total_steps)
    if steps < at_least:
        raise RecipeError(f"{key} is {value}, {steps} of the {total_steps} steps: give at least {at_least}")
    return steps


@dataclass
class MicroBatch:
    """What the backward work knows of the micro-batch under way; the loop sets it."""

    token_mask: Tensor = field(default_factory=lambda: torch.ones(1, 1))
    """(batch, tokens): 1 for tokens, 0 for padding."""
    packed: tuple[int, ...] = ()
    """Lengths of the samples that stand one after another in the only row; () where each row is a sample."""
    step: int = 0
    """The optimizer step (from 1) that it belongs to."""
    last: bool = True
    """Whether it is the last of its step on this process: what depends on the weights alone is done in it, once."""

    @property
    def sample_sizes(self) -> list[int]:
        """Positions of each sample, padding included, in the order of the flat input."""
        samples, tokens = self.token_mask.shape
        return list(self.packed) or [tokens] * samples


@dataclass(frozen=True)
class StepView:
    """One optimizer step, complete and not yet applied, as a method sees it.

    Weights and gradients are flat fp32 vectors of `layout`, of this process's elements; gradients are the
    data-parallel mean over the global batch, unclipped.
    """

    step: int
    """From 1."""
    weights: Tensor
    gradients: Tensor
    layout: ShardLayout
    tokens: int
    """Tokens of the global batch without padding."""
    schedule: float
    """The learning rate of this step by the recipe's, which methods with rates of their own follow."""
    all_reduce_sum: AllReduceSum


class Method:
    """A method that never changes ranks and accumulates nothing; dynamic methods override what they do."""

    init: FactorInit
    factors: tuple[str, ...]
    per_head = False
    """Whether attention heads are modules of their own, instead of their whole linear."""
    observes_after_step = False
    """Whether `observe` is shown the weights after the optimizer step and clipped gradients, as some authors' code
    has it, instead of both as they were before."""

    def __init__(
        self,
        config: MethodConfig,
        modules: Mapping[str, AdaptedModule],
        total_steps: int,
        device: torch.device,
    ) -> None:
        self.shapes = tuple(ModuleShape(n, b.in_features, b.out_features) for n, b in modules.items())
        self.device = device
        self.dtype = wide_dtype(next(iter(modules.values())).dtype)
        """Of gates and statistics: fp32, or fp64 where the factors are."""
        self.micro_batch = MicroBatch()

    def start(self, layout: ShardLayout) -> None:
        """Creates the statistics and gates for this layout; the run's first step, or a checkpoint, follows."""

    def observe(self, view: StepView) -> None:
        """Accumulates an optimizer step before it is applied, and moves gates; at most one sum over processes."""

    def discard_step(self) -> None:
        """Forgets what backward gathered for a step that is skipped."""

    def adjusts_at(self, step: int) -> bool:
        """Whether ranks are planned at optimizer step `step` (from 1)."""
        return False

    def planned_adjustments(self) -> int:
        """How many adjustments a whole run makes."""
        return 0

    def scores(self, view: StepView) -> Sequence[Tensor]:
        """Per module, the scores (rank,) fp64 on the CPU of its triples; at most two sums over processes."""
        raise TypeError(f"{type(self).__name__} never adjusts ranks")

    def plan(self, scores: Sequence[Tensor], state: RankState) -> RankPlan:
        """A pure function of its arguments and the recipe: every adjustment can be recomputed from the log."""
        raise TypeError(f"{type(self).__name__} never adjusts ranks")

    def new_rows(
        self, module: int, old: Mapping[str, Tensor], plan: RankPlan, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """fp32 rows of the new triples of a module, by factor; by default initial values.

        old: fp32 rows of all its triples before the plan, (rank, row_length) by factor; {} at rank 0.
        """
        shape = self.shapes[module]
        return self.init(plan.new[module], shape.in_features, shape.out_features, generator)

    def applied(self, plan: RankPlan) -> None:
        """Follows a plan that was just applied with what is neither row nor partial statistics: gates."""

    def gates(self) -> list[Tensor | None]:
        """Per module, what its exported triples must be scaled by beside lora_E: fp32 (r,) or (1,), or None."""
        return [None] * len(self.shapes)

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

    def replicated_state(self) -> dict[str, Tensor]:
        """What every process holds alike, such as gates: small tensors."""
        return {}

    def set_replicated_state(self, values: Mapping[str, Tensor]) -> None:
        """Takes it back from a checkpoint, after `start`."""
