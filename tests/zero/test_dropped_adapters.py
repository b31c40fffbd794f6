"""WeightLoRA's memory claim: dropped adapters leave model and optimizer, and survivors grow within what they left."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.support.launch import outcomes, run_worker
from tests.support.recipes import write_recipe

# in + out of the tiny model's linears, q k v o gate up down, in both layers.
COSTS = [36 + 36, 36 + 18, 36 + 18, 36 + 36, 36 + 52, 36 + 52, 52 + 36] * 2
RANK = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dropped")
    recipe = yaml.safe_load(write_recipe(folder).read_text())
    recipe["method"] = {"name": "weightlora", "k": 4, "disconnect_at": 3}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_worker(1, "dropped_adapters", folder)
    return folder


def test_only_the_survivors_have_parameters_masters_and_moments(folder: Path) -> None:
    (seen,) = outcomes(folder, "weightlora", 1)
    full = RANK * sum(COSTS)
    assert seen["before"] == {"blocks": 14, "parameters": full, "masters": full, "moments": 2 * full}
    assert sorted(seen["ranks"]) == [0] * 10 + [RANK] * 4
    left = sum(rank * cost for rank, cost in zip(seen["ranks"], COSTS, strict=True))
    assert left < full / 2
    assert seen["after"] == {"blocks": 4, "parameters": left, "masters": left, "moments": 2 * left}


def test_grown_survivors_hold_no_more_than_all_adapters_did(folder: Path) -> None:
    (seen,) = outcomes(folder, "weightlora_plus", 1)
    full = RANK * sum(COSTS)
    assert seen["before"]["parameters"] == full
    chosen = [cost for rank, cost in zip(seen["ranks"], COSTS, strict=True) if rank]
    held = sum(rank * cost for rank, cost in zip(seen["ranks"], COSTS, strict=True))
    assert held <= full < held + sum(chosen)
    assert set(seen["ranks"]) == {0, full // sum(chosen)}
    assert seen["after"] == {"blocks": 4, "parameters": held, "masters": held, "moments": 2 * held}
