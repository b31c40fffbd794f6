"""PE-DyRA: prune the lowest triples of all modules, expand the best modules, keep the total rank.

PE-DyRA: Dynamic Rank Adaptation for Parameter-Efficient Fine-Tuning via Importance-Aware Pruning and Expansion (Zhao
et al., submitted to ICLR 2026), https://openreview.net/forum?id=Lla4eFlDJu; no arXiv number is known to us.

No code of the authors is public. What the paper leaves open is decided here and said at each place;
silent points follow AdaLoRA's code, on which the paper's figures show it to be built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dynrank_ds.adapters.linear import AdaptedModule, ModuleBackward
from dynrank_ds.methods.base import MicroBatch, StepView
from dynrank_ds.methods.sensitivity import ReallocationConfig, ReallocationMethod, refuse_rank_one
from dynrank_ds.ranking.layout import ShardLayout
from dynrank_ds.ranking.plan import RankPlan, RankState, kept_triples, lowest_triples, spread_over_modules
from dynrank_ds.ranking.statistics import InputEnergy
from dynrank_ds.section import inconsistent


class PEDyRAConfig(ReallocationConfig):
    """Recipe section `method: {name: pe_dyra, ...}`."""

    name: Literal["pe_dyra"] = "pe_dyra"
    k: Annotated[int, Field(ge=1)] | Literal["auto"] = 12
    """Triples pruned and added at each adjustment. `auto` (ours; the paper names it as future work) moves up to
    `k_max` triples at a time toward the allocation of Theorem 3.1, and none once that gains nothing."""
    k_max: int = Field(default=12, ge=1)
    """Most triples that move at an adjustment with `k: auto`."""
    moves: Literal["both", "prune", "expand"] = "both"
    """The paper's ablations: only prune, or only expand; the total rank is then not kept."""
    conserve: Literal["ranks", "parameters"] = "ranks"
    """What an adjustment conserves. A triple of down_proj has three times the parameters of one of k_proj:
    `parameters` (ours) expands while the parameter count of the start is not exceeded."""
    mix: float = Field(default=0.5, ge=0, le=1)
    """Weight of the gradient score against the input score (the paper's alpha, whose value it does not give);
    1 is the ablation without the input score."""
    combination: Literal["gradient_aware", "linear"] = "gradient_aware"
    """How the sensitivities of A, e and B are combined: weighted by gradient norms, or (ablation) alike."""
    normalise: Literal["mean", "none"] = "mean"
    """Divide each score by its mean over all triples before mixing; `none` is the formula as printed, in which
    the input score decides alone (it is 5 to 14 orders of magnitude larger)."""
    input_energy: Literal["mean_square", "rms"] = "mean_square"
    """An input feature's mean square, as the formula is printed, or its root, as the paper's norm sign has it."""
    module_mean: Literal["after", "before"] = "after"
    """Whether a module is judged by its triples after the pruning of the same adjustment (Algorithm 2) or before."""
    importance: Literal["scores", "random"] = "scores"
    """`random` draws every score anew at each adjustment: the ablation that shows what scores are worth."""

    @model_validator(mode="after")
    def _refuse_what_would_be_ignored(self) -> PEDyRAConfig:
        if self.conserve == "parameters" and (self.moves != "both" or self.k == "auto"):
            raise inconsistent(
                f"method.conserve is parameters with method.moves {self.moves} and method.k {self.k}: it needs "
                "moves: both and a number k"
            )
        if self.k == "auto" and (self.moves != "both" or self.module_mean != "after"):
            raise inconsistent(
                f"method.k is auto with method.moves {self.moves} and method.module_mean {self.module_mean}: it prunes "
                "and adds by the sum of each module's scores, so give moves: both and leave module_mean out"
            )
        return self


