"""Gradients of the penalties alone, from shards, beside those of autograd on whole weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad
from torch import Tensor

from dynrank_ds.training.loop import StepResult, Trainer
from dynrank_ds.training.loss import SummedLoss
from dynrank_ds.zero import processes
from tests.support.watching import adapter_parameters, main, train_watched, whole_of, write


def orthogonality(f: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(f @ f.T - torch.eye(len(f), dtype=f.dtype))


def variance(f: Tensor) -> Tensor:
    return f.var(dim=1).sum()


COEFFICIENT = 0.3
# 14 linears of rank 4: AdaLoRA's mean over both factors of all linears, and DEM's over all rows.
PENALTIES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "pe_dyra": (orthogonality, COEFFICIENT / (2 * 14)),
    "dynamic_dora": (variance, COEFFICIENT / (2 * 4 * 14)),
}


class Penalised(Trainer):
    """Compares the first step's gradients, which are the penalty's alone."""

    def _reduce(self, loss: Tensor, gradients: Tensor) -> StepResult:
        penalty, coefficient = PENALTIES[self.recipe.method.name]
        errors: list[float] = []
        squares: dict[str, float] = {}
        value = 0.0
        for (_, factor), parameter in adapter_parameters(self).items():
            actual = whole_of(parameter, safe_get_local_grad).double()
            whole = whole_of(parameter, safe_get_local_fp32_param).double().requires_grad_()
            if factor == "lora_E":
                expected = torch.zeros_like(whole)
            else:
                (expected,) = torch.autograd.grad(coefficient * penalty(whole), whole)
            squares[factor] = squares.get(factor, 0.0) + float(actual.square().sum())
            if factor != "lora_E":
                value += coefficient * float(penalty(whole.detach()))
            errors.append(float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)))
        write(self.directory.path, "errors", errors)
        self.stop_request.ask()  # one step is all that is asked
        result = super()._reduce(loss, gradients)
        norms = {factor: square**0.5 for factor, square in squares.items()}
        write(self.directory.path, "penalty", [value, norms, result.penalty, dict(result.gradient_norms)])
        return result


def penalties(folder: Path) -> None:
    forward = SummedLoss.forward

    def nothing_to_learn(self: SummedLoss, **batch: Any) -> Tensor:
        return 0 * forward(self, **batch)

    with patch.object(SummedLoss, "forward", nothing_to_learn):
        for method in PENALTIES:
            for checkpointing in ("true", "false"):
                run = folder / f"{method}-{processes.world_size()}-{checkpointing}"
                overrides = [f"train.activation_checkpointing={checkpointing}", f"output.dir={run}"]
                train_watched(folder / f"{method}.yaml", Penalised, *overrides)


if __name__ == "__main__":
    main([penalties])
