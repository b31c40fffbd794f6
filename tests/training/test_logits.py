"""The loss made of a few rows of logits at a time is that of the model's own forward, and never holds them all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from dynrank_ds.training.architecture import auto_class
from dynrank_ds.training.logits import LOGITS_AT_ONCE, rows_at_once
from dynrank_ds.training.loss import SummedLoss
from tests.support.architectures import ARCHITECTURES, architecture_config

HIDDEN, VOCABULARY = 32, 100
ROWS = 3
"""Of logits at one time: the 22 targets below are 7 whole chunks and one of a single row."""


def random_model(name: str) -> PreTrainedModel:
    """In training mode without dropout, its head frozen as in a run."""
    torch.manual_seed(0)
    config = architecture_config(*ARCHITECTURES[name])
    model: PreTrainedModel = auto_class(config).from_config(config).eval()
    model.config.use_cache = False
    model.requires_grad_(True).get_output_embeddings().requires_grad_(False)
    return model


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([row * 12 + i for row in range(2) for i in range(11)])
    return {"input_ids": tokens, "positions": positions, "targets": tokens.flatten()[positions + 1]}


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    """Of the mean loss, all in one vector, in fp64."""
    model.zero_grad()
    (loss / 22).backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def plain_loss(model: nn.Module) -> Tensor:
    """Of all logits of transformers' own forward."""
    inputs = batch()
    logits = model(input_ids=inputs["input_ids"]).logits.flatten(0, 1)[inputs["positions"]]
    return F.cross_entropy(logits.float(), inputs["targets"], reduction="none").double().sum()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_all_logits_at_once(name: str) -> None:
    model = random_model(name)
    expected = plain_loss(model)
    by_all = gradients(model, expected)
    loss = SummedLoss(model, ROWS)(**batch())
    by_chunks = gradients(model, loss)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert float(by_all.norm()) > 1e-2
    assert float((by_chunks - by_all).norm()) <= 1e-6 * float(by_all.norm())


def test_without_gradients_the_loss_is_the_same() -> None:
    loss = SummedLoss(random_model("Gemma-2"), ROWS)
    with torch.no_grad():
        evaluated = loss(**batch())
    assert not evaluated.requires_grad and torch.equal(evaluated, loss(**batch()).detach())


def test_the_model_is_as_before_afterwards() -> None:
    model = random_model("OPT")
    before = dict(model.named_modules())
    SummedLoss(model, ROWS)(**batch()).backward()
    assert dict(model.named_modules()) == before
    assert all(not module._forward_hooks for module in before.values())


def test_a_micro_batch_without_targets_has_no_loss() -> None:
    model = random_model("LLaMA")
    nothing = torch.empty(0, dtype=torch.int64)
    loss = SummedLoss(model, ROWS)(batch()["input_ids"], nothing, nothing)
    assert float(loss) == 0 and not gradients(model, loss).any()


class Largest(TorchDispatchMode):
    """The most elements of a tensor as wide as the vocabulary that any operation returns, weights aside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            wide = isinstance(tensor, Tensor) and tensor.shape[-1:] == (VOCABULARY,)
            if wide and tensor.shape != (HIDDEN, VOCABULARY):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_neither_forward_nor_backward_makes_more_than_a_chunk_of_logits() -> None:
    model = random_model("Cohere").requires_grad_(False)  # whose head is its embedding
    model.enable_input_require_grads()
    with Largest() as in_chunks:
        SummedLoss(model, ROWS)(**batch()).backward()
    assert in_chunks.elements == ROWS * VOCABULARY
    with Largest() as at_once:
        plain_loss(model).backward()
    assert at_once.elements == 24 * VOCABULARY


def test_chunks_of_large_vocabularies_have_as_many_elements_as_those_of_small_ones() -> None:
    assert [rows_at_once(n) for n in (32_000, 128_256, 2**26)] == [1048, 261, 1]
    assert all(n * rows_at_once(n) <= LOGITS_AT_ONCE for n in (32_000, 128_256))
