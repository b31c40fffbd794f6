"""AdaLoRA: start above the target rank, mask the triples of lowest score, remove them at the end.

Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (Zhang et al., 2023), https://arxiv.org/abs/2303.10512.

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
from dynrank_ds.methods.base import Steps, mean_initial_rank, rank_to_prune_to
from dynrank_ds.methods.sensitivity import SensitivityConfig, SensitivityMethod
from dynrank_ds.ranking.plan import RankPlan, RankState, kept_triples, lowest_triples
from dynrank_ds.ranking.schedule import Schedule


class AdaLoRAConfig(SensitivityConfig):
    """Recipe section `method: {name: adalora, ...}`; adapter.rank is the initial rank."""

    name: Literal["adalora"] = "adalora"
    target_rank: int | None = Field(default=None, ge=1)
    """Mean rank per module at the end, at most adapter.rank (which then prunes nothing); by default two thirds of
    adapter.rank, the paper's ratio."""
    t_i: Steps = 0.1
    """Initial steps without masks."""
    interval: Steps = 0.05
    """Masks are at every global_step that is a multiple of it (of the step itself, not of the steps since t_i)."""
    t_f: Steps = 0.3
    """Steps from the final mask to the end, that of the mask included."""

    def adjustments(self, total_steps: int) -> Schedule:
        phase = Schedule.resolve(total_steps, self.t_i, self.interval, self.t_f, t_f_at_least=1)
        masks = range(phase.first_multiple(), phase.end, phase.interval)
        return phase.adjusting((mask + 1 for mask in masks), [phase.end + 1])

    def final_mean_rank(self, initial_rank: int) -> int:
        return self.target_rank or max(1, round(initial_rank * 2 / 3))


class AdaLoRA(SensitivityMethod):
    """AdaLoRA (paper section 3, Algorithm 1) with physical removal at the final mask."""

    config_class = AdaLoRAConfig

    def __init__(
        self,
        config: AdaLoRAConfig,
        modules: Mapping[str, AdaptedModule],
        total_steps: int,
        device: torch.device,
    ) -> None:
        super().__init__(config, modules, total_steps, device)
        self.last_observed = self.schedule.end
        target = rank_to_prune_to(config, config.target_rank, modules)
        self.target_total = target * len(modules)
        self.prunes = target < mean_initial_rank(modules)

    def adjusts_at(self, step: int) -> bool:
        return self.prunes and super().adjusts_at(step)

    def planned_adjustments(self) -> int:
        return len(self.schedule) if self.prunes else 0

    def budget(self, step: int, initial_total: int) -> int:
        """Return how many triples stay unmasked at an adjustment: cubic, `initial_total` to target (paper eq. 12)."""
        left = 1 - (step - 1 - self.schedule.t_i) / (self.schedule.end - self.schedule.t_i)
        return int((initial_total - self.target_total) * left**3 + self.target_total)

    def plan(self, scores: Sequence[Tensor], state: RankState) -> RankPlan:
        total = sum(state.ranks)
        none = [0] * len(scores)
        lowest = lowest_triples(scores, total - self.budget(state.step, total), none)
        if state.step - 1 == self.schedule.end:
            return RankPlan(kept_triples(scores, lowest), tuple(none))
        everything = tuple(tuple(range(rank)) for rank in state.ranks)
        return RankPlan(everything, tuple(none), tuple(tuple(sorted(module)) for module in lowest))
