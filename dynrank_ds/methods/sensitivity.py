"""What AdaLoRA and the methods built on it share: triples in SVD form, scored by smoothed sensitivity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dynrank_ds.adapters.initial import svd_factors
from dynrank_ds.adapters.linear import Block
from dynrank_ds.methods.base import Method, MethodConfig, StepView
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
        self, config: SensitivityConfig, blocks: Mapping[str, Block], total_steps: int, device: torch.device
    ) -> None:
        super().__init__(config, blocks, total_steps, device)
        self.betas = (config.beta1, config.beta2)
        self.observes_after_step = config.observe == "after_step"
        work = orthogonality_work(config.orthogonality, len(blocks), self.micro_batch)
        for block in blocks.values():
            block.work = work

    def start(self, layout: ShardLayout) -> None:
        self.sensitivity = Sensitivity(layout.numel, *self.betas, self.device)

    def observe(self, view: StepView) -> None:
        if view.step <= self.last_observed:
            self.sensitivity.update(view.weights, view.gradients)

    def scores(self, view: StepView) -> Sequence[Tensor]:
        sums = view.total(self.sensitivity.row_sums(view.layout))
        return view.layout.by_block((sums / view.layout.row_lengths()).sum(0))

    def row_statistics(self) -> dict[str, Tensor]:
        return {"sensitivity": self.sensitivity.smoothed, "uncertainty": self.sensitivity.uncertainty}

    def set_row_statistics(self, values: Mapping[str, Tensor]) -> None:
        self.sensitivity.smoothed = values["sensitivity"]
        self.sensitivity.uncertainty = values["uncertainty"]
