from __future__ import annotations

import weakref
from unittest.mock import patch

import pytest
import torch

from dynrank_ds.ranking.layout import ModuleShape, ShardLayout
from dynrank_ds.ranking.statistics import InputEnergy, Sensitivity
from dynrank_ds.zero.shards import zero3_rules
from tests.ranking.thread_processes import shard

CPU = torch.device("cpu")
# The state is fp32 (eps 6e-8) and forgets with a horizon of 1 / (1 - 0.85) = 7 steps, so that some ten rounding
# errors live in it at a time. The uncertainty adds the cancellation in I - Ibar, of up to a few times I.
TOLERANCE = 2e-6


def test_sensitivity_on_two_processes_equals_the_recursion_on_whole_rows_in_float64() -> None:
    torch.manual_seed(0)
    shapes, ranks, factors = (ModuleShape("a", 7, 5),), (3,), ("lora_A", "lora_E", "lora_B")
    sizes = [(3, 7), (3, 1), (3, 5)]
    layouts = [ShardLayout(shapes, ranks, factors, zero3_rules((), (), (), 2)[rank]) for rank in range(2)]
    ours = [Sensitivity({}, layout.numel, 0.85, 0.7, CPU) for layout in layouts]
    smoothed = [torch.zeros(s, dtype=torch.float64) for s in sizes]
    uncertainty = [torch.zeros(s, dtype=torch.float64) for s in sizes]
    for _ in range(30):
        weights = [torch.randn(s) for s in sizes]
        gradients = [torch.randn(s) * 1e-3 for s in sizes]
        for rank, statistic in enumerate(ours):
            statistic.update(shard(weights, rank, 2), shard(gradients, rank, 2))
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            product = (w.double() * g.double()).abs()
            smoothed[i] = 0.85 * smoothed[i] + 0.15 * product
            uncertainty[i] = 0.7 * uncertainty[i] + 0.3 * (product - smoothed[i]).abs()

    for rank, statistic in enumerate(ours):
        torch.testing.assert_close(
            statistic.smoothed.double(), shard(smoothed, rank, 2), rtol=TOLERANCE, atol=0
        )
        torch.testing.assert_close(
            statistic.uncertainty.double(), shard(uncertainty, rank, 2), rtol=TOLERANCE, atol=0
        )
    rows = sum(s.row_sums(layout) for s, layout in zip(ours, layouts, strict=True))
    expected = torch.stack([(i * u).sum(1) for i, u in zip(smoothed, uncertainty, strict=True)])
    torch.testing.assert_close(rows, expected, rtol=TOLERANCE, atol=0)


def test_small_products_do_not_underflow_in_the_score() -> None:
    layout = ShardLayout((ModuleShape("a", 1, 1),), (1,), ("lora_A",), zero3_rules((), (), (), 1)[0])
    statistic = Sensitivity({}, 1, 0.85, 0.85, CPU)
    statistic.update(torch.tensor([1e-10]), torch.tensor([1e-15]))
    # I = 1e-25: Ibar = 0.15 I, U = 0.15 (I - Ibar) = 0.1275 I; the product 1.9e-52 is nothing in fp32.
    torch.testing.assert_close(statistic.row_sums(layout).item(), 0.15 * 0.1275 * 1e-50, rtol=1e-5, atol=0)


def test_input_energy_of_two_processes_is_the_smoothed_mean_square_without_padding() -> None:
    torch.manual_seed(1)
    shapes = (ModuleShape("a", 6, 2), ModuleShape("b", 4, 2))
    ours = [InputEnergy(shapes, 0.85, CPU) for _ in range(2)]
    expected = torch.zeros(10, dtype=torch.float64)
    for _ in range(30):
        squares, tokens = torch.zeros(10, dtype=torch.float64), 0
        for energy in ours:
            for _micro_batch in range(2):
                lengths = torch.randint(1, 6, (3,))
                mask = (torch.arange(5) < lengths[:, None]).long()
                tokens += int(lengths.sum())
                inputs = [torch.randn(3, 5, shape.in_features) for shape in shapes]
                for module, x in enumerate(inputs):
                    energy.add(module, x.flatten(0, 1), mask)
                kept = torch.cat([x[mask.bool()].double() for x in inputs], dim=1)
                squares += kept.square().sum(0)
        for energy in ours:
            energy.update(tokens)
        expected = 0.85 * expected + 0.15 * squares / tokens
    torch.testing.assert_close(
        sum(energy.smoothed for energy in ours).double(), expected, rtol=TOLERANCE, atol=0
    )


def test_input_energy_of_a_long_batch_is_summed_in_full() -> None:
    torch.manual_seed(2)
    energy = InputEnergy((ModuleShape("a", 3, 2),), 0.0, CPU)
    x = torch.randn(2, 2500, 3)
    energy.add(0, x.flatten(0, 1), torch.ones(2, 2500))
    energy.update(5000)
    torch.testing.assert_close(energy.smoothed, x.double().square().mean((0, 1)).float(), rtol=1e-5, atol=0)


def test_modules_with_one_input_square_it_once_and_a_shorter_or_overwritten_one_again() -> None:
    torch.manual_seed(3)
    energy = InputEnergy([ModuleShape(name, 3, 2) for name in "abcd"], 0.0, CPU)
    x, ones = torch.randn(4, 3), torch.ones(1, 4)
    with patch.object(energy, "_summed_squares", wraps=energy._summed_squares) as squared:
        energy.add(0, x, ones)
        energy.add(1, x.view(1, 4, 3).flatten(0, 1), ones)
        assert squared.call_count == 1
        energy.add(2, x.mul_(2), ones)
        energy.add(3, x[:2], ones[:, :2])
        assert squared.call_count == 3
    energy.update(1)
    before = (x / 2).square().sum(0)
    expected = torch.cat([before, before, x.square().sum(0), x[:2].square().sum(0)])
    torch.testing.assert_close(energy.smoothed, expected, rtol=1e-5, atol=0)


def test_an_input_of_the_last_step_is_not_kept() -> None:
    energy, x = InputEnergy((ModuleShape("a", 3, 2),), 0.0, CPU), torch.randn(4, 3)
    energy.add(0, x, torch.ones(1, 4))
    held = weakref.ref(x)
    energy.update(4)
    del x
    assert held() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_observing_leaves_the_input_as_it_is(dtype: torch.dtype) -> None:
    x = torch.randn(6, 4, dtype=dtype)
    before = x.clone()
    InputEnergy((ModuleShape("a", 4, 2),), 0.85, CPU).add(0, x, torch.ones(2, 3))
    assert torch.equal(x, before)


def test_a_discarded_step_leaves_no_trace_in_the_input_energy() -> None:
    energy = InputEnergy((ModuleShape("a", 3, 2),), 0.85, CPU)
    energy.add(0, torch.full((2, 3), 7.0), torch.ones(1, 2))
    energy.discard()
    energy.add(0, torch.full((2, 3), 2.0), torch.ones(1, 2))
    energy.update(2)
    torch.testing.assert_close(energy.smoothed, torch.full((3,), 0.15 * 4.0))
