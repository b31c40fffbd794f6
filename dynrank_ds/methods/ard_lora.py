"""ARD-LoRA: every attention head of every linear has a rank of its own, r0 times a learned factor alpha.

ARD-LoRA: Dynamic Rank Allocation for Parameter-Efficient Fine-Tuning of Foundation Models with Heterogeneous
Adaptation Needs (Shinwari and Usama, 2025), https://arxiv.org/abs/2506.18267.

Of the paper only the abstract and second-hand summaries are public to us. From them: r_lh(t) =
max(1, round(r0 alpha_lh(t))), the loss L_task + lambda R(alpha) with R an l1 term and beta times a total variation, one
learning rate for the adapters and one for alpha. All else is ours and said at each place: how a rank of whole numbers
gets a gradient, what the variation is taken against, when ranks are committed, and what happens to their triples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dynrank_ds.adapters.initial import lora_factors
from dynrank_ds.adapters.linear import AdaptedModule, ModuleBackward
from dynrank_ds.errors import RecipeError
from dynrank_ds.methods.base import Method, MethodConfig, MicroBatch, Steps, StepView
from dynrank_ds.ranking.layout import ShardLayout
from dynrank_ds.ranking.plan import RankPlan, RankState
from dynrank_ds.ranking.schedule import Schedule


class ARDLoRAConfig(MethodConfig):
    """Recipe section `method: {name: ard_lora, ...}`; adapter.rank is r0, of one head. Defaults are ours."""

    name: Literal["ard_lora"] = "ard_lora"
    t_i: Steps = 0.1
    """Initial steps in which alpha stands still, so that B leaves 0. The first commit, at step t_i, adds the spare
    slots."""
    interval: Steps = 0.05
    """Steps between commits of whole ranks."""
    t_f: Steps = 0.3
    """Final steps with whole ranks: alpha is frozen, gates are 1."""
    alpha_lr: float = Field(default=1e-2, gt=0)
    """Peak learning rate of alpha, under the recipe's schedule: the paper's eta_alpha. alpha is what is learned of a
    module's rank, which is round(alpha r0), at least 1, with r0 = adapter.rank."""
    alpha_max: float = Field(default=2.0, gt=1)
    """Largest alpha: a rank stays at or below ceil(alpha_max r0)."""
    sparsity: float = Field(default=1e-2, ge=0)
    """Weight of the penalty on alpha, which pulls ranks down: the paper's lambda."""
    variation: float = Field(default=0.1, ge=0)
    """Weight, inside that penalty, of what alpha moves against its reference, which keeps ranks steady: the paper's
    beta."""
    reference: Literal["commit", "previous"] = "commit"
    """What alpha's variation is taken against: its value at the last commit, which holds ranks where they are, or
    that of the step before, which only damps its moves."""
    alpha_per: Literal["module", "head"] = "module"
    """One alpha per module, that is per linear and head; or one for the q, k, v and o modules of a key/value head, the
    paper's alpha_lh, which has no index for the linear."""

    def adjustments(self, total_steps: int) -> Schedule:
        phase = Schedule.resolve(total_steps, self.t_i, self.interval, self.t_f, t_f_at_least=1)
        regular = range(phase.t_i + phase.interval, phase.end, phase.interval)
        first = [phase.t_i] if phase.t_i else []  # there is no step 0
        return phase.adjusting(regular, [*first, phase.end])


