"""IncreLoRA: start small and add triples to the modules of highest score until a total is reached.

IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning (Zhang et al., 2023),
https://arxiv.org/abs/2308.12043.

A module's score is |dW * dL/dW| summed over the full-size product, so every step forms the dense gradient of
every adapted linear. What the authors' code does otherwise is said in README.md.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dynrank_ds.adapters.linear import AdaptedModule, ModuleBackward
from dynrank_ds.errors import RecipeError
from dynrank_ds.methods.base import MicroBatch, Steps, StepView, mean_initial_rank
from dynrank_ds.methods.sensitivity import OrthogonalConfig, OrthogonalMethod
from dynrank_ds.ranking.layout import ShardLayout
from dynrank_ds.ranking.plan import RankPlan, RankState
from dynrank_ds.ranking.schedule import Schedule

logger = logging.getLogger(__name__)

LARGEST_BASE = 1_000_000_000
"""Parameters of adapted linears up to which dense gradients are formed."""


class IncreLoRAConfig(OrthogonalConfig):
    """Recipe section `method: {name: increlora, ...}`; adapter.rank is the initial rank, 1 in the paper."""

    name: Literal["increlora"] = "increlora"
    target_rank: int | None = Field(default=None, ge=2)
    """Mean rank per module when growth ends; by default twice adapter.rank."""
    t_i: Steps = 0.1
    """Initial steps without growth."""
    interval: Steps = 0.05
    """Ranks grow at every step that is a multiple of it (of the step itself, not of the steps since t_i)."""
    top_h: int | None = Field(default=None, ge=1)
    """Modules that grow at a time; by default as many as reach the target with half of the adjustments that fit."""
    add_rank: int | None = Field(default=None, ge=1)
    """Triples that each of them gets; by default half the target rank, as in the authors' code."""

    def adjustments(self, total_steps: int) -> Schedule:
        phase = Schedule.resolve(total_steps, self.t_i, self.interval)
        return phase.adjusting(range(phase.first_multiple(), phase.end, phase.interval))

    def final_mean_rank(self, initial_rank: int) -> int:
        return self.target_rank or 2 * initial_rank


