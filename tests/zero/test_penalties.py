"""Penalties' gradients, added inside backward where factors are whole, are those of autograd on whole weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.launch import outcomes, run_worker
from tests.support.methods import METHODS
from tests.support.recipes import lines, write_recipe
from tests.zero.workers.penalties import COEFFICIENT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs under ZeRO-3 in two processes, with three micro-batches a step."""
    folder = tmp_path_factory.mktemp("penalties")
    write_recipe(folder)
    for method, key in (("pe_dyra", "orthogonality"), ("dynamic_dora", "variance")):
        section = METHODS[method] | {key: COEFFICIENT}
        (folder / f"{method}.yaml").write_text(json.dumps({"base": "recipe.yaml", "method": section}))
    run_worker(2, "penalties", folder)
    return folder


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("method", ["pe_dyra", "dynamic_dora"])
def test_shards_hold_the_penaltys_gradient_with_accumulation_and_checkpointing(
    folder: Path, method: str, checkpointing: str
) -> None:
    for errors in outcomes(folder / f"{method}-2-{checkpointing}", "errors", 2):
        print(f"{method}: largest error {max(errors):.1e} of a factor's largest gradient")
        assert len(errors) == 3 * 14 and max(errors) <= 1e-6


@pytest.mark.parametrize("method", ["pe_dyra", "dynamic_dora"])
def test_the_logged_penalty_and_gradient_norms_are_those_of_whole_weights(folder: Path, method: str) -> None:
    run = folder / f"{method}-2-false"
    logged = lines(run / "metrics.jsonl")[0]
    for penalty, norms, reported_penalty, reported_norms in outcomes(run, "penalty", 2):
        assert reported_penalty == logged["penalty"] == pytest.approx(penalty, rel=1e-5)
        assert reported_norms == logged["grad_norms"] == pytest.approx(norms, rel=1e-5)
        assert logged["grad_norm"] == pytest.approx(sum(n**2 for n in norms.values()) ** 0.5, rel=1e-5)
