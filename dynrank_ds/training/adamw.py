"""AdamW whose bias correction knows the age of every row, and whose learning rate may differ by row.

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

    Works on flat fp32 tensors. Ages and rates are kept as runs of equal values, not per element.
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

    def set_state(self, param: Tensor, step: int, births: Tensor, rates: Tensor, lengths: Tensor) -> None:
        """Give `param` zero moments and `step` updates so far.

        births, rates, lengths: (runs,), for each run of its elements the step they were born after (0 for what
        exists from the start), what their learning rate is multiplied by, and how many they are.
        """
        runs, place = torch.unique_consecutive(
            torch.stack([births.double(), rates.double()]), return_inverse=True, dim=1
        )
        held = self.state[param]  # moments that are there already are used again: they may be large
        self.state[param] = {
            "step": step,
            "exp_avg": held["exp_avg"].zero_() if held else torch.zeros_like(param),
            "exp_avg_sq": held["exp_avg_sq"].zero_() if held else torch.zeros_like(param),
            "births": runs[0],
            "rates": runs[1],
            "run_lengths": lengths.new_zeros(runs.shape[1]).index_add_(0, place, lengths).long(),
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if self.discard:
            return
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    if param not in self.state:
                        one = torch.ones(1, dtype=torch.int64, device=param.device)
                        self.set_state(param, 0, 0 * one, one, param.numel() * one)
                    _update(param, param.grad, self.state[param], group)


def _update(param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    state["step"] += 1
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
    rates = group["lr"] * state["rates"]
    ages = state["step"] - state["births"]

    def each(per_run: Tensor) -> Tensor:
        return _per_element(per_run.to(param.dtype), state["run_lengths"], param)

    if group["weight_decay"]:
        param.mul_(each(1 - rates * group["weight_decay"]))
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(each((1 - beta2**ages).sqrt())).add_(group["eps"])
    param.sub_((exp_avg / denominator).mul_(each(rates / (1 - beta1**ages))))


def _per_element(per_run: Tensor, lengths: Tensor, like: Tensor) -> Tensor:
    """Broadcast where there is but one run, so that equal ages cost nothing per element."""
    if len(per_run) == 1:
        return per_run
    return torch.repeat_interleave(per_run, lengths, output_size=like.numel()).view_as(like)
