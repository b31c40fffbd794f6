"""A frozen linear with r trainable triples beside it.

A triple i is row i of three factors: lora_A (r, in), lora_E (r) and lora_B (r, out), so that

    y = W x + s * B^T diag(g) A x

The gate g is lora_E where triples have a trainable scale of their own, a small replicated vector where a method
moves gates itself (WeightLoRA's module weight, ARD-LoRA's soft rank), and 1 for LoRA. Storing B by rows makes
every factor a stack of rows, one a triple: pruning, growing, sharding and scoring never ask which factor they
hold. At rank 0 a module owns no adapter parameter at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynrank_ds.adapters.dropout import InputFactors

FACTORS = ("lora_A", "lora_E", "lora_B")
VECTORS = ("magnitude_offset",)
"""What a variant of the layer may train beside its triples."""


@dataclass
class ModuleBackward:
    """What one module's backward of one micro-batch holds; a method reads it and may add to the gradients.

    Factors are whole here under ZeRO-3 too, in the dtype of the forward.
    """

    x: Tensor
    """(n, in), the input before dropout."""
    grad_y: Tensor
    """(n, out), gradient of the loss by the module's output."""
    scale: float
    lora_a: Tensor
    lora_b: Tensor
    gate: Tensor | None
    grad_a: Tensor
    grad_b: Tensor
    grad_gate: Tensor | None
    """(r,) of `wide_dtype`; None where there is no gate."""


