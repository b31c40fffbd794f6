"""ElaLoRA: prune the triples of lowest score, add as many to the modules whose lowest triples score highest.

ElaLoRA: Elastic & Learnable Low-Rank Adaptation for Efficient Model Fine-Tuning (Chang et al., 2025),
https://arxiv.org/abs/2504.00254.

The score, the penalty and the smoothing are AdaLoRA's (methods/sensitivity.py). The authors' code differs from their
paper in places and has some slips; what is decided here is said in README.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dynrank_ds.adapters.linear import AdaptedModule
from dynrank_ds.methods.sensitivity import ReallocationConfig, ReallocationMethod, refuse_rank_one
from dynrank_ds.ranking.plan import RankPlan, RankState, kept_triples
from dynrank_ds.ranking.schedule import Schedule


class ElaLoRAConfig(ReallocationConfig):
    """Recipe section `method: {name: elalora, ...}`; the total rank stays len(modules) * adapter.rank."""

    name: Literal["elalora"] = "elalora"
    b: int = Field(default=4, ge=1)
    """Triples pruned and added at an adjustment; the paper's Table 7 has 1 to 8, growing with the rank."""
    k: int = Field(default=2, ge=1)
    """Triples that a module loses or gains at most at an adjustment; 1 to 4 in Table 7."""
    schedule: Literal["cubic", "constant"] = "cubic"
    """b(t), how many triples are reallocated at step t: round(b (1 - p^3)) with p the share of the adjusting phase that
    is over, as the paper recommends; or always b, the default of the authors' code."""

    def adjustments(self, total_steps: int) -> Schedule:
        whole = super().adjustments(total_steps)
        return whole.adjusting(step for step in whole.steps if self.reallocated(step, whole) > 0)

    def reallocated(self, step: int, phase: Schedule) -> int:
        """Return b(t) for an adjustment at `step`. Halves go to the even number, as in the authors' code."""
        if self.schedule == "constant":
            return self.b
        over = (step - phase.t_i) / (phase.end - phase.t_i)
        return round(self.b * (1 - over**3))


class ElaLoRA(ReallocationMethod):
    """ElaLoRA (paper section 3, Algorithm 1)."""

    config_class = ElaLoRAConfig

    def __init__(
        self,
        config: ElaLoRAConfig,
        modules: Mapping[str, AdaptedModule],
        total_steps: int,
        device: torch.device,
    ) -> None:
        self.config = config
        super().__init__(config, modules, total_steps, device)
        refuse_rank_one(config.name, modules)

    def plan(self, scores: Sequence[Tensor], state: RankState) -> RankPlan:
        """Prune b' triples and adds b': the largest b' <= b(t) for which the two sides do not overlap.

        Candidates for pruning are the min(k, r - 1) lowest triples of every module, and the b' lowest of them all
        go. Candidates for expansion are the min(k, r) lowest of every module that do not go, and the module of each
        of the b' highest gets a new triple.
        """
        lowest = sorted(_lowest_of_each(scores, self.config.k, spared=1))
        highest = sorted(_lowest_of_each(scores, self.config.k, spared=0), key=lambda c: (-c[0], *c[1:]))
        for count in range(min(self.config.reallocated(state.step, self.schedule), len(lowest)), -1, -1):
            pruned: list[set[int]] = [set() for _ in scores]
            for _, module, triple in lowest[:count]:
                pruned[module].add(triple)
            keep = kept_triples(scores, pruned)
            new = [0] * len(scores)
            for _, module, triple in highest:
                full = len(keep[module]) + new[module] >= state.max_ranks[module]
                if sum(new) < count and triple not in pruned[module] and not full:
                    new[module] += 1
            if sum(new) == count:
                break
        return RankPlan(keep, tuple(new))

    def new_rows(
        self, module: int, old: Mapping[str, Tensor], plan: RankPlan, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return orthonormal rows of A and B, orthogonal to those of the triples that stay; e = 0."""
        kept, count = list(plan.keep[module]), plan.new[module]
        rows = {f: orthogonal_rows(old[f][kept].cpu(), count, generator) for f in ("lora_A", "lora_B")}
        return {**rows, "lora_E": torch.zeros(count)}


def _lowest_of_each(scores: Sequence[Tensor], k: int, spared: int) -> list[tuple[float, int, int]]:
    """Return (score, module, triple) of the min(k, rank - spared) lowest triples of every module."""
    return [
        (score, b, i)
        for b, module in enumerate(scores)
        for score, i in sorted(zip(module.tolist(), range(len(module)), strict=True))[
            : min(k, len(module) - spared)
        ]
    ]


def orthogonal_rows(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return (count, n) fp32 orthonormal rows orthogonal to the span of `rows` (r, n); r + count <= n.

    Normal vectors less their projection on all rows before them, by QR: `v - A^T A v`, which the authors call
    Gram-Schmidt, projects only where the rows of A are orthonormal already.
    """
    drawn = torch.randn(count, rows.shape[1], generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(torch.cat([rows.double(), drawn]).T)
    # QR leaves signs open; with a positive diagonal, the last columns are what Gram-Schmidt gives.
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)
    added: Tensor = (q * signs)[:, -count:]
    return added.T.float().contiguous()
