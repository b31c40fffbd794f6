"""PE-DyRA and LoRA in plain single-process PyTorch, written from the formulas and sharing nothing with
dynrank_ds.zero, ranking, methods or training.

Every triple is three parameters of its own (a, e, b), so torch.optim.AdamW keeps each triple's age, and a rank
change is only a matter of which parameters are listed. The penalty goes through autograd; scores are
computed from whole tensors. What is shared on purpose: the tokenised samples, their order (a contract of its
own, tested elsewhere) and the initial values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.recipes import EPS

BETA = 0.85


@dataclass
class Triple:
    """One rank-1 component and its statistics, element by element."""

    a: nn.Parameter
    e: nn.Parameter | None
    b: nn.Parameter
    smoothed: dict[str, Tensor] = field(default_factory=dict)
    uncertain: dict[str, Tensor] = field(default_factory=dict)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {k: p for k, p in (("a", self.a), ("e", self.e), ("b", self.b)) if p is not None}

    def observe(self) -> None:
        for key, p in self.parameters().items():
            assert p.grad is not None
            importance = (p.detach() * p.grad).abs()
            mean = self.smoothed.get(key, torch.zeros_like(importance))
            spread = self.uncertain.get(key, torch.zeros_like(importance))
            self.smoothed[key] = BETA * mean + (1 - BETA) * importance
            self.uncertain[key] = BETA * spread + (1 - BETA) * (importance - self.smoothed[key]).abs()

    def score_of(self, key: str) -> float:
        return float((self.smoothed[key].double() * self.uncertain[key].double()).mean())


class PlainLinear(nn.Module):
    """W x + s * sum_i e_i b_i (a_i . x)."""

    def __init__(self, base: nn.Linear, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.triples: list[Triple] = []
        self.token_mask: Tensor | None = None
        self.energy_sum = torch.zeros(base.in_features)
        self.energy = torch.zeros(base.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if self.token_mask is not None:
            self.energy_sum += (x.detach() ** 2 * self.token_mask[..., None]).sum((0, 1))
        y = self.base(x)
        if self.triples:
            a = torch.stack([t.a for t in self.triples])
            b = torch.stack([t.b for t in self.triples])
            hidden = x @ a.T
            if self.triples[0].e is not None:
                hidden = hidden * torch.cat([t.e for t in self.triples if t.e is not None])
            y = y + self.scale * hidden @ b
        return y

    def penalty(self) -> Tensor:
        total = torch.zeros(())
        for rows in ([t.a for t in self.triples], [t.b for t in self.triples]):
            f = torch.stack(rows)
            total = total + torch.linalg.matrix_norm(f @ f.T - torch.eye(len(f)))
        return total


NewTriples = Callable[[str, int, int], list[Triple]]
"""(module name, how many, event) -> fresh triples."""


@dataclass
class Settings:
    """PE-DyRA's numbers as the test's recipe has them; gamma 0 and k 0 make it LoRA."""

    t_i: int = 0
    interval: int = 0
    end: int = 0
    k: int = 0
    gamma: float = 0.0
    b_rate: float = 1.0
    """What b's learning rate is multiplied by (LoRA+)."""


