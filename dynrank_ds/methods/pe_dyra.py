"""PE-DyRA: prune the lowest triples of all modules, expand the best modules, keep the total rank.

No code of the authors is public. What the paper leaves open is decided here and said at each place;
silent points follow AdaLoRA's code, on which the paper's figures show it to be built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dynrank_ds.adapters.initial import svd_factors
from dynrank_ds.adapters.linear import AdaptedLinear
from dynrank_ds.errors import RecipeError
from dynrank_ds.methods.base import Method, MethodConfig, MicroBatch, Steps, SumOverProcesses, resolve_steps
from dynrank_ds.methods.penalties import orthogonality_gradient
from dynrank_ds.ranking.layout import ShardLayout
from dynrank_ds.ranking.plan import RankPlan, RankState, lowest_triples, spread_over_blocks
from dynrank_ds.ranking.statistics import InputEnergy, Sensitivity


class PEDyRAConfig(MethodConfig):
    """Recipe section `method: {name: pe_dyra, ...}`."""

    name: Literal["pe_dyra"] = "pe_dyra"
    t_i: Steps
    """Initial steps without adjustment."""
    interval: Steps
    """Steps between adjustments; the first is at t_i + interval."""
    t_f: Steps
    """Final steps without adjustment (a count, not a stop step: it fits the paper's LLaMA runs exactly)."""
    k: int = Field(default=12, ge=1)
    """Triples pruned and added at each adjustment."""
    mix: float = Field(default=0.5, ge=0, le=1)
    """Weight of the gradient score against the input score (the paper's alpha, whose value it does not give)."""
    normalise: Literal["mean", "none"] = "mean"
    """Divide each score by its mean over all triples before mixing; `none` is the formula as printed, in which
    the input score decides alone (it is 5 to 14 orders of magnitude larger)."""
    beta1: float = Field(default=0.85, ge=0, lt=1)
    beta2: float = Field(default=0.85, ge=0, lt=1)
    orthogonality: float = Field(default=0.1, ge=0)
    """The paper's gamma."""


class PEDyRA(Method):
    """PE-DyRA (paper sections 3.2 to 3.4) with physical rank changes."""

    init = staticmethod(svd_factors)
    factors = ("lora_A", "lora_E", "lora_B")

    def __init__(
        self,
        config: PEDyRAConfig,
        blocks: Mapping[str, AdaptedLinear],
        total_steps: int,
        device: torch.device,
    ) -> None:
        super().__init__(blocks, device)
        self.config = config
        self.t_i = resolve_steps(config.t_i, total_steps, "method.t_i")
        self.interval = resolve_steps(config.interval, total_steps, "method.interval")
        self.end = total_steps - resolve_steps(config.t_f, total_steps, "method.t_f")
        if self.interval < 1:
            raise RecipeError(
                f"method.interval is {config.interval}, less than one of the {total_steps} steps: give at least 1"
            )
        if not self.planned_adjustments():
            raise RecipeError(
                f"method.t_i {self.t_i} + method.interval {self.interval} leaves no adjustment before step {self.end} "
                f"(train steps {total_steps} less method.t_f): ranks would never change"
            )
        self.energy = InputEnergy(self.shapes, config.beta1, device)
        # Mean over all 2n factor matrices, as AdaLoRA's code has it.
        coefficient = config.orthogonality / (2 * len(self.shapes))
        for index, block in enumerate(blocks.values()):
            block.work = _BlockWork(index, self.energy, coefficient, self.micro_batch)

    def start(self, layout: ShardLayout) -> None:
        self.sensitivity = Sensitivity(layout.numel, self.config.beta1, self.config.beta2, self.device)

    def observe(
        self, step: int, weights: Tensor, gradients: Tensor, layout: ShardLayout, tokens: int
    ) -> None:
        if step < self.end:
            self.sensitivity.update(weights, gradients)
            self.energy.update(tokens)
        else:
            self.energy.discard()

    def discard_step(self) -> None:
        self.energy.discard()

    def adjusts_at(self, step: int) -> bool:
        return self.t_i < step < self.end and (step - self.t_i) % self.interval == 0

    def planned_adjustments(self) -> int:
        return max(0, (self.end - 1 - self.t_i) // self.interval)

    def scores(
        self, weights: Tensor, gradients: Tensor, layout: ShardLayout, total: SumOverProcesses
    ) -> Sequence[Tensor]:
        # What enters nonlinearly is summed first: input energies, and squared gradient norms per factor and block.
        squares = layout.block_sums(layout.row_sums(gradients.square()))
        energy = self.energy.smoothed.double()
        summed = total(torch.cat([squares.flatten(), energy]))
        norms, energy = summed[: squares.numel()].view_as(squares).sqrt(), summed[squares.numel() :]

        weighted = torch.zeros_like(weights)
        a, b, e = (layout.factor(weights, name) for name in ("lora_A", "lora_B", "lora_E"))
        layout.factor(weighted, "lora_A").copy_(a.abs() * energy[layout.input_ids])
        layout.factor(weighted, "lora_B").copy_(b.square())
        layout.factor(weighted, "lora_E").copy_(e.abs())
        sums = total(torch.stack([self.sensitivity.row_sums(layout), layout.row_sums(weighted)]))
        return layout.by_block(self._combine(sums[0] / layout.row_lengths(), sums[1], norms, layout))

    def _combine(self, sensitivity: Tensor, magnitudes: Tensor, norms: Tensor, layout: ShardLayout) -> Tensor:
        """(total_rank,) scores from global sums; rows of the (3, ...) arguments are A, E, B."""
        # Weights per module and from this step's gradients, as printed; 1/3 each where all norms are 0.
        share = norms / norms.sum(0).clamp_min(torch.finfo(norms.dtype).tiny)
        share = torch.where(norms.sum(0) > 0, share, torch.full_like(share, 1 / 3))
        gradient_score = (share[:, layout.block_of_triple] * sensitivity).sum(0)
        input_score = magnitudes[0] * magnitudes[1] * magnitudes[2].sqrt()
        if self.config.normalise == "mean":
            gradient_score, input_score = _by_mean(gradient_score), _by_mean(input_score)
        return self.config.mix * gradient_score + (1 - self.config.mix) * input_score

    def plan(self, scores: Sequence[Tensor], state: RankState) -> RankPlan:
        pruned = lowest_triples(scores, self.config.k, min_rank=1)
        keep = tuple(
            tuple(i for i in range(len(block)) if i not in gone)
            for block, gone in zip(scores, pruned, strict=True)
        )
        # The module score is the mean over survivors: Algorithm 2 computes it after removal.
        means = [float(block[list(kept)].mean()) for block, kept in zip(scores, keep, strict=True)]
        room = [limit - len(kept) for limit, kept in zip(state.max_ranks, keep, strict=True)]
        new = spread_over_blocks(means, sum(map(len, pruned)), room)
        return RankPlan(keep, tuple(new))

    def row_statistics(self) -> dict[str, Tensor]:
        return {"sensitivity": self.sensitivity.smoothed, "uncertainty": self.sensitivity.uncertainty}

    def set_row_statistics(self, values: Mapping[str, Tensor]) -> None:
        self.sensitivity.smoothed = values["sensitivity"]
        self.sensitivity.uncertainty = values["uncertainty"]

    def partial_statistics(self) -> dict[str, Tensor]:
        return {"input_energy": self.energy.smoothed}

    def set_partial_statistics(self, values: Mapping[str, Tensor]) -> None:
        self.energy.smoothed.copy_(values["input_energy"])


def _by_mean(scores: Tensor) -> Tensor:
    """Non-negative scores with mean 1; zeros stay zeros. No epsilon: gradient scores can be below any fixed one."""
    return scores / scores.mean().clamp_min(torch.finfo(scores.dtype).tiny)


class _BlockWork:
    """Input energy and the orthogonality gradient of one block, inside backward."""

    def __init__(self, block: int, energy: InputEnergy, coefficient: float, micro_batch: MicroBatch) -> None:
        self.block, self.energy, self.coefficient, self.micro_batch = block, energy, coefficient, micro_batch

    def observe_input(self, x: Tensor) -> None:
        self.energy.add(self.block, x, self.micro_batch.token_mask)

    def penalty_gradient(self, factor: Tensor) -> Tensor | None:
        if self.coefficient == 0:
            return None
        # The engine does not scale what is added here: each micro-batch gives its share.
        return orthogonality_gradient(factor) * (self.coefficient * self.micro_batch.share)