class IncreLoRA(OrthogonalMethod):
    """IncreLoRA with physical growth to exactly target_rank * modules triples."""

    config_class = IncreLoRAConfig
    least_rank = 1

    def __init__(
        self,
        config: IncreLoRAConfig,
        modules: Mapping[str, AdaptedModule],
        total_steps: int,
        device: torch.device,
    ) -> None:
        super().__init__(config, modules, total_steps, device)
        self.config, self.total_steps = config, total_steps
        target_rank = config.final_mean_rank(round(mean_initial_rank(modules)))
        self.add_rank = config.add_rank or target_rank // 2
        self.target_total = target_rank * len(modules)
        self.total_rank = self.initial_total = sum(module.initial_rank for module in modules.values())
        growths = -((self.initial_total - self.target_total) // self.add_rank)
        self.top_h = config.top_h or -(-growths // max(1, len(self.schedule) // 2))
        self._refuse(target_rank, mean_initial_rank(modules), sum(b.max_rank for b in modules.values()))

        sizes = [s.in_features * s.out_features for s in self.shapes]
        self._sizes = torch.tensor(sizes, dtype=torch.float64, device=device)
        self._sums, self.smoothed, self.uncertainty = torch.zeros(
            3, len(modules), dtype=torch.float64, device=device
        )
        self.replicated_state |= {"sensitivity": self.smoothed, "uncertainty": self.uncertainty}

    def _refuse(self, target_rank: int, initial: float, largest_total: int) -> None:
        """Raise RecipeError for what would do nothing, fall short of the target, or need too much memory."""
        base = sum(s.in_features * s.out_features for s in self.shapes)
        if base > LARGEST_BASE:
            raise RecipeError(
                f"increlora forms the dense gradient of every adapted linear at each step: {base:,} parameters, "
                f"{4 * base:,} bytes a step; it takes at most {LARGEST_BASE:,} parameters: adapt fewer linears "
                "(adapter.targets) or choose another method"
            )
        if target_rank <= initial:
            raise RecipeError(
                f"method.target_rank {target_rank} is not above adapter.rank {initial:g}: nothing would grow"
            )
        if largest_total < self.target_total:
            raise RecipeError(
                f"method.target_rank {target_rank} x {len(self.shapes)} modules is {self.target_total} triples, "
                f"but the modules' largest ranks add up to {largest_total}: lower it or raise adapter.max_rank"
            )
        if len(self.schedule) < self.planned_adjustments():
            raise RecipeError(
                f"method.top_h {self.top_h} modules by {self.add_rank} triples reach the target of "
                f"{self.target_total} triples after {self.planned_adjustments()} adjustments, but method.t_i "
                f"{self.schedule.t_i} and method.interval {self.schedule.interval} leave {len(self.schedule)} before "
                f"the last of {self.total_steps} steps"
            )

    def on_backward(self, module: int, backward: ModuleBackward, micro_batch: MicroBatch) -> None:
        if self.growing:
            self._sums[module] += product_sensitivity(backward, micro_batch.sample_sizes)
        super().on_backward(module, backward, micro_batch)

    @property
    def growing(self) -> bool:
        """Whether triples are still to be added: what follows costs nothing more."""
        return self.total_rank < self.target_total

    def start(self, layout: ShardLayout) -> None:
        self.total_rank = layout.total_rank

    def observe(self, view: StepView) -> None:
        if self.growing:
            # Each process saw its samples' gradients times the number of processes: the engine takes means.
            summed = view.all_reduce_sum(torch.cat([self._sums, self._sums.new_ones(1)]))
            sensitivity = summed[:-1] / summed[-1] / self._sizes.sqrt()
            self.smoothed.lerp_(sensitivity, 1 - self.config.beta1)
            self.uncertainty.lerp_((sensitivity - self.smoothed).abs(), 1 - self.config.beta2)
            if view.step == self.total_steps:
                logger.warning(
                    "increlora ends at %d of its %d triples: modules at their largest rank left too little room",
                    self.total_rank,
                    self.target_total,
                )
        self.discard_step()

    def discard_step(self) -> None:
        self._sums.zero_()

    def adjusts_at(self, step: int) -> bool:
        return self.growing and super().adjusts_at(step)

    def planned_adjustments(self) -> int:
        """Return the number of adjustments if no module reaches its largest rank; otherwise there are more."""
        each = min(self.top_h, len(self.shapes)) * self.add_rank
        return -((self.initial_total - self.target_total) // each)

    def scores(self, view: StepView) -> Sequence[Tensor]:
        """Score of modules, repeated for each triple."""
        scores = self.smoothed * self.uncertainty
        return view.layout.by_module(scores[view.layout.module_of_triple])

    def plan(self, scores: Sequence[Tensor], state: RankState) -> RankPlan:
        left, chosen = self.target_total - sum(state.ranks), 0
        new = [0] * len(scores)
        for module in sorted(range(len(scores)), key=lambda b: (-float(scores[b][0]), b)):
            count = min(self.add_rank, left, state.max_ranks[module] - state.ranks[module])
            if count > 0 and chosen < self.top_h:
                new[module], left, chosen = count, left - count, chosen + 1
        return RankPlan(tuple(tuple(range(rank)) for rank in state.ranks), tuple(new))

    def applied(self, plan: RankPlan, step: int) -> None:
        self.total_rank = sum(plan.ranks)


def product_sensitivity(backward: ModuleBackward, sizes: list[int]) -> Tensor:
    """Return () fp64: the sum over samples of sum |dW * dL/dW|, with dW = s B^T diag(e) A and dL/dW of one sample.

    sizes: positions of each sample. By samples, so that it does not matter how a batch is cut into micro-batches,
    packed, and dealt to processes.
    """
    dtype = torch.promote_types(backward.x.dtype, torch.float32)
    assert backward.gate is not None
    gated = backward.lora_b.to(dtype) * (backward.gate.to(dtype) * backward.scale)[:, None]
    product = gated.T @ backward.lora_a.to(dtype)
    total = product.new_zeros((), dtype=torch.float64)
    for grad_y, x in zip(backward.grad_y.split(sizes), backward.x.split(sizes), strict=True):
        total += (grad_y.to(dtype).T @ x.to(dtype)).mul_(product).abs_().sum(dtype=torch.float64)
    return total
