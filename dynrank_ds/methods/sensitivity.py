"""What AdaLoRA and the methods built on it share: triples in SVD form, scored by smoothed sensitivity.

And what PE-DyRA and ElaLoRA share besides: when triples move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dynrank_ds.adapters.initial import svd_factors
from dynrank_ds.adapters.linear import AdaptedModule
from dynrank_ds.errors import RecipeError
from dynrank_ds.methods.base import Method, MethodConfig, Steps, StepView, resolve_steps
from dynrank_ds.methods.penalties import orthogonality_work
from dynrank_ds.ranking.layout import ShardLayout
from dynrank_ds.ranking.statistics import Sensitivity


class SensitivityConfig(MethodConfig):
    """Fields of every method that scores triples as AdaLoRA does."""

    beta1: float = Field(default=0.85, ge=0, lt=1)
    """Smoothing of the sensitivity."""
    beta2: float = Field(default=0.85, ge=0, lt=1)
    """Smoothing of its uncertainty."""
    orthogonality: float = Field(default=0.1, ge=0)
    """Coefficient of the mean of ||F F^T - I||_F over all A and B (AdaLoRA's code; the papers print squares; PE-DyRA's
    gamma)."""
    observe: Literal["before_step", "after_step"] = "before_step"
    """Take weights and gradients before the optimizer step, gradients unclipped; or, as the authors' trainers call
    their allocator, weights after the step with clipped gradients from before it."""


class SensitivityMethod(Method):
    """S_i = s(e_i) + mean_j s(A_ij) + mean_j s(B_ij) with s(w) = Ibar(w) U(w) (AdaLoRA, eq. 7 to 11).

    Subclasses set `last_observed`: the statistics stand still after that step.
    """

    init = staticmethod(svd_factors)
    factors = ("lora_A", "lora_E", "lora_B")
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
        work = orthogonality_work(config.orthogonality, len(modules), self.micro_batch)
        for module in modules.values():
            module.work = work

    def start(self, layout: ShardLayout) -> None:
        self.sensitivity = Sensitivity(layout.numel, *self.betas, self.device, self.dtype)

    def observe(self, view: StepView) -> None:
        if view.step <= self.last_observed:
            self.sensitivity.update(view.weights, view.gradients)

    def scores(self, view: StepView) -> Sequence[Tensor]:
        sums = view.all_reduce_sum(self.sensitivity.row_sums(view.layout))
        return view.layout.by_module((sums / view.layout.row_lengths()).sum(0))

    def row_statistics(self) -> dict[str, Tensor]:
        return {"sensitivity": self.sensitivity.smoothed, "uncertainty": self.sensitivity.uncertainty}

    def set_row_statistics(self, values: Mapping[str, Tensor]) -> None:
        self.sensitivity.smoothed = values["sensitivity"]
        self.sensitivity.uncertainty = values["uncertainty"]


class MovesConfig(SensitivityConfig):
    """Fields of the methods that move triples between modules at intervals."""

    t_i: Steps
    """Initial steps without adjustment."""
    interval: Steps
    """Steps between adjustments; the first is at t_i + interval."""
    t_f: Steps
    """Final steps without adjustment (a count, not a stop step: it fits PE-DyRA's LLaMA runs exactly)."""


class MovesMethod(SensitivityMethod):
    """Adjusts every `interval` steps between t_i and the last t_f; every module keeps at least one triple."""

    def __init__(
        self,
        config: MovesConfig,
        modules: Mapping[str, AdaptedModule],
        total_steps: int,
        device: torch.device,
    ) -> None:
        super().__init__(config, modules, total_steps, device)
        self.t_i = resolve_steps(config.t_i, total_steps, "method.t_i")
        self.interval = resolve_steps(config.interval, total_steps, "method.interval", at_least=1)
        self.end = total_steps - resolve_steps(config.t_f, total_steps, "method.t_f")
        self.last_observed = self.end - 1
        if not self.planned_adjustments():
            raise RecipeError(
                f"method.t_i {self.t_i} + method.interval {self.interval} leaves no adjustment before step {self.end} "
                f"(train steps {total_steps} less method.t_f): ranks would never change"
            )

    def _due(self) -> range:
        """The steps at which the schedule allows an adjustment."""
        return range(self.t_i + self.interval, self.end, self.interval)

    def adjusts_at(self, step: int) -> bool:
        return step in self._due()

    def planned_adjustments(self) -> int:
        return sum(map(self.adjusts_at, self._due()))


def refuse_rank_one(name: str, modules: Mapping[str, AdaptedModule]) -> None:
    """Raises RecipeError where a method that leaves every module one triple would have none to take."""
    if next(iter(modules.values())).initial_rank == 1:
        raise RecipeError(
            f"adapter.rank is 1: {name} leaves every module one triple, so none could move; give at least 2"
        )
