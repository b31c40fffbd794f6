"""Dynamic DoRA (Mao et al., 2024): single-rank components, the least important masked, more and more of them.

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

from dynrank_ds.adapters.linear import AdaptedModule, BackwardWork, ModuleBackward
from dynrank_ds.errors import RecipeError
from dynrank_ds.methods.base import Method, MethodConfig, Steps, StepView, resolve_steps
from dynrank_ds.methods.penalties import add_variance
from dynrank_ds.ranking.layout import ShardLayout
from dynrank_ds.ranking.plan import RankPlan, RankState, kept_triples, lowest_triples


class DynamicDoRAConfig(MethodConfig):
    """Recipe section `method: {name: dynamic_dora, ...}`; adapter.rank is the initial rank, 1.5 times the target."""

    name: Literal["dynamic_dora"] = "dynamic_dora"
    target_rank: int | None = Field(default=None, ge=1)
    """Mean rank per module at the end; by default two thirds of adapter.rank, rounded down (the paper starts at
    1.5 times the target, rounded up)."""
    t_i: Steps = 0.15
    """Initial steps without masks; the first mask is at step t_i."""
    interval: Steps = 10
    """Steps between masks."""
    t_f: Steps = 0.5
    """Final steps without masks; what the last mask before them hits is removed for good."""
    beta: float = Field(default=0.9, ge=0, lt=1)
    """Smoothing of the scores."""
    variance: float = Field(default=0.1, ge=0)
    """The paper's eta, weight of the dimensional equilibrium penalty: 0.1 to 0.5, 0.1 for generation (XSum)."""


def component_factors(
    rank: int, in_features: int, out_features: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """The authors' initial values, fp32: A (r, in) and B (out, r) Kaiming uniform with gain sqrt(2), c = 0.

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
    """(r,) fp64: ||c_i b_i a_i||_F / (||B diag(c) A||_F + 1e-8) (eq. 7), without ever making an (out, in) matrix.

    <c_i b_i a_i, c_j b_j a_j> = c_i c_j (b_i . b_j) (a_i . a_j): both norms are in one (r, r) matrix.
    """
    a, b = lora_a.double(), lora_b.double()
    gram = (a @ a.T) * (b @ b.T) * torch.outer(c.double(), c.double())
    return gram.diagonal().sqrt() / (gram.sum().clamp_min(0).sqrt() + 1e-8)


class DynamicDoRA(Method):
    """Dynamic DoRA (paper sections 3.2 to 3.4): soft masks, then physical removal at the last one."""

    init = staticmethod(component_factors)
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
        self.t_i = resolve_steps(config.t_i, total_steps, "method.t_i")
        self.interval = resolve_steps(config.interval, total_steps, "method.interval", at_least=1)
        self.span = total_steps - self.t_i - resolve_steps(config.t_f, total_steps, "method.t_f")
        self.end = self.t_i + self.span
        """The step of the last mask."""
        initial = next(iter(modules.values())).initial_rank
        target = config.target_rank or max(1, initial * 2 // 3)
        self.surplus = (initial - target) * len(modules)
        """Triples that are gone in the end."""
        if target >= initial:
            raise RecipeError(
                f"method.target_rank {target} is not below adapter.rank {initial}: nothing would be pruned"
            )
        if self.span < self.interval:
            raise RecipeError(
                f"method.interval {self.interval} is longer than the {max(0, self.span)} steps from method.t_i "
                f"{self.t_i} to step {self.end} (train steps {total_steps} less method.t_f): no mask would come "
                "before the last"
            )
        # All components count, masked ones too, as in the authors' code; eq. 10 prints twice this.
        self.penalty = config.variance / (2 * initial * len(modules))
        for index, module in enumerate(modules.values()):
            module.work = self._work(index)

    def start(self, layout: ShardLayout) -> None:
        self.ranks = layout.ranks
        self.smoothed = torch.zeros(layout.total_rank, dtype=torch.float64, device=self.device)
        self._now = self.smoothed.clone()
        self._now_of = self._now.split(list(layout.ranks))

    def _work(self, module: int) -> BackwardWork:
        """Scores where the factors are whole, so that every process has them without any communication.

        They are of the weights before the optimizer step; the authors take them after it (ours).
        """

        def work(backward: ModuleBackward) -> None:
            # The weights stand still within a step: one micro-batch shows them all.
            if self.micro_batch.last and self.micro_batch.step <= self.end:
                assert backward.gate is not None
                self._now_of[module].copy_(relative_norms(backward.lora_a, backward.gate, backward.lora_b))
                add_variance(backward, self.penalty)

        return work

    def observe(self, view: StepView) -> None:
        if view.step <= self.end:
            self.smoothed.lerp_(self._now, 1 - self.beta)

    def adjusts_at(self, step: int) -> bool:
        since = step - self.t_i
        return 0 <= since <= self.span and (since % self.interval == 0 or since == self.span)

    def planned_adjustments(self) -> int:
        first = self.t_i >= 1  # there is no step 0 to mask at
        return first + self.span // self.interval + (self.span % self.interval > 0)

    def scores(self, view: StepView) -> Sequence[Tensor]:
        return view.layout.by_module(self.smoothed)

    def masked_at(self, step: int) -> int:
        """Triples masked at an adjustment: surplus ((t - t_i) / span)^3 rounded down, at least one.

        Slow first and fast last. In whole numbers, so that no rounding error takes one off the last mask.
        """
        return max(1, self.surplus * (step - self.t_i) ** 3 // self.span**3)

    def plan(self, scores: Sequence[Tensor], state: RankState) -> RankPlan:
        none = (0,) * len(state.ranks)
        lowest = lowest_triples(scores, self.masked_at(state.step), min_ranks=none)
        if state.step == self.end:
            return RankPlan(kept_triples(scores, lowest), none)
        everything = tuple(tuple(range(rank)) for rank in state.ranks)
        return RankPlan(everything, none, tuple(tuple(sorted(module)) for module in lowest))

    def applied(self, plan: RankPlan) -> None:
        if plan.ranks != self.ranks:
            kept = [s[list(k)] for s, k in zip(self.smoothed.split(list(self.ranks)), plan.keep, strict=True)]
            self.smoothed, self.ranks = torch.cat(kept), plan.ranks

    def replicated_state(self) -> dict[str, Tensor]:
        return {"scores": self.smoothed}

    def set_replicated_state(self, values: Mapping[str, Tensor]) -> None:
        self.smoothed.copy_(values["scores"])
