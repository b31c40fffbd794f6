"""PiSSA: triples that begin as the principal part of the weight, beside a base that stays as it is.

PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models (Meng et al., 2024),
https://arxiv.org/abs/2404.02948. There the principal part is taken out of W, and W is written anew, rounded to its
dtype or quantised again. Here W is not touched: the initial triples stay beside the trained ones, frozen, and what
they compute is subtracted,

    y = W x + s (B^T diag(e) A - B0^T diag(e0) A0) x,

so that the function at the start is the base's in every dtype and on a quantised base. A triple that is pruned takes
its initial triple with it: the function loses what training changed, and nothing of W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynrank_ds.adapters.dropout import InputFactors
from dynrank_ds.adapters.linear import AdaptedLinear

FrozenParameter = Callable[[Tensor], nn.Parameter]
"""Makes a frozen parameter of a whole tensor, partitioned or not."""


def frozen_parameter(whole: Tensor) -> nn.Parameter:
    """Return a frozen parameter that is not partitioned."""
    return nn.Parameter(whole, requires_grad=False)


class FrozenTriples(torch.autograd.Function):
    """s * B0^T diag(e0) A0 x, by the operations of TripleUpdate in their order: equal factors give equal bits.

    Of the forward nothing is kept but the factors, which are leaves: a partitioned one is gathered again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        initial_a: Tensor,
        gate: Tensor | None,
        initial_b: Tensor,
        scale: float,
        dropout: InputFactors | None,
    ) -> Tensor:
        used = x if dropout is None else x * dropout(x.flatten(0, -2)).view_as(x)
        hidden = F.linear(used.to(initial_a.dtype), initial_a)
        # x, for its dropout is drawn once more in backward.
        ctx.save_for_backward(initial_a, gate, initial_b, None if dropout is None else x)
        ctx.scale, ctx.dropout, ctx.x_dtype = scale, dropout, x.dtype
        gated = hidden * scale if gate is None else hidden * (gate * scale).to(hidden.dtype)
        return gated @ initial_b

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        initial_a, gate, initial_b, x = ctx.saved_tensors
        grad_y = grad_outputs[0]
        scaled_gate = ctx.scale if gate is None else (gate * ctx.scale).to(grad_y.dtype)
        grad_x = ((grad_y @ initial_b.T) * scaled_gate) @ initial_a
        if x is not None:
            grad_x *= ctx.dropout(x.flatten(0, -2)).view_as(x)
        return grad_x.to(ctx.x_dtype), None, None, None, None, None


class PissaLinear(AdaptedLinear):
    """An adapted linear from whose output that of its frozen initial triples is subtracted.

    Initial triples have numbers, their rows in the run's stored initial values; `initial_of` says for each trained
    triple which of them is subtracted beside it: none for one that was added later, or that was masked.
    """

    initial_A: nn.Parameter | None  # noqa: N815
    initial_B: nn.Parameter | None  # noqa: N815
    initial_E: Tensor | None  # noqa: N815

    def __init__(self, base: nn.Linear, scale: float, dtype: torch.dtype | None = None) -> None:
        super().__init__(base, scale, dtype)
        self.initial_of: list[int | None] = []
        self.held: list[int] = []
        """The numbers of the initial triples whose rows are here, in their order."""
        self.register_parameter("initial_A", None)
        self.register_parameter("initial_B", None)
        # A buffer, whole on every process: r numbers, which a mask sets to 0.
        self.register_buffer("initial_E", None, persistent=False)

    def set_initial(
        self,
        factors: Mapping[str, Tensor],
        initial_of: Sequence[int | None],
        make: FrozenParameter = frozen_parameter,
    ) -> None:
        """Subtract exactly these initial triples.

        factors: {"lora_A": (n, in), "lora_B": (n, out)[, "lora_E": (n,)]} of those that `initial_of` names, in
        ascending order of their numbers; {} where it names none.
        """
        self.initial_of = list(initial_of)
        self.held = [number for number in initial_of if number is not None]
        if not self.held:
            self.initial_A = self.initial_B = self.initial_E = None
            return
        # Copies: the trained triples may begin in the same memory.
        own = {f: value.detach().to(self.dtype, copy=True) for f, value in factors.items()}
        self.initial_A, self.initial_B = make(own["lora_A"]), make(own["lora_B"])
        self.initial_E = own.get("lora_E")

    def rows_after(self, keep: Sequence[int], new: int) -> tuple[list[int | None], list[int]]:
        """Return what `initial_of` is once triples `keep` stay and `new` follow them, and which rows here stay."""
        initial_of = [self.initial_of[triple] for triple in keep] + [None] * new
        return initial_of, [self.held.index(number) for number in initial_of if number is not None]

    def mask_initial(self, triples: Sequence[int]) -> None:
        """Subtract nothing more beside these triples, whose lora_E is set to 0: what they began as is W's again."""
        for triple in triples:
            number = self.initial_of[triple]
            if number is not None:
                assert self.initial_E is not None
                self.initial_E[self.held.index(number)] = 0
                self.initial_of[triple] = None

    def update(self, x: Tensor) -> Tensor | None:
        """Return s (B^T diag(e) A - B0^T diag(e0) A0) x for x (..., in); None at rank 0."""
        update = super().update(x)
        if update is None or self.initial_A is None:
            return update
        dropout = self.dropout if self.training else None
        initial: Tensor = FrozenTriples.apply(
            x, self.initial_A, self.initial_E, self.initial_B, self.scale, dropout
        )
        # First these two: at the start they are the same bits, and the base's output is not changed by rounding.
        return update - initial
