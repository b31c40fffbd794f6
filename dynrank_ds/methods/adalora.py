"""AdaLoRA (Zhang et al., 2023): start above the target rank, mask the lowest triples, remove them at the end.

The formulas are those of the authors' code, which PEFT's allocator repeats. Its `global_step` counts the optimizer
steps from 0, ours from 1: global_step = step - 1 throughout. Until the final mask a masked triple keeps A, B and
moments, its e moves again at the next step, and it may come back; PEFT holds finally masked triples at e = 0 for the
rest of training, here they leave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dynrank_ds.adapters.linear import AdaptedModule
from dynrank_ds.errors import RecipeError
from dynrank_ds.methods.base import Steps, resolve_steps
from dynrank_ds.methods.sensitivity import SensitivityConfig, SensitivityMethod
from dynrank_ds.ranking.plan import RankPlan, RankState, kept_triples, lowest_triples


class AdaLoRAConfig(SensitivityConfig):
    """Recipe section `method: {name: adalora, ...}`; adapter.rank is the initial rank."""

    name: Literal["adalora"] = "adalora"
    target_rank: int | None = Field(default=None, ge=1)
    """Mean rank per module at the end; by default two thirds of adapter.rank, the paper's ratio."""
    t_i: Steps
    """Initial steps without masks."""
    interval: Steps
    """Masks are at every global_step that is a multiple of it (of the step itself, not of the steps since t_i)."""
    t_f: Steps
    """Steps from the final mask to the end, that of the mask included."""


class AdaLoRA(SensitivityMethod):
    """AdaLoRA (paper section 3, Algorithm 1) with physical removal at the final mask."""

    def __init__(
        self,
        config: AdaLoRAConfig,
        modules: Mapping[str, AdaptedModule],
        total_steps: int,
        device: torch.device,
    ) -> None:
        super().__init__(config, modules, total_steps, device)
        self.t_i = resolve_steps(config.t_i, total_steps, "method.t_i")
        self.interval = resolve_steps(config.interval, total_steps, "method.interval", at_least=1)
        t_f = resolve_steps(config.t_f, total_steps, "method.t_f")
        self.end = total_steps - t_f
        """The last global_step of the schedule: the final mask."""
        self.last_observed = self.end
        initial = next(iter(modules.values())).initial_rank
        target = config.target_rank or max(1, round(initial * 2 / 3))
        self.target_total = target * len(modules)
        if target >= initial:
            raise RecipeError(
                f"method.target_rank {target} is not below adapter.rank {initial}: nothing would be pruned"
            )
        if t_f < 1:
            raise RecipeError(
                f"method.t_f is {config.t_f}: give at least one step, which ends with the final mask"
            )
        if self.planned_adjustments() < 2:
            raise RecipeError(
                f"method.t_i {self.t_i} and method.interval {self.interval} leave no mask before the final one after "
                f"{self.end} steps (train steps {total_steps} less method.t_f)"
            )

    def adjusts_at(self, step: int) -> bool:
        global_step = step - 1
        masks = self.t_i < global_step < self.end and global_step % self.interval == 0
        return masks or global_step == self.end

    def planned_adjustments(self) -> int:
        return max(0, (self.end - 1) // self.interval - self.t_i // self.interval) + 1

    def budget(self, step: int, initial_total: int) -> int:
        """Triples that stay unmasked at an adjustment: cubic from `initial_total` to the target (paper eq. 12)."""
        left = 1 - (step - 1 - self.t_i) / (self.end - self.t_i)
        return int((initial_total - self.target_total) * left**3 + self.target_total)

    def plan(self, scores: Sequence[Tensor], state: RankState) -> RankPlan:
        total = sum(state.ranks)
        none = [0] * len(scores)
        lowest = lowest_triples(scores, total - self.budget(state.step, total), none)
        if state.step - 1 == self.end:
            return RankPlan(kept_triples(scores, lowest), tuple(none))
        everything = tuple(tuple(range(rank)) for rank in state.ranks)
        return RankPlan(everything, tuple(none), tuple(tuple(sorted(module)) for module in lowest))
