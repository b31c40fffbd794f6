"""PE-DyRA's scores from whole tensors, beside those that the run computes from shards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad
from torch import Tensor, nn

from dynrank_ds.methods.base import MicroBatch
from dynrank_ds.ranking.plan import RankPlan
from dynrank_ds.training.loop import StepResult, Trainer
from dynrank_ds.zero import processes
from tests.support.watching import adapter_parameters, main, train_watched, whole_of, write

BETA = 0.85
Key = tuple[str, str]


class Scored(Trainer):
    """Follows sensitivity, uncertainty and input energy of whole matrices, in fp64."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.mean: dict[Key, Tensor] = {}
        self.spread: dict[Key, Tensor] = {}
        self.energy: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.tokens = torch.zeros(1, dtype=torch.float64)
        self.errors: list[float] = []
        self.plans: list[str] = []
        for shape, module in zip(self.engine.shapes, self.engine.modules, strict=True):
            self.energy[shape.name] = torch.zeros(shape.in_features, dtype=torch.float64)
            self.squares[shape.name] = torch.zeros(shape.in_features, dtype=torch.float64)
            module.register_forward_pre_hook(partial(self._see, shape.name))
        begin = self.method.begin_micro_batch

        def noted(micro_batch: MicroBatch) -> None:
            self.token_mask = micro_batch.token_mask
            begin(micro_batch)

        self.method.begin_micro_batch = noted  # type: ignore[method-assign]

    def _see(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        mask = self.token_mask.double()
        self.squares[name] += (inputs[0].detach().double() ** 2 * mask[..., None]).sum((0, 1))
        if name == self.engine.shapes[0].name:
            self.tokens += mask.sum()

    def _reduce(self, loss: Tensor, gradients: Tensor) -> StepResult:
        parameters = adapter_parameters(self)
        weights = {k: whole_of(p, safe_get_local_fp32_param).double() for k, p in parameters.items()}
        grads = {k: whole_of(p, safe_get_local_grad).double() for k, p in parameters.items()}
        for key, weight in weights.items():
            importance = (weight * grads[key]).abs()
            mean = self.mean.get(key, torch.zeros_like(weight))
            spread = self.spread.get(key, torch.zeros_like(weight))
            self.mean[key] = BETA * mean + (1 - BETA) * importance
            self.spread[key] = BETA * spread + (1 - BETA) * (importance - self.mean[key]).abs()
        tokens = processes.all_reduce_sum(self.tokens)
        for name, squares in self.squares.items():
            xe = processes.all_reduce_sum(squares) / tokens
            self.energy[name] = BETA * self.energy[name] + (1 - BETA) * xe
            squares.zero_()
        tokens.zero_()
        if self.method.adjusts_at(self.progress.step + 1):
            self.expected = self._scores(weights, grads)
        return super()._reduce(loss, gradients)

    def _scores(self, weights: dict[Key, Tensor], grads: dict[Key, Tensor]) -> list[Tensor]:
        """S_i = (S_grad_i / mean S_grad + S_inp_i / mean S_inp) / 2, means over all triples of all modules.

        S_grad_i = sum over X in (A, E, B) of ||g_X|| / (||g_A|| + ||g_E|| + ||g_B||) * mean_j (Ibar * U)_ij
        S_inp_i = |e_i| * (sum_k |A_ik| xe_k) * ||B_i||
        """
        by_gradient, by_input = [], []
        for name in self.energy:
            keys = [(name, factor) for factor in ("lora_A", "lora_E", "lora_B")]
            norms = torch.stack([grads[key].norm() for key in keys])
            shares = norms / norms.sum()
            rank = len(weights[keys[0]])
            importance = [(self.mean[key] * self.spread[key]).view(rank, -1).mean(1) for key in keys]
            by_gradient.append(sum(share * s for share, s in zip(shares, importance, strict=True)))
            a, e, b = (weights[key] for key in keys)
            by_input.append(e.abs() * (a.abs() @ self.energy[name]) * b.norm(dim=1))
        mean_gradient = torch.cat(by_gradient).mean()
        mean_input = torch.cat(by_input).mean()
        return [
            g / mean_gradient / 2 + i / mean_input / 2 for g, i in zip(by_gradient, by_input, strict=True)
        ]

    def _adjust(self, scores: Sequence[Tensor]) -> None:
        expected, actual = torch.cat(self.expected), torch.cat(list(scores))
        self.errors.append(float(((actual - expected).abs() / expected.clamp_min(1e-30)).max()))
        honest = self.method.plan

        def plan(*arguments: Any) -> RankPlan:
            self.plan = honest(*arguments)
            return self.plan

        with patch.object(self.method, "plan", plan):
            super()._adjust(scores)
        self.plans.append(self.plan.sha256())
        for module, name in enumerate(self.energy):
            keep = list(self.plan.keep[module])
            for factor in ("lora_A", "lora_E", "lora_B"):
                for statistic in (self.mean, self.spread):
                    old = statistic[name, factor]
                    added = old.new_zeros(self.plan.new[module], *old.shape[1:])
                    statistic[name, factor] = torch.cat([old[keep], added])

    def train(self, after_step: Any) -> bool:
        finished = super().train(after_step)
        write(self.directory.path, "scores", {"errors": self.errors, "plans": self.plans})
        return finished


def scores(folder: Path) -> None:
    run = folder / f"scores{processes.world_size()}"
    train_watched(folder / "recipe.yaml", Scored, f"output.dir={run}")


if __name__ == "__main__":
    main([scores])
