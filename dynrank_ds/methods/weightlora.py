"""WeightLoRA and WeightLoRA+: a trained weight per adapter, and only the K adapters of largest weight are kept.

WeightLoRA: Keep Only Necessary Adapters (Veprikov et al., 2025), https://arxiv.org/abs/2506.02724.

dW_b = w_b s B_b^T A_b. Until step T every adapter lives and w follows plain SGD, projected after each step onto
vectors of at most K positive entries (StoIHT); at T the others leave model and optimizer, and w stands still.
The paper's memory claim therefore holds from T on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dynrank_ds.adapters.initial import lora_factors
from dynrank_ds.adapters.linear import AdaptedModule, ModuleBackward
from dynrank_ds.errors import RecipeError
from dynrank_ds.methods.base import Method, MethodConfig, MicroBatch, Steps, StepView
from dynrank_ds.ranking.plan import RankPlan, RankState
from dynrank_ds.ranking.schedule import Schedule, resolve_steps

_NO_GRADIENT = 1e-10
"""At or below this norm of the gradient of w nothing is projected (the authors' guard): at step 1 B = 0, w has no
gradient and all weights tie."""

_SHARE_THAT_STAYS = 100 / 224


class WeightsConfig(MethodConfig):
    """Fields of both methods."""

    k: int | None = Field(default=None, ge=1)
    """Number of modules that keep their adapter; by default 45 % of them, as in the paper 100 of LLaMA-3-8B's 224."""
    disconnect_at: Steps = 0.3
    """The paper's T: after this step the other adapters leave and w is fixed; at most one epoch in the paper."""
    weight_lr: float = Field(default=5.0, gt=0)
    """Learning rate of w, the trained weight of each module's adapter, under the recipe's schedule (5 in the authors'
    scripts, not in the paper)."""
    selection: Literal["weights", "random"] = "weights"
    """`random` is the ablation: w stays 1, and K adapters drawn by `seed` stay."""
    seed: int = Field(default=0, ge=0)
    """Of the random selection."""

    def adjustments(self, total_steps: int) -> Schedule:
        last, first = resolve_steps(self.disconnect_at, total_steps, "method.disconnect_at"), 1
        first += self.selection == "weights"  # w has its first gradient at step 2
        if not first <= last < total_steps:
            raise RecipeError(
                f"method.disconnect_at is step {last}: give {first} to {total_steps - 1} "
                f"(w has its first gradient at step 2, and training has {total_steps} steps)"
            )
        return Schedule(total_steps, end=last, steps=(last,))


class WeightLoRAConfig(WeightsConfig):
    """Recipe section `method: {name: weightlora, ...}`."""

    name: Literal["weightlora"] = "weightlora"


class WeightLoRAPlusConfig(WeightsConfig):
    """Recipe section `method: {name: weightlora_plus, ...}`."""

    name: Literal["weightlora_plus"] = "weightlora_plus"
    extension: Literal["qr", "plain"] = "qr"
    """How the survivors' new triples begin: `qr` (the authors' "smart") makes all rows of A orthonormal or orthogonal
    to the old ones, `plain` ("dummy") appends random rows. Neither changes the function."""


def project(weights: Tensor, k: int) -> Tensor:
    """Return the nearest vector to max(w, 0) with at most k entries that are not 0; ties go to the lower index."""
    positive = weights.clamp_min(0)
    chosen = torch.argsort(positive, descending=True, stable=True)[:k]
    return torch.zeros_like(weights).index_copy(0, chosen, positive[chosen])


class WeightLoRA(Method):
    """WeightLoRA: StoIHT on w for the first T steps."""

    config_class: ClassVar[type[MethodConfig]] = WeightLoRAConfig
    init = staticmethod(lora_factors)
    factors = ("lora_A", "lora_B")
    least_rank = 1
    refused_variants: ClassVar[Mapping[str, str]] = {
        "pissa": "the weight w of a module scales its triples, and with them the principal part of the base's weight: "
        "give adapter.init default"
    }

    def __init__(
        self,
        config: WeightsConfig,
        modules: Mapping[str, AdaptedModule],
        total_steps: int,
        device: torch.device,
    ) -> None:
        super().__init__(config, modules, total_steps, device)
        self.k = config.k or max(1, round(_SHARE_THAT_STAYS * len(modules)))
        self.weight_lr, self.seed = config.weight_lr, config.seed
        self.last = self.schedule.end
        self.learned = config.selection == "weights"
        if self.k >= len(modules):
            raise RecipeError(
                f"method.k is {self.k}, and the model has {len(modules)} adapted linears: none would be dropped"
            )
        self.w = torch.ones(len(modules), dtype=self.dtype, device=device)
        # fp64: the sum then hardly depends on how the batch is split over processes.
        self._gradient = torch.zeros(len(modules), dtype=torch.float64, device=device)
        if self.learned:
            self.replicated_state["w"] = self.w
            for module, gate in zip(modules.values(), self.w.split(1), strict=True):
                module.gate = gate

    def on_backward(self, module: int, backward: ModuleBackward, micro_batch: MicroBatch) -> None:
        if self.learned and micro_batch.step <= self.last:
            assert backward.grad_gate is not None
            self._gradient[module] += backward.grad_gate.double().sum()

    def observe(self, view: StepView) -> None:
        if not self.learned or view.step > self.last:
            return
        # Gradients are means over processes; the last entry counts them.
        summed = view.all_reduce_sum(torch.cat([self._gradient, self._gradient.new_ones(1)]))
        self._gradient.zero_()
        gradient = (summed[:-1] / summed[-1]).to(self.dtype)
        self.w.sub_(gradient, alpha=self.weight_lr * view.rate_factor)
        # Chosen by torch.where, so that nothing waits for the device.
        moved = torch.linalg.vector_norm(gradient) > _NO_GRADIENT
        self.w.copy_(torch.where(moved, project(self.w, self.k), self.w))

    def discard_step(self) -> None:
        self._gradient.zero_()

    def scores(self, view: StepView) -> Sequence[Tensor]:
        """Return per module its weight, or a random number, repeated over its triples."""
        scores = self.w.double()
        if not self.learned:
            generator = torch.Generator().manual_seed(self.seed)
            scores = torch.rand(len(scores), generator=generator, dtype=torch.float64).to(scores.device)
        return view.layout.by_module(scores[view.layout.module_of_triple])

    def plan(self, scores: Sequence[Tensor], state: RankState) -> RankPlan:
        chosen = self._chosen(scores)
        keep = tuple(tuple(range(rank)) if b in chosen else () for b, rank in enumerate(state.ranks))
        return RankPlan(keep, (0,) * len(keep))

    def _chosen(self, scores: Sequence[Tensor]) -> set[int]:
        """Return the k modules of largest weight above 0; ties go to the lower index."""
        positive = [b for b, module in enumerate(scores) if float(module[0]) > 0]
        if not positive:
            raise RecipeError(
                f"no adapter has a weight above 0 at step {self.last}, so that none would stay: "
                f"lower method.weight_lr, now {self.weight_lr}"
            )
        return set(sorted(positive, key=lambda b: (-float(scores[b][0]), b))[: self.k])

    def gates(self) -> list[Tensor | None]:
        return list(self.w.split(1)) if self.learned else super().gates()


class WeightLoRAPlus(WeightLoRA):
    """WeightLoRA+: the memory of the dropped adapters goes to the survivors' ranks, once, at T.

    The paper's form; the authors' code doubles ranks and halves K every 10 steps instead.
    """

    config_class = WeightLoRAPlusConfig

    def __init__(
        self,
        config: WeightLoRAPlusConfig,
        modules: Mapping[str, AdaptedModule],
        total_steps: int,
        device: torch.device,
    ) -> None:
        super().__init__(config, modules, total_steps, device)
        self.extension = config.extension

    def plan(self, scores: Sequence[Tensor], state: RankState) -> RankPlan:
        chosen = self._chosen(scores)
        targets = self._grown(chosen, state)
        keep = super().plan(scores, state).keep
        if self.extension == "qr":
            # Every row of a growing module is written anew, and its optimizer state begins anew with it.
            keep = tuple(
                () if target > rank else k for k, target, rank in zip(keep, targets, state.ranks, strict=True)
            )
        return RankPlan(keep, tuple(t - len(k) for k, t in zip(keep, targets, strict=True)))

    def _grown(self, chosen: set[int], state: RankState) -> list[int]:
        """Return the ranks after T: the largest common rank with which the chosen modules hold no more than all held.

        Without limits that is floor(sum_all r (in + out) / sum_chosen (in + out)); a module whose maximum is below it
        takes its maximum.
        """
        costs = [shape.in_features + shape.out_features for shape in self.shapes]
        budget = sum(rank * cost for rank, cost in zip(state.ranks, costs, strict=True))

        def at(rank: int) -> list[int]:
            return [min(rank, m) if b in chosen else 0 for b, m in enumerate(state.max_ranks)]

        def fits(ranks: list[int]) -> bool:
            return sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)) <= budget

        highest = max(state.max_ranks[b] for b in chosen)
        return at(max(rank for rank in range(1, highest + 1) if fits(at(rank))))

    def new_rows(
        self, module: int, old: Mapping[str, Tensor], plan: RankPlan, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return rows: `qr` makes A^T = Q R [Q, (I - Q Q^T) V] and B [R B; 0]; `plain` appends V^T and zeros.

        A is the input side here, as in the authors' code (the paper's A is the output side). V ~ N(0, 1 / in), so
        that its columns are about as long as those of Q (ours: U[0, 1) in the code, no variance in the paper).
        """
        a, b = old["lora_A"].double(), old["lora_B"].double()
        extra, n_in = plan.ranks[module] - len(a), a.shape[1]
        v = (
            torch.randn(extra, n_in, generator=generator, dtype=torch.float64)
            .div_(math.sqrt(n_in))
            .to(a.device)
        )
        zeros = b.new_zeros(extra, b.shape[1])
        if self.extension == "plain":
            return {"lora_A": v.float(), "lora_B": zeros.float()}
        q, r = torch.linalg.qr(a.T)
        v -= v @ q @ q.T
        return {"lora_A": torch.cat([q.T, v]).float(), "lora_B": torch.cat([r @ b, zeros]).float()}
