"""What AdaLoRA and the methods built on it share: triples in SVD form, scored by smoothed sensitivity.

And what PE-DyRA and ElaLoRA share besides: the schedule by which triples are pruned here and added there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dynrank_ds.adapters.initial import svd_factors
from dynrank_ds.adapters.linear import AdaptedModule, ModuleBackward
from dynrank_ds.errors import RecipeError
from dynrank_ds.methods.base import Method, MethodConfig, MicroBatch, Steps, StepView
from dynrank_ds.methods.penalties import add_penalty, orthogonality
from dynrank_ds.ranking.layout import ShardLayout
from dynrank_ds.ranking.schedule import Schedule
from dynrank_ds.ranking.statistics import Sensitivity


class OrthogonalConfig(MethodConfig):
    """Fields of every method that smooths a sensitivity and holds A and B near orthonormal rows."""

    beta1: float = Field(default=0.85, ge=0, lt=1)
    """Share of its old value when the sensitivity |w g| of a weight is smoothed over steps (AdaLoRA, eq. 9)."""
    beta2: float = Field(default=0.85, ge=0, lt=1)
    """The same for its uncertainty, |sensitivity - smoothed sensitivity| (AdaLoRA, eq. 10)."""
    orthogonality: float = Field(default=0.1, ge=0)
    """Coefficient of the penalty that keeps rows of A and B orthonormal: the mean of ||F F^T - I||_F over all A and B
    (as AdaLoRA's code; the papers print squares). PE-DyRA's gamma."""


class SensitivityConfig(OrthogonalConfig):
    """Fields of every method that scores triples as AdaLoRA does."""

    observe: Literal["before_step", "after_step"] = "before_step"
    """When sensitivities are computed: from weights and gradients before the optimizer step, gradients unclipped; or,
    as the authors' trainers call their allocator, from weights after it and the clipped gradients that made it."""


class OrthogonalMethod(Method):
    """Triples in SVD form whose A and B are held near orthonormal rows, as in AdaLoRA's code."""

    init = staticmethod(svd_factors)
    default_scale = 8.0  # e begins at 0, and with it everything: at LoRA's scale this form starts slowly
    default_rate = 5e-3
    factors = ("lora_A", "lora_E", "lora_B")

    def __init__(
        self,
        config: OrthogonalConfig,
        modules: Mapping[str, AdaptedModule],
        total_steps: int,
        device: torch.device,
    ) -> None:
        super().__init__(config, modules, total_steps, device)
        # The mean over the A and B of all modules.
        self._orthogonality = config.orthogonality / (2 * len(modules))
        if config.orthogonality:
            self.penalty = torch.zeros((), dtype=torch.float64, device=device)

    def on_backward(self, module: int, backward: ModuleBackward, micro_batch: MicroBatch) -> None:
        """Add the penalty's gradient once a step: weights do not change within it, and the engine does not scale it."""
        if self.penalty is not None and micro_batch.last:
            self.penalty += add_penalty(backward, orthogonality, self._orthogonality)


class SensitivityMethod(OrthogonalMethod):
    """S_i = s(e_i) + mean_j s(A_ij) + mean_j s(B_ij) with s(w) = Ibar(w) U(w) (AdaLoRA, eq. 7 to 11).

    Subclasses set `last_observed`: statistics do not change after that step.
    """

    last_observed: int

    def __init__(
        self,
        config: SensitivityConfig,
        modules: Mapping[str, AdaptedModule],
        total_steps: int,
        device: torch.device,
    ) -> None:
        super().__init__(config, modules, total_steps, device)
        self.betas = (config.beta1, config.beta2)
        self.observes_after_step = config.observe == "after_step"

    def start(self, layout: ShardLayout) -> None:
        self.sensitivity = Sensitivity(
            self.row_statistics, layout.numel, *self.betas, self.device, self.dtype
        )

    def observe(self, view: StepView) -> None:
        if view.step <= self.last_observed:
            self.sensitivity.update(view.weights, view.gradients)

    def scores(self, view: StepView) -> Sequence[Tensor]:
        sums = view.all_reduce_sum(self.sensitivity.row_sums(view.layout))
        return view.layout.by_module((sums / view.layout.row_lengths()).sum(0))


class ReallocationConfig(SensitivityConfig):
    """Fields of the methods that prune triples in some modules and add as many to others, at intervals."""

    t_i: Steps = 0.2
    """Initial steps without adjustment."""
    interval: Steps = 0.05
    """Steps between adjustments; the first is at t_i + interval."""
    t_f: Steps = 0.3
    """Final steps without adjustment (a count, not a stop step: it fits PE-DyRA's LLaMA runs exactly)."""

    def adjustments(self, total_steps: int) -> Schedule:
        phase = Schedule.resolve(total_steps, self.t_i, self.interval, self.t_f)
        return phase.adjusting(range(phase.t_i + phase.interval, phase.end, phase.interval))


class ReallocationMethod(SensitivityMethod):
    """Adjusts every `interval` steps between t_i and the last t_f; every module keeps at least one triple."""

    least_rank = 1

    def __init__(
        self,
        config: ReallocationConfig,
        modules: Mapping[str, AdaptedModule],
        total_steps: int,
        device: torch.device,
    ) -> None:
        super().__init__(config, modules, total_steps, device)
        self.last_observed = self.schedule.end - 1


def refuse_rank_one(name: str, modules: Mapping[str, AdaptedModule]) -> None:
    """Raise RecipeError where a method that leaves every module one triple could prune none."""
    if all(module.initial_rank == 1 for module in modules.values()):
        raise RecipeError(
            f"adapter.rank is 1: {name} leaves every module one triple, so that none could be pruned; give at least 2"
        )
