"""The interface of a method: initial values, gates, what is read in backward, statistics of each step, and plans.

A method imports neither DeepSpeed nor torch.distributed. It receives flat vectors of the elements that its process
holds (dynrank_ds.ranking.layout), and a function that sums a tensor over all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from dynrank_ds.adapters.linear import AdaptedModule, ModuleBackward, wide_dtype
from dynrank_ds.errors import RecipeError
from dynrank_ds.ranking.layout import ModuleShape, ShardLayout
from dynrank_ds.ranking.plan import RankPlan, RankState
from dynrank_ds.ranking.schedule import Schedule
from dynrank_ds.section import Section

AllReduceSum = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes, in place, and returns it; one collective."""


def mean_initial_rank(modules: Mapping[str, AdaptedModule]) -> float:
    """Return the mean rank of the modules when the run began."""
    return sum(module.initial_rank for module in modules.values()) / len(modules)


def rank_to_prune_to(
    config: MethodConfig, target_rank: int | None, modules: Mapping[str, AdaptedModule]
) -> int:
    """Return the mean rank of a module that a method ends with; the initial one, if given, prunes nothing.

    target_rank: as the recipe gives it; None is the method's default.

    Raises:
        RecipeError: it is above the initial rank, or the default would prune nothing.
    """
    initial = mean_initial_rank(modules)
    target = config.final_mean_rank(round(initial))
    assert target is not None
    if target > initial or (target_rank is None and target == initial):
        raise RecipeError(
            f"method.target_rank {target} is not below adapter.rank {initial:g}: nothing would be pruned"
        )
    return target


HIDDEN_SIZE_OF_DEFAULT_RATES = 576
"""Of SmolLM2-135M, for which `Method.default_rate` is."""

Steps = Annotated[int | float, Field(ge=0, description="whole steps, or a fraction of training below 1")]


class MethodConfig(Section):
    """Base of the methods' recipe sections; each is defined beside its method."""

    name: str

    def adjustments(self, total_steps: int) -> Schedule:
        """Return when ranks are adjusted in a run of `total_steps`.

        Raises:
            RecipeError: the section's times leave no adjustment.
        """
        return Schedule()

    def final_mean_rank(self, initial_rank: int) -> int | None:
        """Return the mean rank of a module when training ends, or None where nothing fixes it."""
        return None


@dataclass(frozen=True)
class MicroBatch:
    """What a method may know of the micro-batch whose backward runs."""

    token_mask: Tensor = field(default_factory=lambda: torch.ones(1, 1))
    """(batch, tokens): 1 for tokens, 0 for padding."""
    packed: tuple[int, ...] = ()
    """Lengths of the samples that were packed into a single row; () where each row is a sample."""
    step: int = 0
    """Its optimizer step, from 1."""
    last: bool = True
    """Whether it is the last of its step on this process: what depends on the weights alone is computed in it, once."""

    @property
    def sample_sizes(self) -> list[int]:
        """Positions of each sample, padding included, in the order of the flat input."""
        samples, tokens = self.token_mask.shape
        return list(self.packed) or [tokens] * samples


