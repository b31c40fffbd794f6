"""Cross entropy over a large vocabulary: the model's own logits of a few rows at a time, with their gradient at once.

The logits of all target tokens in fp32, their softmax and its gradient are the largest tensors of a step. Here the
gradient of a chunk's rows is computed as soon as its loss is, in the same forward, and the chunk is forgotten: nothing
of the vocabulary's width outlives it, and the output layer is not needed again in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

LOGITS_AT_ONCE = 2**25
"""Elements of a chunk's logits, 128 MiB in fp32: of 128,256 tokens 261 rows, which keep a GPU busy."""


def rows_at_once(vocabulary: int) -> int:
    """Return how many rows of logits are made at one time."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


class ChunkedCrossEntropy(nn.Module):
    """Cross entropy (fp32) of rows of hidden states summed, fp64, and its gradient by the rows.

    The output layer's parameters are this module's too: ZeRO-3 gathers them once for all chunks, before it is called.
    """

    def __init__(self, head: nn.Module, rows: int) -> None:
        super().__init__()
        self.rows = rows
        for number, parameter in enumerate(head.parameters()):
            self.register_parameter(f"head_{number}", parameter)

    def forward(
        self, hidden: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the summed loss, fp64, and the gradient (n, hidden size), None where none is wanted.

        Args:
            hidden: (n, hidden size), without a gradient of its own.
            targets: (n,), int64.
            logits_of: (m, hidden size) -> (m, vocabulary); it must not call modules that have hooks, whose number
                would change with n.
        """
        gradient = torch.empty_like(hidden) if torch.is_grad_enabled() else None
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(hidden), self.rows):
            chunk = hidden[start : start + self.rows].requires_grad_(gradient is not None)
            wanted = targets[start : start + self.rows]
            # Summed in fp64: in fp32 the sum over a long batch is off by more than 1e-6 of its mean.
            part = F.cross_entropy(logits_of(chunk).float(), wanted, reduction="none").double().sum()
            if gradient is not None:
                (gradient[start : start + self.rows],) = torch.autograd.grad(part, chunk)
            loss += part.detach()
        return loss, gradient


class WithGradient(torch.autograd.Function):
    """A loss whose gradient by `hidden` is known already."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (grad_loss,) = ctx.saved_tensors, grad_outputs
        return (gradient.float() * grad_loss.float()).to(gradient.dtype), None, None


class _Bare(nn.Module):
    """A module without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = module  # no child: its parameters stay where they are

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.__dict__["module"].forward(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)


class _Given(_Bare):
    """A decoder that returns hidden states that are given to it, whatever its input."""

    def __init__(self, decoder: nn.Module, output: Any) -> None:
        super().__init__(decoder)
        self.__dict__["output"] = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.__dict__["output"]


class Head:
    """A model's way from its decoder's hidden states to logits, whatever it does to them or to the logits on it."""

    def __init__(self, model: PreTrainedModel) -> None:
        names = {module: name for name, module in model.named_modules()}
        layer = model.get_output_embeddings()
        assert layer is not None
        self._model, self.layer = model, layer
        self._layer_name, self._decoder_name = names[layer], names[model.get_decoder()]

    def decode(self, positions: Tensor, inputs: Mapping[str, Tensor]) -> Any:
        """Return the decoder's output in the model's forward, its hidden states those at `positions`, (1, n, size)."""
        found = []

        def choose(_: nn.Module, __: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[positions][None]
            found.append(output)
            return output

        decoder = self._model.get_decoder()
        # After ZeRO's hooks, so that backward passes through them.
        with decoder.register_forward_hook(choose), self._replaced({self._layer_name: nn.Identity()}):
            self._model(**inputs)
        return found[0]

    @contextmanager
    def logits(self, output: Any, inputs: Mapping[str, Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
        """Give the function from hidden states (m, size) to logits (m, vocabulary); no hook is called meanwhile."""
        parents = self._decoder_name.split(".")[:-1]
        between = [".".join(parents[: depth + 1]) for depth in range(len(parents))]
        bare = {name: _Bare(self._model.get_submodule(name)) for name in [*between, self._layer_name]}

        def of(hidden: Tensor) -> Tensor:
            output.last_hidden_state = hidden[None]
            logits: Tensor = self._model.forward(**inputs).logits[0]
            return logits

        given = _Given(self._model.get_decoder(), output)
        with self._replaced({self._decoder_name: given, **bare}):
            yield of

    @contextmanager
    def _replaced(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Put other modules in the places of the model's, by full name."""
        places = []
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            places.append((self._model.get_submodule(parent)._modules, child, module))
        before = [siblings[child] for siblings, child, _ in places]
        for siblings, child, module in places:
            siblings[child] = module
        try:
            yield
        finally:
            for (siblings, child, _), own in zip(places, before, strict=True):
                siblings[child] = own
