"""A frozen linear with r trainable triples beside it.

A triple i is row i of three factors: lora_A (r, in), lora_E (r) and lora_B (r, out), so that

    y = W x + s * B^T diag(e) A x

Storing B by rows makes every factor a stack of rows, one a triple: pruning, growing, sharding and
scoring never ask which factor they hold. Where a method has no trainable e (LoRA), lora_E is absent
and e = 1. At rank 0 the linear owns no adapter parameter at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FACTORS = ("lora_A", "lora_E", "lora_B")


class BackwardWork(Protocol):
    """What a method does inside backward, where the factors are gathered and the input is at hand."""

    def observe_input(self, x: Tensor) -> None:
        """Sees the linear's input (..., in) once per micro-batch."""
        ...

    def penalty_gradient(self, factor: Tensor) -> Tensor | None:
        """Gradient (r, n) of the penalty by lora_A or lora_B, to be added to the task's."""
        ...


class TripleUpdate(torch.autograd.Function):
    """s * B^T diag(e) A x, with the method's work done in backward.

    Backward runs once per micro-batch, also under activation checkpointing (whose recomputed forward
    stops early), never in evaluation, and under ZeRO-3 the factors are gathered there. Only factors
    that are leaves are saved, so a partitioned factor is not kept alive between forward and backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_a: Tensor,
        lora_e: Tensor | None,
        lora_b: Tensor,
        scale: float,
        work: BackwardWork | None,
    ) -> Tensor:
        hidden = F.linear(x, lora_a)
        ctx.save_for_backward(x, hidden, lora_a, lora_e, lora_b)
        ctx.scale, ctx.work = scale, work
        gated = hidden * scale if lora_e is None else hidden * (lora_e * scale)
        return gated @ lora_b

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, lora_a, lora_e, lora_b = ctx.saved_tensors
        grad_y = grad_outputs[0].flatten(0, -2)
        flat_x, flat_hidden = x.flatten(0, -2), hidden.flatten(0, -2)
        gate = ctx.scale if lora_e is None else lora_e * ctx.scale
        through_b = grad_y @ lora_b.T
        grad_hidden = through_b * gate
        grad_a = grad_hidden.T @ flat_x
        grad_b = (flat_hidden * gate).T @ grad_y
        grad_e = None
        if lora_e is not None:
            grad_e = (through_b.float() * flat_hidden.float()).sum(0).mul_(ctx.scale).to(lora_e.dtype)
        if ctx.work is not None:
            ctx.work.observe_input(x)
            grad_a = _added(grad_a, ctx.work.penalty_gradient(lora_a))
            grad_b = _added(grad_b, ctx.work.penalty_gradient(lora_b))
        grad_x = (grad_hidden @ lora_a).view_as(x) if ctx.needs_input_grad[0] else None
        return grad_x, grad_a, grad_e, grad_b, None, None


def _added(gradient: Tensor, extra: Tensor | None) -> Tensor:
    return gradient if extra is None else gradient.add_(extra.to(gradient.dtype))


class AdaptedLinear(nn.Module):
    """A frozen `nn.Linear` (out, in) and its triples.

    `scale` (s) is fixed for the whole run, so that a rank change never rescales what was learned.
    """

    lora_A: nn.Parameter | None  # noqa: N815
    lora_E: nn.Parameter | None  # noqa: N815
    lora_B: nn.Parameter | None  # noqa: N815

    def __init__(self, base: nn.Linear, scale: float) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.in_features, self.out_features = base.in_features, base.out_features
        self.work: BackwardWork | None = None
        for factor in FACTORS:
            self.register_parameter(factor, None)

    def set_factors(self, factors: Mapping[str, Tensor]) -> None:
        """Own exactly these factors, {"lora_A": (r, in), "lora_B": (r, out)[, "lora_E": (r,)]}; {} is rank 0."""
        for factor in FACTORS:
            value = factors.get(factor)
            setattr(self, factor, None if value is None else nn.Parameter(value))

    def factors(self) -> dict[str, nn.Parameter]:
        """The factors that exist, in the order of FACTORS."""
        return {name: self._parameters[name] for name in FACTORS if self._parameters[name] is not None}  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.lora_A is None or self.lora_B is None:
            return y
        return y + TripleUpdate.apply(x, self.lora_A, self.lora_E, self.lora_B, self.scale, self.work)


FactorInit = Callable[[int, int, int, torch.Generator], dict[str, Tensor]]
"""(rank, in_features, out_features, generator) -> fp32 factors of that many triples."""