class Reference:
    """Trains on whole global batches, sample by sample."""

    def __init__(
        self,
        model: nn.Module,
        targets: set[str],
        rank: int,
        scale: float,
        new_triples: NewTriples,
        settings: Settings,
    ) -> None:
        model.requires_grad_(False)
        self.model, self.settings, self.new_triples = model, settings, new_triples
        self.linears: dict[str, PlainLinear] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in targets:
                linear = PlainLinear(module, scale)
                linear.triples = new_triples(name, rank, 0)
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, linear)
                self.linears[name] = linear
        self.optimizer = self._optimizer()
        self.plans: list[dict[str, tuple[list[int], int]]] = []

    def _parameters(self) -> list[nn.Parameter]:
        return [
            p for linear in self.linears.values() for t in linear.triples for p in t.parameters().values()
        ]

    def _optimizer(self) -> torch.optim.AdamW:
        """b in a group of its own."""
        triples = [t for linear in self.linears.values() for t in linear.triples]
        others = [p for t in triples for p in (t.a, t.e) if p is not None]
        return torch.optim.AdamW(
            [{"params": others}, {"params": [t.b for t in triples]}], lr=0.0, eps=EPS, weight_decay=0.0
        )

    def step(
        self, step: int, samples: list[tuple[list[int], int]], lr: float, max_norm: float, plan=None
    ) -> float:
        """One optimizer step on (token ids, prompt length) samples.

        plan: {module: (pruned, added)} that takes the place of its own.
        """
        self.optimizer.zero_grad()
        n_targets = sum(len(ids) - prompt for ids, prompt in samples)
        n_tokens = sum(len(ids) for ids, _ in samples)
        loss_value = 0.0
        for ids, prompt in samples:
            tokens = torch.tensor([ids])
            for linear in self.linears.values():
                linear.token_mask = torch.ones_like(tokens, dtype=torch.float32)
            logits = self.model(input_ids=tokens).logits[0, prompt - 1 : -1]
            loss = F.cross_entropy(logits, tokens[0, prompt:], reduction="sum") / n_targets
            loss.backward()
            loss_value += float(loss)
        if self.settings.gamma:
            n = len(self.linears)
            penalty = sum(linear.penalty() for linear in self.linears.values())
            (self.settings.gamma / (2 * n) * penalty).backward()
        if step < self.settings.end:
            for linear in self.linears.values():
                for triple in linear.triples:
                    triple.observe()
                linear.energy = BETA * linear.energy + (1 - BETA) * linear.energy_sum / n_tokens
        for linear in self.linears.values():
            linear.energy_sum = torch.zeros_like(linear.energy_sum)
        s = self.settings
        due = s.k and s.t_i < step < s.end and (step - s.t_i) % s.interval == 0
        own = self._plan() if due else None
        torch.nn.utils.clip_grad_norm_(self._parameters(), max_norm)
        for group, rate in zip(self.optimizer.param_groups, (1.0, s.b_rate), strict=True):
            group["lr"] = lr * rate
        self.optimizer.step()
        if own is not None:
            self.plans.append(own)
            self._apply(plan if plan is not None else own, step)
        return loss_value

    def scores(self) -> dict[str, list[float]]:
        """PE-DyRA section 3: S = (S_grad / mean + S_inp / mean) / 2."""
        gradient: dict[str, list[float]] = {}
        inputs: dict[str, list[float]] = {}
        for name, linear in self.linears.items():
            norms = {
                key: float(
                    torch.stack([t.parameters()[key].grad for t in linear.triples]).double().norm()  # type: ignore[arg-type]
                )
                for key in "aeb"
            }
            total = sum(norms.values())
            share = {key: norms[key] / total if total else 1 / 3 for key in "aeb"}
            gradient[name] = [sum(share[k] * t.score_of(k) for k in "aeb") for t in linear.triples]
            inputs[name] = [
                abs(float(t.e))
                * float((t.a.detach().abs() * linear.energy).double().sum())
                * float(t.b.detach().double().norm())
                for t in linear.triples
            ]
        means = []
        for scores in (gradient, inputs):
            flat = [s for module in scores.values() for s in module]
            means.append(sum(flat) / len(flat))
        return {
            name: [
                0.5 * (g / means[0] if means[0] else 0.0) + 0.5 * (i / means[1] if means[1] else 0.0)
                for g, i in zip(gradient[name], inputs[name], strict=True)
            ]
            for name in self.linears
        }

    def _plan(self) -> dict[str, tuple[list[int], int]]:
        scores = self.scores()
        names = list(scores)
        order = sorted((s, b, i) for b, name in enumerate(names) for i, s in enumerate(scores[name]))
        pruned: dict[str, list[int]] = {name: [] for name in names}
        removed = 0
        for _, b, i in order:
            if removed < self.settings.k and len(scores[names[b]]) - len(pruned[names[b]]) > 1:
                pruned[names[b]].append(i)
                removed += 1
        means = {
            name: sum(left) / len(left)
            for name in names
            if (left := [s for i, s in enumerate(scores[name]) if i not in pruned[name]])
        }
        best = sorted(names, key=lambda name: (-means[name], names.index(name)))[:removed]
        return {name: (sorted(pruned[name]), int(name in best)) for name in names}

    def _apply(self, plan: dict[str, tuple[list[int], int]], step: int) -> None:
        for name, (pruned, added) in plan.items():
            linear = self.linears[name]
            linear.triples = [t for i, t in enumerate(linear.triples) if i not in pruned]
            if added:
                fresh = self.new_triples(name, added, step)
                for triple in fresh:
                    zeros = {k: torch.zeros_like(p) for k, p in triple.parameters().items()}
                    triple.smoothed, triple.uncertain = dict(zeros), {k: z.clone() for k, z in zeros.items()}
                linear.triples += fresh
        alive = self._parameters()
        state = {p: self.optimizer.state[p] for p in alive if p in self.optimizer.state}
        self.optimizer = self._optimizer()
        self.optimizer.state.update(state)

    def ranks(self) -> dict[str, int]:
        return {name: len(linear.triples) for name, linear in self.linears.items()}