class PEDyRA(ReallocationMethod):
    """PE-DyRA (paper sections 3.2 to 3.4) with physical rank changes."""

    config_class = PEDyRAConfig

    def __init__(
        self,
        config: PEDyRAConfig,
        modules: Mapping[str, AdaptedModule],
        total_steps: int,
        device: torch.device,
    ) -> None:
        super().__init__(config, modules, total_steps, device)
        self.config = config
        self.initial_ranks = [module.initial_rank for module in modules.values()]
        if config.moves != "expand":
            refuse_rank_one(config.name, modules)
        self.energy = InputEnergy(self.shapes, config.beta1, device, self.dtype)
        self.partial_statistics["input_energy"] = self.energy.smoothed

    def on_backward(self, module: int, backward: ModuleBackward, micro_batch: MicroBatch) -> None:
        if micro_batch.step <= self.last_observed:
            self.energy.add(module, backward.x, micro_batch.token_mask)
        super().on_backward(module, backward, micro_batch)

    def observe(self, view: StepView) -> None:
        super().observe(view)
        if view.step <= self.last_observed:
            self.energy.update(view.tokens)

    def discard_step(self) -> None:
        self.energy.discard()

    def scores(self, view: StepView) -> Sequence[Tensor]:
        layout, weights = view.layout, view.weights
        if self.config.importance == "random":
            drawn = torch.Generator().manual_seed(view.step)
            return [torch.rand(rank, generator=drawn, dtype=torch.float64) for rank in layout.ranks]
        # What enters nonlinearly is summed first: input energies, and squared gradient norms per factor and module.
        squares = layout.module_sums(layout.row_sums(view.gradients.square()))
        energy = self.energy.smoothed.double()
        summed = view.all_reduce_sum(torch.cat([squares.flatten(), energy]))
        norms, energy = summed[: squares.numel()].view_as(squares).sqrt(), summed[squares.numel() :]
        if self.config.input_energy == "rms":
            energy = energy.sqrt()

        weighted = torch.zeros_like(weights)
        a, b, e = (layout.factor(weights, name) for name in ("lora_A", "lora_B", "lora_E"))
        layout.factor(weighted, "lora_A").copy_(a.abs() * energy[layout.input_ids])
        layout.factor(weighted, "lora_B").copy_(b.square())
        layout.factor(weighted, "lora_E").copy_(e.abs())
        sums = view.all_reduce_sum(
            torch.stack([self.sensitivity.row_sums(layout), layout.row_sums(weighted)])
        )
        return layout.by_module(self._combine(sums[0] / layout.row_lengths(), sums[1], norms, layout))

    def _combine(self, sensitivity: Tensor, magnitudes: Tensor, norms: Tensor, layout: ShardLayout) -> Tensor:
        """Return (total_rank,) scores from global sums; rows of the (3, ...) arguments are A, E, B."""
        # Weights per module and from this step's gradients, as printed; 1/3 each where all norms are 0.
        share = norms / norms.sum(0).clamp_min(torch.finfo(norms.dtype).tiny)
        if self.config.combination == "linear":
            norms = torch.zeros_like(norms)
        share = torch.where(norms.sum(0) > 0, share, torch.full_like(share, 1 / 3))
        gradient_score = (share[:, layout.module_of_triple] * sensitivity).sum(0)
        input_score = magnitudes[0] * magnitudes[1] * magnitudes[2].sqrt()
        if self.config.normalise == "mean":
            gradient_score, input_score = _by_mean(gradient_score), _by_mean(input_score)
        return self.config.mix * gradient_score + (1 - self.config.mix) * input_score

    def plan(self, scores: Sequence[Tensor], state: RankState) -> RankPlan:
        config = self.config
        if config.k == "auto":
            return _toward_theorem(scores, state, config.k_max)
        ones = [1] * len(scores)
        pruned = lowest_triples(scores, config.k if config.moves != "expand" else 0, ones)
        keep = kept_triples(scores, pruned)
        judged = keep if config.module_mean == "after" else kept_triples(scores, [set()] * len(scores))
        means = [float(module[list(triples)].mean()) for module, triples in zip(scores, judged, strict=True)]
        kept = [len(triples) for triples in keep]
        room = [limit - rank for limit, rank in zip(state.max_ranks, kept, strict=True)]
        if config.moves == "prune":
            new = [0] * len(scores)
        elif config.conserve == "ranks":
            count = config.k if config.moves == "expand" else sum(map(len, pruned))
            new = spread_over_modules(means, count, ones, room)
        else:
            costs = [shape.triple_parameters(self.factors) for shape in self.shapes]
            left = sum(
                c * (initial - r) for c, initial, r in zip(costs, self.initial_ranks, kept, strict=True)
            )
            new = spread_over_modules(means, left, costs, room)
        return RankPlan(keep, tuple(new))


def _toward_theorem(scores: Sequence[Tensor], state: RankState, k_max: int) -> RankPlan:
    """Return up to `k_max` moves of a triple from module to module, each of which lowers sum_l (G_l / r_l)^2.

    That sum is what r_l proportional to G_l^(2/3) (Theorem 3.1) minimises; it is convex in every r_l, so the best
    single moves lead there. G_l, the paper's gradient of module l, is taken as the sum of its triples' scores.
    """
    squares = [float(module.sum()) ** 2 for module in scores]
    ranks = list(state.ranks)
    modules = range(len(ranks))
    for _ in range(k_max):
        givers = [
            (squares[b] * (1 / (ranks[b] - 1) ** 2 - 1 / ranks[b] ** 2), b) for b in modules if ranks[b] > 1
        ]
        takers = [
            (squares[b] * (1 / ranks[b] ** 2 - 1 / (ranks[b] + 1) ** 2), -b)
            for b in modules
            if ranks[b] < state.max_ranks[b]
        ]
        if not givers or not takers or max(takers)[0] <= min(givers)[0]:
            break
        ranks[min(givers)[1]] -= 1
        ranks[-max(takers)[1]] += 1
    lowest = [min(now, wanted) for now, wanted in zip(state.ranks, ranks, strict=True)]
    keep = kept_triples(scores, lowest_triples(scores, sum(state.ranks), lowest))
    return RankPlan(keep, tuple(wanted - len(triples) for wanted, triples in zip(ranks, keep, strict=True)))


def _by_mean(scores: Tensor) -> Tensor:
    """Divide non-negative scores by their mean. No epsilon: scores of gradients can be below any fixed one."""
    return scores / scores.mean().clamp_min(torch.finfo(scores.dtype).tiny)