BackwardHook = Callable[[ModuleBackward], None]
"""Called once in every backward of a module."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of gates, their gradients and statistics for factors of `dtype`: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


class TripleUpdate(torch.autograd.Function):
    """s * B^T diag(g) A x, computed in the dtype of the factors; backward calls the method's hook.

    Backward runs once per micro-batch, also under activation checkpointing (whose recomputed forward
    stops early), never in evaluation, and under ZeRO-3 the factors are gathered there. Only factors
    that are leaves are saved, so a partitioned factor is not kept alive between forward and backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_a: Tensor,
        gate: Tensor | None,
        lora_b: Tensor,
        scale: float,
        on_backward: BackwardHook | None,
        dropout: InputFactors | None,
    ) -> Tensor:
        used = x if dropout is None else x * dropout(x.flatten(0, -2)).view_as(x)
        hidden = F.linear(used.to(lora_a.dtype), lora_a)
        ctx.save_for_backward(x, hidden, lora_a, gate, lora_b)
        ctx.scale, ctx.on_backward, ctx.dropout = scale, on_backward, dropout
        gated = hidden * scale if gate is None else hidden * (gate * scale).to(hidden.dtype)
        return gated @ lora_b

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, lora_a, gate, lora_b = ctx.saved_tensors
        grad_y = grad_outputs[0].flatten(0, -2)
        flat_x, flat_hidden = x.flatten(0, -2), hidden.flatten(0, -2)
        scaled_gate = ctx.scale if gate is None else (gate * ctx.scale).to(hidden.dtype)
        through_b = grad_y @ lora_b.T
        grad_hidden = through_b * scaled_gate
        # Drawn once more instead of kept: it would be as large as x.
        factors = None if ctx.dropout is None else ctx.dropout(flat_x)
        grad_a = grad_hidden.T @ (flat_x if factors is None else flat_x * factors).to(hidden.dtype)
        grad_b = (flat_hidden * scaled_gate).T @ grad_y
        grad_gate = None
        if gate is not None:
            wide = wide_dtype(hidden.dtype)
            grad_gate = (through_b.to(wide) * flat_hidden.to(wide)).sum(0).mul_(ctx.scale)
        if ctx.on_backward is not None:
            ctx.on_backward(
                ModuleBackward(flat_x, grad_y, ctx.scale, lora_a, lora_b, gate, grad_a, grad_b, grad_gate)
            )
        grad_x = None
        if ctx.needs_input_grad[0]:
            by_used = grad_hidden @ lora_a
            grad_x = (by_used if factors is None else by_used.mul_(factors)).to(x.dtype).view_as(x)
        if grad_gate is not None:
            grad_gate = grad_gate.to(gate.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_a, grad_gate, grad_b, None, None, None


@dataclass(frozen=True)
class Part:
    """What a module is of its linear, where it is not the whole of it."""

    linear: str
    """Full module name."""
    side: Literal["rows", "columns"]
    start: int
    stop: int
    """Output rows or input columns [start, stop)."""
    of: int
    """Rows or columns of the linear."""


class AdaptedModule(nn.Module):
    """The triples of one module, `out_features` x `in_features`, without a base.

    `scale` (s) is fixed for the whole run, so that a rank change never rescales what was learned.
    """

    lora_A: nn.Parameter | None  # noqa: N815
    lora_E: nn.Parameter | None  # noqa: N815
    lora_B: nn.Parameter | None  # noqa: N815

    def __init__(self, in_features: int, out_features: int, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale, self.dtype = in_features, out_features, scale, dtype
        self.part: Part | None = None
        self.initial_rank = 0
        """Its rank when the run began, in a resumed run too; injection sets it."""
        self.max_rank = min(in_features, out_features)
        """The largest rank that it may get."""
        self.gate: Tensor | None = None
        """(r,) or (1,) of `wide_dtype(dtype)`, set by the method in place of a trained lora_E."""
        self.on_backward: BackwardHook | None = None
        """What every backward calls; a method that overrides `Method.on_backward` sets it."""
        self.dropout: InputFactors | None = None
        """Dropout of the input in training; the heads of a linear share it."""
        for factor in FACTORS:
            self.register_parameter(factor, None)

    def set_factors(self, factors: Mapping[str, Tensor]) -> None:
        """Own exactly these factors, {"lora_A": (r, in), "lora_B": (r, out)[, "lora_E": (r,)]}; {} is rank 0."""
        for factor in FACTORS:
            value = factors.get(factor)
            setattr(self, factor, None if value is None else nn.Parameter(value.to(self.dtype)))

    def factors(self) -> dict[str, nn.Parameter]:
        """Return the factors that exist, in the order of FACTORS."""
        return {name: self._parameters[name] for name in FACTORS if self._parameters[name] is not None}  # type: ignore[misc]

    def vectors(self) -> dict[str, nn.Parameter]:
        """Return what is trained beside the triples and has one size at any rank; nothing here."""
        return {}

    def set_vectors(self, vectors: Mapping[str, Tensor]) -> None:
        """Own the vectors among `vectors`, by name; nothing here."""

    def constants(self) -> dict[str, Tensor]:
        """Return what follows from the base and a checkpoint keeps, so that it is exported without the base."""
        return {}

    def update(self, x: Tensor) -> Tensor | None:
        """Return s * B^T diag(g) A x for x (..., in); None at rank 0."""
        if self.lora_A is None or self.lora_B is None:
            return None
        gate = self.lora_E if self.lora_E is not None else self.gate
        dropout = self.dropout if self.training else None
        update: Tensor = TripleUpdate.apply(
            x, self.lora_A, gate, self.lora_B, self.scale, self.on_backward, dropout
        )
        return update


class AdaptedLinear(AdaptedModule):
    """A frozen `nn.Linear` (out, in) that is one module, with factors of `dtype`, by default the base weight's."""

    def __init__(self, base: nn.Linear, scale: float, dtype: torch.dtype | None = None) -> None:
        super().__init__(base.in_features, base.out_features, scale, dtype or base.weight.dtype)
        self.base = base

    def adapted_modules(self, name: str) -> Mapping[str, AdaptedModule]:
        """Return the modules by the full names that they have where this linear is called `name`."""
        return {name: self}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        update = self.update(x)
        return y if update is None else (y + update).to(y.dtype)


FactorInit = Callable[[int, int, int, torch.Generator], dict[str, Tensor]]
"""(rank, in_features, out_features, generator) -> fp32 factors of that many triples."""

Variant = Literal["plain", "pissa", "weight_decomposed"]
"""What a linear that is one module becomes; inject.py has the classes."""
