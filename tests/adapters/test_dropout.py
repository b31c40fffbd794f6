"""Adapter dropout beside a mask in plain numpy, and what a mask must look like."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynrank_ds.adapters.dropout import TokenDropout
from dynrank_ds.adapters.heads import HeadedLinear, HeadSplit
from dynrank_ds.adapters.linear import AdaptedLinear, ModuleBackward
from dynrank_ds.errors import ModelError

CPU = torch.device("cpu")
SEED, STEP = 3, 17


def splitmix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def plain_factor(p: float, linear: str, sample: int, position: int, feature: int) -> float:
    """What an element is multiplied by, in Python's whole numbers."""
    token = splitmix(splitmix(splitmix(STEP) ^ sample) ^ position)
    key = int.from_bytes(hashlib.sha256(f"{SEED}/{linear}".encode()).digest()[:8], "little")
    product = ((splitmix(token ^ key) | 1) * (splitmix(feature + 1) | 1)) % 2**32
    product = (product ^ (product >> 16)) * 0x7FEB352D % 2**32
    signed = product - 2**32 if product >= 2**31 else product
    return 1 / (1 - p) if signed >= round(p * 2**32) - 2**31 else 0.0


def factors(p: float, linear: str, samples: list[int], sizes: list[int], features: int) -> Tensor:
    dropout = TokenDropout(p, SEED)
    dropout.begin_micro_batch(STEP, samples, sizes, CPU)
    return dropout.of_linear(linear)(torch.empty(sum(sizes), features, dtype=torch.float64))


def test_a_mask_is_the_function_of_sample_and_position_that_plain_arithmetic_gives() -> None:
    got = factors(0.3, "a.b", [8, 1], [5, 3], 7)
    tokens = [(8, i) for i in range(5)] + [(1, i) for i in range(3)]
    expected = [[plain_factor(0.3, "a.b", s, i, f) for f in range(7)] for s, i in tokens]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0)


def test_a_sample_has_its_mask_in_every_micro_batch_padded_or_packed() -> None:
    padded = factors(0.1, "a", [4, 9], [6, 6], 11).view(2, 6, 11)
    packed = factors(0.1, "a", [9, 2, 4], [6, 3, 5], 11)
    assert torch.equal(padded[1], packed[:6])
    assert torch.equal(padded[0, :5], packed[9:])


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_elements_are_dropped_with_probability_p_independently_of_each_other(p: float) -> None:
    """Of 400 tokens and 600 features: the share of each row and column, and the correlation of rows and of columns."""
    dropped = (factors(p, "a", [0, 1], [200, 200], 600) == 0).double().numpy()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(dropped.mean() - p) < 5 * deviation / dropped.size**0.5
    for axis in (0, 1):
        count = dropped.shape[axis]
        assert abs(dropped.mean(axis) - p).max() < 6 * deviation / count**0.5
        scores = (dropped - p) / deviation
        correlation = (scores.T @ scores if axis == 0 else scores @ scores.T) / count
        np.fill_diagonal(correlation, 0)
        # About normal with deviation 1 / sqrt(count), over 10^5 pairs; a shared structure would give some near 1.
        assert abs(correlation).max() < 8 / count**0.5
        assert correlation.std() == pytest.approx(1 / count**0.5, rel=0.1)
    other = (factors(p, "b", [0, 1], [200, 200], 600) == 0).double().numpy()
    assert abs(((dropped - p) * (other - p)).mean() / deviation**2) < 5 / dropped.size**0.5


def masked(x: Tensor, linear: str) -> tuple[TokenDropout, Tensor]:
    dropout = TokenDropout(0.4, SEED)
    dropout.begin_micro_batch(STEP, [5, 6], [3, 3], CPU)
    expected = [
        [plain_factor(0.4, linear, s, i, f) for f in range(x.shape[-1])] for s in (5, 6) for i in range(3)
    ]
    return dropout, torch.tensor(expected, dtype=x.dtype).view_as(x)


def test_output_and_gradients_are_those_of_autograd_on_the_masked_input() -> None:
    torch.manual_seed(0)
    module = AdaptedLinear(nn.Linear(5, 7, dtype=torch.float64).requires_grad_(False), 1.7)
    drawn = {"lora_A": torch.randn(3, 5), "lora_E": torch.randn(3), "lora_B": torch.randn(3, 7)}
    module.set_factors({name: f.double() for name, f in drawn.items()})
    seen: list[ModuleBackward] = []
    module.on_backward = seen.append
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    dropout, mask = masked(x, "m")
    module.dropout = dropout.of_linear("m")
    a, e, b = (f.double().requires_grad_() for f in drawn.values())
    plain_x = x.detach().clone().requires_grad_()
    expected = module.base(plain_x) + 1.7 * (plain_x * mask) @ a.T @ torch.diag(e) @ b
    ours = module(x)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(ours)
    ours.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(x.grad, plain_x.grad, rtol=1e-12, atol=1e-12)
    for name, copy in (("lora_A", a), ("lora_E", e), ("lora_B", b)):
        torch.testing.assert_close(module.factors()[name].grad, copy.grad, rtol=1e-12, atol=1e-12)
    assert torch.equal(seen[0].x, x.detach().flatten(0, -2))  # methods see the input before dropout
    module.eval()
    torch.testing.assert_close(module(x), module.base(x) + 1.7 * x @ a.T @ torch.diag(e) @ b)


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_heads_of_a_linear_share_the_mask_of_its_input(side: str) -> None:
    torch.manual_seed(0)
    linear = HeadedLinear(
        nn.Linear(6, 6, bias=False, dtype=torch.float64).requires_grad_(False), HeadSplit(side, 2), 1.5, "h"
    )
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    dropout, mask = masked(x, "h")
    delta = torch.zeros(6, 6, dtype=torch.float64)
    leaves = []
    for module in linear.adapted_modules("h").values():
        drawn = {
            "lora_A": torch.randn(2, module.in_features, dtype=torch.float64),
            "lora_B": torch.randn(2, module.out_features, dtype=torch.float64),
        }
        module.set_factors(drawn)
        module.dropout = dropout.of_linear("h")
        a, b = (f.clone().requires_grad_() for f in drawn.values())
        part = slice(module.part.start, module.part.stop)
        whole = torch.zeros(6, 6, dtype=torch.float64)
        rows, columns = (part, slice(None)) if side == "rows" else (slice(None), part)
        whole[rows, columns] = 1.5 * b.T @ a
        delta = delta + whole
        leaves.append((module, a, b))
    plain_x = x.detach().clone().requires_grad_()
    expected = linear.base(plain_x) + (plain_x * mask) @ delta.T
    ours = linear(x)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(ours)
    ours.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(x.grad, plain_x.grad, rtol=1e-12, atol=1e-12)
    for module, a, b in leaves:
        torch.testing.assert_close(module.lora_A.grad, a.grad, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(module.lora_B.grad, b.grad, rtol=1e-12, atol=1e-12)


def test_a_linear_that_does_not_see_every_token_is_refused() -> None:
    dropout = TokenDropout(0.1, SEED)
    dropout.begin_micro_batch(STEP, [0], [4], CPU)
    with pytest.raises(
        ModelError, match=r"adapter.dropout: lm_head has 3 inputs for the 4 tokens of a micro"
    ):
        dropout.of_linear("lm_head")(torch.randn(3, 5))
