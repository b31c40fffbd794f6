"""Dynamic DoRA of Mao et al.: single-rank components, the least important of them masked, more at each adjustment.

DoRA: Enhancing Parameter-Efficient Fine-Tuning with Dynamic Rank Distribution (Mao et al., 2024),
https://arxiv.org/abs/2405.17357.

Not weight-decomposed DoRA, which shares its short name. The components' coefficients c are lora_E. Where the paper's
schedule (eq. 9) is garbled in print, the authors' code decides; what differs from it is said at each place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dynrank_ds.adapters.linear import AdaptedModule, ModuleBackward
from dynrank_ds.methods.base import (
    Method,
    MethodConfig,
    MicroBatch,
    Steps,
    StepView,
    mean_initial_rank,
    rank_to_prune_to,
)
from dynrank_ds.methods.penalties import add_penalty, variance
from dynrank_ds.ranking.layout import ShardLayout
from dynrank_ds.ranking.plan import RankPlan, RankState, kept_triples, lowest_triples
from dynrank_ds.ranking.schedule import Schedule


class DynamicDoRAConfig(MethodConfig):
    """Recipe section `method: {name: dynamic_dora, ...}`; adapter.rank is the initial rank, 1.5 times the target."""

    name: Literal["dynamic_dora"] = "dynamic_dora"
    target_rank: int | None = Field(default=None, ge=1)
    """Mean rank per module at the end, at most adapter.rank (which then prunes nothing, as in the paper's Table 6); by
    default two thirds of adapter.rank, rounded down (the paper starts at 1.5 times the target, rounded up)."""
    t_i: Steps = 0.15
    """Initial steps without masks; the first mask is at step t_i."""
    interval: Steps = 10
    """Steps between masks."""
    t_f: Steps = 0.5
    """Final steps without masks; what the last mask before them hits is removed for good."""
    beta: float = Field(default=0.9, ge=0, lt=1)
    """Share of its old value when a score is smoothed over steps (the paper's eq. 8)."""
    variance: float = Field(default=0.1, ge=0)
    """The paper's eta, weight of the dimensional equilibrium penalty (DEM), the mean variance within the rows of A and
    B: 0.1 to 0.5 in the paper, 0.1 for generation (XSum); 0 leaves it out."""

    def adjustments(self, total_steps: int) -> Schedule:
        phase = Schedule.resolve(total_steps, self.t_i, self.interval, self.t_f)
        regular = range(phase.t_i + phase.interval, phase.end + 1, phase.interval)
        first = [phase.t_i] if phase.t_i else []  # there is no step 0
        return phase.adjusting(regular, [*first, phase.end])

    def final_mean_rank(self, initial_rank: int) -> int:
        return self.target_rank or max(1, initial_rank * 2 // 3)


def component_factors(
    rank: int, in_features: int, out_features: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the authors' initial values, fp32: A (r, in) and B (out, r) Kaiming uniform with gain sqrt(2), c = 0.

    That is a ~ U(+-sqrt(6 / in)) and b ~ U(+-sqrt(6 / r)).
    """

    def uniform(length: int, fan_in: int) -> Tensor:
        bound = math.sqrt(6 / fan_in)
        return torch.rand(rank, length, generator=generator).mul_(2 * bound).sub_(bound)

    return {
        "lora_A": uniform(in_features, fan_in=in_features),
        "lora_E": torch.zeros(rank),
        "lora_B": uniform(out_features, fan_in=max(1, rank)),
    }


def relative_norms(lora_a: Tensor, c: Tensor, lora_b: Tensor) -> Tensor:
    """Return (r,) fp64: ||c_i b_i a_i||_F / (||B diag(c) A||_F + 1e-8) (eq. 7), without an (out, in) matrix.

    <c_i b_i a_i, c_j b_j a_j> = c_i c_j (b_i . b_j) (a_i . a_j): both norms are in one (r, r) matrix.
    """
    a, b = lora_a.double(), lora_b.double()
    gram = (a @ a.T) * (b @ b.T) * torch.outer(c.double(), c.double())
    return gram.diagonal().sqrt() / (gram.sum().clamp_min(0).sqrt() + 1e-8)


class DynamicDoRA(Method):
    """Dynamic DoRA (paper sections 3.2 to 3.4): soft masks, then physical removal at the last one."""

    config_class = DynamicDoRAConfig
    init = staticmethod(component_factors)
    default_scale = 4 / 3  # the authors' alpha 8 at rank 6; b begins 30 times longer than a row of LoRA's A
    default_rate = 5e-3
    factors = ("lora_A", "lora_E", "lora_B")

    def __init__(
        self,
        config: DynamicDoRAConfig,
        modules: Mapping[str, AdaptedModule],
        total_steps: int,
        device: torch.device,
    ) -> None:
        super().__init__(config, modules, total_steps, device)
        self.beta = config.beta
        initial = mean_initial_rank(modules)
        target = rank_to_prune_to(config, config.target_rank, modules)
        self.surplus = round((initial - target) * len(modules))
        """Triples that are removed by the end."""
        # All components count, masked ones too, as in the authors' code; eq. 10 prints twice this.
        self._variance = config.variance / (2 * initial * len(modules))
        if config.variance:
            self.penalty = torch.zeros((), dtype=torch.float64, device=device)

    def start(self, layout: ShardLayout) -> None:
        self.ranks = layout.ranks
        self.smoothed = torch.zeros(layout.total_rank, dtype=torch.float64, device=self.device)
        self.replicated_state["scores"] = self.smoothed
        self._latest = self.smoothed.clone()
        self._latest_of = self._latest.split(list(layout.ranks))

    def on_backward(self, module: int, backward: ModuleBackward, micro_batch: MicroBatch) -> None:
        """Score triples where the factors are whole, so that every process has the scores without communication.

        They are of the weights before the optimizer step; the authors take them after it (ours). Weights do not change
        within a step: one micro-batch is enough.
        """
        if micro_batch.last and micro_batch.step <= self.schedule.end:
            assert backward.gate is not None
            self._latest_of[module].copy_(relative_norms(backward.lora_a, backward.gate, backward.lora_b))
            if self.penalty is not None:
                self.penalty += add_penalty(backward, variance, self._variance)

    def observe(self, view: StepView) -> None:
        if view.step <= self.schedule.end:
            self.smoothed.lerp_(self._latest, 1 - self.beta)

    def scores(self, view: StepView) -> Sequence[Tensor]:
        return view.layout.by_module(self.smoothed)

    def adjusts_at(self, step: int) -> bool:
        return self.surplus > 0 and super().adjusts_at(step)

    def planned_adjustments(self) -> int:
        return len(self.schedule) if self.surplus else 0

    def masked_at(self, step: int) -> int:
        """Return how many triples are masked at an adjustment: surplus ((t - t_i) / span)^3 rounded down, at least one.

        Slow first and fast last. In whole numbers, so that no rounding error takes one off the last mask.
        """
        span = self.schedule.end - self.schedule.t_i
        return max(1, self.surplus * (step - self.schedule.t_i) ** 3 // span**3)

    def plan(self, scores: Sequence[Tensor], state: RankState) -> RankPlan:
        none = (0,) * len(state.ranks)
        lowest = lowest_triples(scores, self.masked_at(state.step), min_ranks=none)
        if state.step == self.schedule.end:
            return RankPlan(kept_triples(scores, lowest), none)
        everything = tuple(tuple(range(rank)) for rank in state.ranks)
        return RankPlan(everything, none, tuple(tuple(sorted(module)) for module in lowest))

    def applied(self, plan: RankPlan, step: int) -> None:
        if plan.ranks != self.ranks:
            kept = [s[list(k)] for s, k in zip(self.smoothed.split(list(self.ranks)), plan.keep, strict=True)]
            self.smoothed, self.ranks = torch.cat(kept), plan.ranks
            self.replicated_state["scores"] = self.smoothed
