"""Principal triples against LAPACK's SVD."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynrank_ds.adapters.initial import module_generator
from dynrank_ds.adapters.principal import TOLERANCE, PrincipalTriples, principal_triples


def weight(out_features: int, in_features: int, decay: float) -> Tensor:
    """Of singular values (k + 1)^-decay."""
    draw = torch.Generator().manual_seed(0)
    smaller = min(out_features, in_features)
    u = torch.linalg.qr(torch.randn(out_features, smaller, generator=draw)).Q
    v = torch.linalg.qr(torch.randn(in_features, smaller, generator=draw)).Q
    return (u * torch.arange(1, smaller + 1) ** -decay) @ v.T


def found_in(of: Tensor, rank: int = 4) -> PrincipalTriples:
    return principal_triples(of, rank, module_generator(0, "module", 0))


@pytest.mark.parametrize("shape", [(20, 31), (48, 33), (300, 220), (220, 300)])
@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_singular_values_are_those_of_lapack_within_the_stated_error(
    shape: tuple[int, int], decay: float
) -> None:
    of = weight(*shape, decay)
    found, exact = found_in(of), torch.linalg.svdvals(of.double())
    assert found.error <= TOLERANCE
    away = (found.sigma.double()[:, None] - exact).abs().min(1).values / found.sigma
    assert float(away.max()) <= found.error + 1e-6
    # And they are the largest.
    assert torch.allclose(found.sigma.double(), exact[:4], rtol=TOLERANCE)
    for rows in (found.u, found.v):
        assert torch.allclose(rows @ rows.T, torch.eye(4), atol=1e-5)
    best = exact[4:].square().sum().sqrt()
    left = torch.linalg.matrix_norm(of - (found.u.T * found.sigma) @ found.v)
    assert float(left) <= float(best) * (1 + TOLERANCE)


def test_the_error_is_that_of_a_space_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    of = weight(300, 220, 0.1)
    monkeypatch.setattr("dynrank_ds.adapters.principal._BLOCKS", 1)
    found = found_in(of)
    expected = torch.linalg.vector_norm(of @ found.v.T - found.u.T * found.sigma, dim=0) / found.sigma
    assert found.error == pytest.approx(float(expected.max()), rel=1e-3)
    assert found.error > TOLERANCE


def test_they_are_the_same_at_every_call_and_signs_do_not_depend_on_the_algorithm() -> None:
    of = weight(300, 220, 1.0)
    first, second = found_in(of), found_in(of)
    assert torch.equal(first.u, second.u) and torch.equal(first.v, second.v)
    exact = torch.linalg.svd(of).Vh[:4]
    signs = exact.gather(1, exact.abs().argmax(1, keepdim=True)).sign()
    assert torch.allclose(first.v, exact * signs, atol=5e-3)


@pytest.mark.parametrize("with_gate", [True, False])
def test_factors_give_the_triples_back_at_any_scale(with_gate: bool) -> None:
    found = found_in(weight(48, 33, 1.0))
    factors = found.factors(2.5, with_gate)
    gate = factors.get("lora_E", torch.ones(4))
    product = 2.5 * factors["lora_B"].T @ torch.diag(gate) @ factors["lora_A"]
    torch.testing.assert_close(product, (found.u.T * found.sigma) @ found.v)
    assert ("lora_E" in factors) == with_gate
