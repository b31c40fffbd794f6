"""Squeeze: train at a high rank and truncate the updates to their largest singular values on the way.

LoRA-Squeeze: Simple and Effective Post-Tuning and In-Tuning Compression of LoRA Modules (Vulic et al., 2026),
https://arxiv.org/abs/2602.10993: its in-tuning form. One threshold of singular values over all modules together, where
the paper gives every module the same rank, is that of PARA (https://arxiv.org/abs/2604.27796) and of `dynrank resize`.

A truncated module is written anew from the SVD of its update, s B^T A = U S V^T, as the best approximation at its new
rank (Eckart and Young, 1936). The singular values come from an r x r matrix, never from the update itself: from the
triangular factors of A^T and B^T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dynrank_ds.adapters.initial import lora_factors
from dynrank_ds.adapters.linear import AdaptedModule, ModuleBackward
from dynrank_ds.methods.base import Method, MethodConfig, MicroBatch, Steps, StepView, rank_to_prune_to
from dynrank_ds.ranking.plan import RankPlan, RankState, lowest_triples
from dynrank_ds.ranking.schedule import Schedule

_LENGTH = 3**-0.5
"""Of a truncated module's rows of A: about that of LoRA's initial ones, U(+-1 / sqrt(in)). With the singular value in B
alone, a triple trains on however small that is."""


class SqueezeConfig(MethodConfig):
    """Recipe section `method: {name: squeeze, ...}`; adapter.rank is the initial rank."""

    name: Literal["squeeze"] = "squeeze"
    target_rank: int | None = Field(default=None, ge=1)
    """Mean rank per module at the end, at most adapter.rank (which then truncates nothing); by default a quarter of
    it."""
    t_i: Steps = 0.1
    """Initial steps at the full rank."""
    interval: Steps = 0.1
    """Steps between truncations."""
    t_f: Steps = 0.3
    """Steps after the last truncation."""

    def adjustments(self, total_steps: int) -> Schedule:
        phase = Schedule.resolve(total_steps, self.t_i, self.interval, self.t_f, t_f_at_least=1)
        regular = range(phase.t_i + phase.interval, phase.end + 1, phase.interval)
        # At step 1 every update is still 0.
        return phase.adjusting((step for step in regular if step > 1), [phase.end])

    def final_mean_rank(self, initial_rank: int) -> int:
        return self.target_rank or max(1, initial_rank // 4)


class Squeeze(Method):
    """LoRA whose total rank falls linearly from the initial to the target rank."""

    config_class = SqueezeConfig
    init = staticmethod(lora_factors)
    factors = ("lora_A", "lora_B")
    least_rank = 1
    refused_variants: ClassVar[Mapping[str, str]] = {
        "pissa": "its triples are written anew, and PiSSA subtracts each one's initial triple: give adapter.init "
        "default"
    }

    def __init__(
        self,
        config: SqueezeConfig,
        modules: Mapping[str, AdaptedModule],
        total_steps: int,
        device: torch.device,
    ) -> None:
        super().__init__(config, modules, total_steps, device)
        self.initial_total = sum(module.initial_rank for module in modules.values())
        self.target_total = rank_to_prune_to(config, config.target_rank, modules) * len(modules)
        self.truncates = self.target_total < self.initial_total
        self._singular: list[Tensor] = [torch.empty(0) for _ in self.shapes]

    def adjusts_at(self, step: int) -> bool:
        return self.truncates and super().adjusts_at(step)

    def planned_adjustments(self) -> int:
        return len(self.schedule) if self.truncates else 0

    def on_backward(self, module: int, backward: ModuleBackward, micro_batch: MicroBatch) -> None:
        """Note the singular values of s B^T A, (rank,) fp64, where they are needed; factors are whole here."""
        if micro_batch.last and self.adjusts_at(micro_batch.step):
            a, b = (
                torch.linalg.qr(factor.double().T, mode="r").R
                for factor in (backward.lora_a, backward.lora_b)
            )
            values = torch.linalg.svdvals(b @ a.T) * backward.scale
            # A linear narrower than the rank has fewer.
            padding = values.new_zeros(len(backward.lora_a) - len(values))
            self._singular[module] = torch.cat([values, padding])

    def scores(self, view: StepView) -> Sequence[Tensor]:
        """Return per module its singular values, descending: the mean over processes, so that all hold the same."""
        held = [values for values, rank in zip(self._singular, view.layout.ranks, strict=True) if rank]
        summed = view.all_reduce_sum(torch.cat([*held, held[0].new_ones(1)]))
        return view.layout.by_module(summed[:-1] / summed[-1])

    def budget(self, step: int) -> int:
        """Return the total rank after the truncation of `step`."""
        done = (step - self.schedule.t_i) / (self.schedule.end - self.schedule.t_i)
        return round(self.initial_total + (self.target_total - self.initial_total) * done)

    def plan(self, scores: Sequence[Tensor], state: RankState) -> RankPlan:
        """Return the plan by which a truncated module keeps no triple and gets as many new ones as it has left."""
        excess = max(0, sum(state.ranks) - self.budget(state.step))
        dropped = lowest_triples(scores, excess, [0] * len(scores))
        left = [rank - len(gone) for rank, gone in zip(state.ranks, dropped, strict=True)]
        keep = tuple(
            () if gone else tuple(range(rank)) for rank, gone in zip(state.ranks, dropped, strict=True)
        )
        return RankPlan(keep, tuple(n if gone else 0 for n, gone in zip(left, dropped, strict=True)))

    def new_rows(
        self, module: int, old: Mapping[str, Tensor], plan: RankPlan, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return the largest singular triples of the module's update, with the singular values in B.

        A linear that is narrower than its rank has no others: what lacks begins as at the start, without effect.
        """
        (q_a, r_a), (q_b, r_b) = (torch.linalg.qr(old[factor].double().T) for factor in self.factors)
        u, singular, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        rows = super().new_rows(module, old, plan, generator)
        number = min(plan.new[module], len(singular))
        rows["lora_A"][:number] = ((q_a @ v.T) * _LENGTH).T[:number]
        rows["lora_B"][:number] = ((q_b @ u) * (singular / _LENGTH)).T[:number]
        return rows
