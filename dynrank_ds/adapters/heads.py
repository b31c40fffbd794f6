"""A frozen linear whose attention heads are modules of their own.

q, k and v compute a head's part of the output, so that a head's module is `head_dim` x in and sees the whole input;
o takes a head's part of the input, so that its module is out x `head_dim` and adds to the whole output. What all heads
of a linear share is multiplied once for all of them: with H separate updates, x and its gradient would be read and
written H times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from dynrank_ds.adapters.dropout import InputFactors
from dynrank_ds.adapters.linear import AdaptedModule, BackwardHook, ModuleBackward, Part, wide_dtype
from dynrank_ds.errors import ModelError


@dataclass(frozen=True)
class HeadSplit:
    """How a kind of linear falls into heads: output rows or input columns, and how many."""

    side: Literal["rows", "columns"]
    heads: int


def head_splits(config: PretrainedConfig) -> dict[str, HeadSplit]:
    """Return the splits of a decoder's attention linears by their last names; others have no heads.

    Under grouped-query attention k and v have fewer heads than q and o.

    Raises:
        ModelError: the configuration names no attention heads.
    """
    queries = getattr(config, "num_attention_heads", None)
    if not queries:
        raise ModelError("the model's config.json has no num_attention_heads, which a method per head needs")
    keys = getattr(config, "num_key_value_heads", None) or queries
    return {
        "q_proj": HeadSplit("rows", queries),
        "k_proj": HeadSplit("rows", keys),
        "v_proj": HeadSplit("rows", keys),
        "o_proj": HeadSplit("columns", queries),
    }


@dataclass(frozen=True)
class _Heads:
    """The heads of one linear that have triples; slices are None on the side that they share."""

    columns: Sequence[slice] | None
    rows: Sequence[slice] | None
    in_features: int
    out_features: int
    scale: float
    dropout: InputFactors | None
    hooks: Sequence[BackwardHook | None]


class HeadUpdate(torch.autograd.Function):
    """What TripleUpdate is for one module, for all heads of a linear at once; x is (n, in).

    One function for both was tried: it made forward and backward of a whole linear 1.4 % (576 x 1536, 256 tokens) to
    11 % (576 x 192, 64 tokens) slower on a CPU.

    `tensors` are the heads' lora_A, then their gates (all None or none), then their lora_B.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: _Heads, *tensors: Any) -> Tensor:
        n = len(heads.hooks)
        lora_a, gates, lora_b = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        used = x if heads.dropout is None else x * heads.dropout(x)
        hidden = _onto(used.to(lora_a[0].dtype), lora_a, heads.columns)
        ctx.save_for_backward(x, hidden, *tensors)
        ctx.heads = heads
        return _back(
            hidden * _scaled(gates, lora_a, heads, hidden.dtype), lora_b, heads.rows, heads.out_features
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        heads: _Heads = ctx.heads
        n = len(heads.hooks)
        x, hidden, *tensors = ctx.saved_tensors
        lora_a, gates, lora_b = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        grad_y = grad_outputs[0]
        scaled = _scaled(gates, lora_a, heads, hidden.dtype)
        through_b = _onto(grad_y, lora_b, heads.rows)
        grad_hidden = through_b * scaled
        ranks = [len(a) for a in lora_a]
        factors = None if heads.dropout is None else heads.dropout(x)
        used = (x if factors is None else x * factors).to(hidden.dtype)
        grad_a = _factor_gradients(grad_hidden, used, heads.columns, ranks)
        grad_b = _factor_gradients(hidden * scaled, grad_y, heads.rows, ranks)
        grad_gates: Sequence[Tensor | None] = [None] * n
        if gates[0] is not None:
            wide = wide_dtype(hidden.dtype)
            grad_gates = (through_b.to(wide) * hidden.to(wide)).sum(0).mul_(heads.scale).split(ranks)
        for i, hook in enumerate(heads.hooks):
            if hook is not None:
                shown_x = x if heads.columns is None else x[:, heads.columns[i]]
                shown_y = grad_y if heads.rows is None else grad_y[:, heads.rows[i]]
                of_head = (lora_a[i], lora_b[i], gates[i], grad_a[i], grad_b[i], grad_gates[i])
                hook(ModuleBackward(shown_x, shown_y, heads.scale, *of_head))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _back(grad_hidden, lora_a, heads.columns, heads.in_features)
            grad_x = (grad_x if factors is None else grad_x.mul_(factors)).to(x.dtype)
        wanted = ctx.needs_input_grad[2 + n : 2 + 2 * n]
        gate_gradients = [
            g.to(gate.dtype) if g is not None and wants else None
            for g, gate, wants in zip(grad_gates, gates, wanted, strict=True)
        ]
        return grad_x, None, *grad_a, *gate_gradients, *grad_b


def _onto(z: Tensor, factors: Sequence[Tensor], slices: Sequence[slice] | None) -> Tensor:
    """Map (n, d) to (n, all heads' triples): z F^T of every head, on its slice of z where it has one."""
    if slices is None:
        return F.linear(z, torch.cat(list(factors)))
    return torch.cat([F.linear(z[:, s], f) for s, f in zip(slices, factors, strict=True)], dim=1)


def _back(hidden: Tensor, factors: Sequence[Tensor], slices: Sequence[slice] | None, width: int) -> Tensor:
    """Map (n, all heads' triples) to (n, width): h F of every head, summed, or each into its slice."""
    if slices is None:
        return hidden @ torch.cat(list(factors))
    out = hidden.new_zeros(hidden.shape[0], width)
    for part, factor, s in zip(hidden.split([len(f) for f in factors], dim=1), factors, slices, strict=True):
        out[:, s] = part @ factor
    return out


def _factor_gradients(
    hidden: Tensor, z: Tensor, slices: Sequence[slice] | None, ranks: list[int]
) -> Sequence[Tensor]:
    """Return per head (r, d): h^T z, on its slice of z where it has one."""
    if slices is None:
        return torch.split(hidden.T @ z, ranks)
    return [part.T @ z[:, s] for part, s in zip(hidden.split(ranks, dim=1), slices, strict=True)]


def _scaled(
    gates: Sequence[Tensor | None], lora_a: Sequence[Tensor], heads: _Heads, dtype: torch.dtype
) -> Tensor | float:
    """Return s * g of all heads' triples; s where there are no gates."""
    present = [gate.expand(len(a)) for gate, a in zip(gates, lora_a, strict=True) if gate is not None]
    assert len(present) in (0, len(gates))
    return (torch.cat(present) * heads.scale).to(dtype) if present else heads.scale


class HeadedLinear(nn.Module):
    """A frozen `nn.Linear` (out, in) with one module a head, with factors of `dtype`, by default the base weight's.

    Raises:
        ModelError: its side is no multiple of the heads.
    """

    def __init__(
        self, base: nn.Linear, split: HeadSplit, scale: float, name: str, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.base, self.side, self.scale = base, split.side, scale
        whole = base.out_features if split.side == "rows" else base.in_features
        if whole % split.heads:
            raise ModelError(f"{name} has {whole} {split.side}, no multiple of its {split.heads} heads")
        size = whole // split.heads
        sides = (base.in_features, size) if split.side == "rows" else (size, base.out_features)
        self.blocks = nn.ModuleList()  # the name that checkpoints and ranks.jsonl have
        for head in range(split.heads):
            module = AdaptedModule(*sides, scale, dtype or base.weight.dtype)
            module.part = Part(name, split.side, head * size, (head + 1) * size, whole)
            self.blocks.append(module)

    def adapted_modules(self, name: str) -> Mapping[str, AdaptedModule]:
        """Return the modules by the full names that they have where this linear is called `name`."""
        return {f"{name}.blocks.{head}": module for head, module in enumerate(self._heads())}

    def _heads(self) -> Iterator[AdaptedModule]:
        for module in self.blocks:
            assert isinstance(module, AdaptedModule)
            yield module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        present = [module for module in self._heads() if module.lora_A is not None]
        if not present:
            return y
        slices = [slice(module.part.start, module.part.stop) for module in present if module.part is not None]
        heads = _Heads(
            columns=slices if self.side == "columns" else None,
            rows=slices if self.side == "rows" else None,
            in_features=self.base.in_features,
            out_features=self.base.out_features,
            scale=self.scale,
            dropout=present[0].dropout if self.training else None,
            hooks=[module.on_backward for module in present],
        )
        tensors = [
            *(module.lora_A for module in present),
            *(module.lora_E if module.lora_E is not None else module.gate for module in present),
            *(module.lora_B for module in present),
        ]
        update: Tensor = HeadUpdate.apply(x.flatten(0, -2), heads, *tensors)
        return (y + update.view_as(y)).to(y.dtype)
