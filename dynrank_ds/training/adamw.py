"""AdamW whose bias correction knows the age of every row.

A new row has zero moments. Under the old rows' step count it would get no bias correction and move by 3 to
6 learning rates at once; here it moves as a fresh AdamW would move it, and its neighbours as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class RowAgedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW (decoupled decay, no amsgrad) with one step count per element.

    Works on flat fp32 tensors. Ages are kept as runs of equal birth, so they cost nothing per element.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.discard = False
        """Whether the next step leaves everything as it is, bit for bit."""

    def set_state(self, param: Tensor, step: int, births: Tensor) -> None:
        """Gives `param` zero moments, `step` updates so far, and for each element the step it was born after.

        births: (param.numel(),) int64; 0 for what exists from the start.
        """
        values, lengths = torch.unique_consecutive(births, return_counts=True)
        self.state[param] = {
            "step": step,
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
            "birth_values": values,
            "birth_lengths": lengths,
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if self.discard:
            return
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    if param not in self.state:
                        self.set_state(
                            param, 0, torch.zeros(param.numel(), dtype=torch.int64, device=param.device)
                        )
                    _update(param, param.grad, self.state[param], group)


def _update(param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    state["step"] += 1
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
    param.mul_(1 - group["lr"] * group["weight_decay"])
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    ages = (state["step"] - state["birth_values"]).double()
    step_size = (group["lr"] / (1 - beta1**ages)).to(param.dtype)
    root2 = (1 - beta2**ages).sqrt().to(param.dtype)
    if len(ages) > 1:
        step_size, root2 = (
            torch.repeat_interleave(per_run, state["birth_lengths"], output_size=param.numel()).view_as(param)
            for per_run in (step_size, root2)
        )
    denominator = exp_avg_sq.sqrt().div_(root2).add_(group["eps"])
    param.sub_((exp_avg / denominator).mul_(step_size))