@dataclass(frozen=True)
class StepView:
    """One optimizer step before it is applied.

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
    rate_factor: float
    """This step's learning rate over `train.learning_rate`: learning rates of a method's own are multiplied by it."""
    all_reduce_sum: AllReduceSum


class Method:
    """A method that never changes ranks and keeps no statistics; dynamic methods override what they need.

    State is registered once, by kind: a tensor in `row_statistics`, `partial_statistics` or `replicated_state` is saved
    in checkpoints, restored in place, and (rows) carried along when ranks change.
    """

    config_class: ClassVar[type[MethodConfig]]
    factors: ClassVar[tuple[str, ...]]
    per_head: ClassVar[bool] = False
    """Whether each attention head is an adapted module of its own, instead of its whole linear."""
    least_rank: ClassVar[int] = 0
    """Triples that every module must begin with."""
    default_scale: ClassVar[float] = 2.0
    """The scale s of a recipe without adapter.alpha."""
    default_rate: ClassVar[float] = 3e-3
    """The learning rate of a recipe without train.learning_rate, at HIDDEN_SIZE_OF_DEFAULT_RATES and that scale."""
    refused_variants: ClassVar[Mapping[str, str]] = {}
    """Variants of adapted linears (`Variant`) that the method cannot be combined with, each with the reason."""
    observes_after_step = False
    """Whether `observe` sees the weights after the optimizer step and clipped gradients, as in some authors' code,
    instead of both as they were before."""

    def __init__(
        self,
        config: MethodConfig,
        modules: Mapping[str, AdaptedModule],
        total_steps: int,
        device: torch.device,
    ) -> None:
        self.shapes = tuple(ModuleShape(n, b.in_features, b.out_features) for n, b in modules.items())
        self.schedule = config.adjustments(total_steps)
        self.device = device
        self.dtype = wide_dtype(next(iter(modules.values())).dtype)
        """Of gates and statistics: fp32, or fp64 where the factors are."""
        self.row_statistics: dict[str, Tensor] = {}
        """Flat vectors of the layout, an element for each weight: they follow their triples. Created in `start`."""
        self.partial_statistics: dict[str, Tensor] = {}
        """Sums over processes of which each holds its part; of a size that does not depend on ranks."""
        self.replicated_state: dict[str, Tensor] = {}
        """Small tensors that are the same on every process, such as gates."""
        self.penalty: Tensor | None = None
        """() fp64: the value of the method's penalty on adapter weights at this step, the same on every process."""
        self._modules = list(modules.values())
        self._micro_batch = MicroBatch()
        self.attach()

    @staticmethod
    def init(rank: int, in_features: int, out_features: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return fp32 initial values of `rank` triples, by factor."""
        raise NotImplementedError

    def attach(self) -> None:
        """Have every module call this method's `on_backward`, or nothing where the method has none."""
        overridden = type(self).on_backward is not Method.on_backward
        for index, module in enumerate(self._modules):
            module.on_backward = partial(self._call_on_backward, index) if overridden else None

    def _call_on_backward(self, module: int, backward: ModuleBackward) -> None:
        self.on_backward(module, backward, self._micro_batch)

    def begin_micro_batch(self, micro_batch: MicroBatch) -> None:
        """Set the micro-batch that `on_backward` receives until the next call."""
        self._micro_batch = micro_batch
        if micro_batch.last and self.penalty is not None:
            self.penalty.zero_()  # what the next backward adds up

    def start(self, layout: ShardLayout) -> None:
        """Create statistics and gates for this layout, before the run's first step or before a checkpoint is read."""

    def restored(self) -> None:
        """Recompute what follows from the registered state, after a checkpoint was read into it."""

    def on_backward(self, module: int, backward: ModuleBackward, micro_batch: MicroBatch) -> None:
        """Read the backward of module number `module`, and add to its gradients; once a micro-batch."""

    def observe(self, view: StepView) -> None:
        """Update statistics and gates by an optimizer step that is about to be applied; at most one all-reduce."""

    def discard_step(self) -> None:
        """Drop what `on_backward` accumulated for a step that is not applied."""

    def adjusts_at(self, step: int) -> bool:
        """Return whether ranks are planned at optimizer step `step` (from 1)."""
        return step in self.schedule

    def planned_adjustments(self) -> int:
        """Return the number of adjustments in a whole run."""
        return len(self.schedule)

    def scores(self, view: StepView) -> Sequence[Tensor]:
        """Return per module the scores (rank,) fp64 on the CPU of its triples; at most two all-reduces."""
        raise TypeError(f"{type(self).__name__} never adjusts ranks")

    def plan(self, scores: Sequence[Tensor], state: RankState) -> RankPlan:
        """Return the plan: a function of the arguments and the recipe alone, so that the log reproduces it."""
        raise TypeError(f"{type(self).__name__} never adjusts ranks")

    def new_rows(
        self, module: int, old: Mapping[str, Tensor], plan: RankPlan, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return fp32 rows of the new triples of a module, by factor; by default initial values.

        old: fp32 rows of all its triples before the plan, (rank, row_length) by factor; {} at rank 0.
        """
        shape = self.shapes[module]
        return self.init(plan.new[module], shape.in_features, shape.out_features, generator)

    def applied(self, plan: RankPlan, step: int) -> None:
        """Adapt gates and replicated state to a plan that was just applied, after optimizer step `step`."""

    def gates(self) -> list[Tensor | None]:
        """Return per module the factor of its exported triples besides lora_E: fp32 (r,) or (1,), or None."""
        return [None] * len(self.shapes)