class ARDLoRA(Method):
    """dW = s sum_i m_i b_i a_i with gates m_i = clamp(r0 alpha - (i - 1), 0, 1), i from 1.

    Their sum is the continuous rank r0 alpha.
    """

    config_class = ARDLoRAConfig
    least_rank = 1
    init = staticmethod(lora_factors)
    factors = ("lora_A", "lora_B")
    per_head = True

    def __init__(
        self,
        config: ARDLoRAConfig,
        modules: Mapping[str, AdaptedModule],
        total_steps: int,
        device: torch.device,
    ) -> None:
        super().__init__(config, modules, total_steps, device)
        self.config = config
        self.t_i, self.end = self.schedule.t_i, self.schedule.end
        self.r0 = next(iter(modules.values())).initial_rank
        if unlike := [name for name, module in modules.items() if module.initial_rank != self.r0]:
            raise RecipeError(
                f"ard_lora begins with one rank r0 in every module, but {unlike[0]} would have rank "
                f"{modules[unlike[0]].initial_rank} and {next(iter(modules))} {self.r0}: leave out adapter.ranks, or "
                "start from an adapter of one rank"
            )
        # Rounded first: 1.1 x 10 is a little more than 11 in floating point.
        self.most_slots = math.ceil(round(config.alpha_max * self.r0, 9))
        self.modules = list(modules.values())
        self.alpha_of = alpha_of_modules(modules) if config.alpha_per == "head" else list(range(len(modules)))
        self.alpha = torch.ones(max(self.alpha_of) + 1, dtype=self.dtype, device=device)
        self.reference = self.alpha.clone()
        self.adam = torch.optim.Adam([self.alpha], lr=config.alpha_lr)
        # What Adam would create at its first step, so that a checkpoint always has it.
        self.adam.state[self.alpha] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(self.alpha),
            "exp_avg_sq": torch.zeros_like(self.alpha),
        }
        state = self.adam.state[self.alpha]
        self._hard = torch.zeros(1, dtype=torch.int64)
        self.replicated_state |= {
            "alpha": self.alpha,
            "reference": self.reference,
            "exp_avg": state["exp_avg"],
            "exp_avg_sq": state["exp_avg_sq"],
            "adam_step": state["step"].view(1),
            "hard": self._hard,
        }

    @property
    def hard(self) -> bool:
        """Whether gates are 1: after the last commit."""
        return bool(self._hard)

    # --- gates

    def start(self, layout: ShardLayout) -> None:
        self._lay_out(layout.ranks)

    def _lay_out(self, ranks: Sequence[int]) -> None:
        """Create gates of these ranks, as views of one vector over all triples."""
        counts = torch.tensor(ranks)
        self._alpha_of_triple = torch.repeat_interleave(torch.tensor(self.alpha_of), counts).to(self.device)
        self._slot = torch.cat([torch.arange(rank) for rank in ranks]).to(self.device)
        self._gates = torch.ones(sum(ranks), dtype=self.dtype, device=self.device)
        self._gate_gradients = torch.zeros(sum(ranks), dtype=torch.float64, device=self.device)
        self._gradient_of = self._gate_gradients.split(list(ranks))
        for module, gate in zip(self.modules, self._gates.split(list(ranks)), strict=True):
            module.gate = None if self.hard else gate
        self._refresh()

    def _beyond(self) -> Tensor:
        """Return r0 alpha - (i - 1) of every triple: its gate before clamping."""
        return self.r0 * self.alpha[self._alpha_of_triple] - self._slot

    def _refresh(self) -> None:
        self._gates.copy_(self._beyond().clamp_(0, 1))

    def on_backward(self, module: int, backward: ModuleBackward, micro_batch: MicroBatch) -> None:
        if self.t_i < micro_batch.step <= self.end:
            assert backward.grad_gate is not None
            self._gradient_of[module].add_(backward.grad_gate)

    # --- alpha

    def observe(self, view: StepView) -> None:
        if not self.t_i < view.step <= self.end:
            return
        local = torch.zeros(len(self.alpha) + 1, dtype=torch.float64, device=self.device)
        beyond = self._beyond()
        # The derivative of clamp is 1 at both of its ends, as in autograd.
        moving = self._gate_gradients * ((beyond >= 0) & (beyond <= 1)) * self.r0
        local.index_add_(0, self._alpha_of_triple, moving)
        local[-1] = 1
        self._gate_gradients.zero_()
        # Gradients are means over processes; the last entry counts them.
        summed = view.all_reduce_sum(local)
        before = self.alpha.clone()
        self.alpha.grad = (summed[:-1] / summed[-1] + self.penalty_gradient()).to(self.dtype)
        self.adam.param_groups[0]["lr"] = self.config.alpha_lr * view.rate_factor
        self.adam.step()
        # The least alpha still rounds to rank 0, which counts as 1.
        self.alpha.clamp_(1 / (2 * self.r0), self.config.alpha_max)
        if self.config.reference == "previous":
            self.reference.copy_(before)
        self._refresh()

    def penalty_gradient(self) -> Tensor:
        """Return the gradient of lambda (sum alpha + beta sum huber(alpha - reference)) / n by alpha (n,), fp64.

        Huber with threshold 1, whose curvature of 1 gives the l1-smoothness lambda beta of the paper's Theorem III.1.
        """
        away = self.alpha.double() - self.reference.double()
        weight = self.config.sparsity / len(self.alpha)
        return weight * (1 + self.config.variation * away.clamp(-1, 1))

    def discard_step(self) -> None:
        self._gate_gradients.zero_()

    # --- ranks

    def scores(self, view: StepView) -> Sequence[Tensor]:
        """Return per module the continuous rank r0 alpha, repeated over its triples."""
        return view.layout.by_module(self.r0 * self.alpha.double()[self._alpha_of_triple])

    def plan(self, scores: Sequence[Tensor], state: RankState) -> RankPlan:
        """Set r = max(1, round(r0 alpha)), half to even, plus one triple to grow into until the last commit.

        A commit before the last changes no function: r + 1 slots hold every gate above 0.
        """
        spare = 0 if state.step == self.end else 1
        keep, new = [], []
        for module_scores, rank, max_rank in zip(scores, state.ranks, state.max_ranks, strict=True):
            slots = min(max(1, round(float(module_scores[0]))) + spare, self.most_slots, max_rank)
            keep.append(tuple(range(min(rank, slots))))
            new.append(max(0, slots - rank))
        return RankPlan(tuple(keep), tuple(new))

    def applied(self, plan: RankPlan, step: int) -> None:
        if self.config.reference == "commit":
            self.reference.copy_(self.alpha)
        self._hard.fill_(step == self.end)
        self._lay_out(plan.ranks)

    def gates(self) -> list[Tensor | None]:
        return [module.gate for module in self.modules]

    # --- checkpoints

    def restored(self) -> None:
        self._lay_out([len(gradient) for gradient in self._gradient_of])


def alpha_of_modules(modules: Mapping[str, AdaptedModule]) -> list[int]:
    """Return per module the index of its alpha; heads of one attention with the same key/value head share one.

    Under grouped-query attention that is the key/value head itself and all query heads of its group. A module
    that is no head has its own.
    """
    heads: dict[str, tuple[str, int, int]] = {}
    fewest: dict[str, int] = {}
    for name, module in modules.items():
        if module.part is not None:
            attention = module.part.linear.rpartition(".")[0]
            count = module.part.of // (module.part.stop - module.part.start)
            heads[name] = (attention, module.part.start * count // module.part.of, count)
            fewest[attention] = min(count, fewest.get(attention, count))

    def key(name: str) -> tuple[str, int]:
        if name not in heads:
            return name, 0
        attention, head, count = heads[name]
        return attention, head * fewest[attention] // count

    keys = [key(name) for name in modules]
    number = {k: i for i, k in enumerate(dict.fromkeys(keys))}
    return [number[k] for k in keys]
