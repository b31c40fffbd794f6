from __future__ import annotations

import pytest
import torch

from dynrank_ds.adapters.initial import module_generator, svd_factors
from dynrank_ds.methods.base import MicroBatch
from dynrank_ds.methods.elalora import orthogonal_rows
from dynrank_ds.methods.pe_dyra import PEDyRA, PEDyRAConfig
from dynrank_ds.methods.penalties import orthogonality
from tests.methods.small import CPU, SIDES, make_modules


@pytest.mark.parametrize(("rank", "length"), [(1, 6), (4, 6), (5, 3)])
@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_it_is_the_gradient_of_the_frobenius_norm(rank: int, length: int, scale: float) -> None:
    torch.manual_seed(0)
    factor = torch.randn(rank, length) * scale
    f = factor.double().requires_grad_()
    torch.linalg.matrix_norm(f @ f.T - torch.eye(rank, dtype=torch.float64)).backward()
    assert f.grad is not None
    torch.testing.assert_close(orthogonality(factor)[1].double(), f.grad, rtol=1e-5, atol=1e-6)


def test_it_is_zero_where_rows_are_orthonormal() -> None:
    factor = torch.eye(5)[[3, 0, 4]]
    assert torch.equal(orthogonality(factor)[1], torch.zeros(3, 5))


@pytest.mark.parametrize("length", [16, 48, 576, 4096, 11008])
def test_rounding_is_no_gradient_of_orthonormal_rows_beside_others(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    kept = 0.05 * torch.randn(6, length, generator=generator)
    factor = torch.cat([kept, orthogonal_rows(kept, 4, generator)])
    gradient = orthogonality(factor)[1]
    assert not gradient[6:].any()
    assert gradient[:6].any(1).all()


def test_a_16_bit_factor_gives_an_fp32_gradient() -> None:
    factor = torch.randn(3, 8).bfloat16()
    gradient = orthogonality(factor)[1]
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, orthogonality(factor.float())[1])


def test_two_micro_batches_add_the_mean_norm_over_all_factor_matrices_once() -> None:
    modules = make_modules()
    coefficient = 0.3
    config = PEDyRAConfig(t_i=4, interval=3, t_f=5, orthogonality=coefficient)
    method = PEDyRA(config, modules, 20, CPU)
    for name, module in modules.items():
        module.set_factors(svd_factors(3, *SIDES[name], module_generator(0, name, 0)))
    for last in (False, True):
        method.begin_micro_batch(MicroBatch(torch.ones(1, 2), last=last))
        for name, module in modules.items():
            (0 * module(torch.randn(1, 2, SIDES[name][0]))).sum().backward()  # a task without gradient

    copies = [f.detach().double().requires_grad_() for b in modules.values() for f in (b.lora_A, b.lora_B)]
    norms = [torch.linalg.matrix_norm(f @ f.T - torch.eye(3, dtype=torch.float64)) for f in copies]
    expected = coefficient * torch.stack(norms).mean()
    expected.backward()
    torch.testing.assert_close(method.penalty, expected.detach(), rtol=1e-6, atol=0)
    ours = [f.grad for b in modules.values() for f in (b.lora_A, b.lora_B)]
    for gradient, copy in zip(ours, copies, strict=True):
        torch.testing.assert_close(gradient.double(), copy.grad, rtol=1e-5, atol=1e-7)
    assert not any(module.lora_E.grad.any() for module in modules.values())
