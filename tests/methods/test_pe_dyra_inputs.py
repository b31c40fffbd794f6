"""PE-DyRA's input energies, taken inside the backward of a real decoder layer."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from dynrank_ds.methods import build_method
from dynrank_ds.methods.base import MicroBatch
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.loss import SummedLoss
from dynrank_ds.training.model import adapt, load_model
from tests.support.recipes import write_recipe


@pytest.mark.parametrize("checkpointing", [False, True])
def test_linears_of_one_input_square_it_once(tmp_path: Path, checkpointing: bool) -> None:
    recipe = load_recipe(str(write_recipe(tmp_path)))
    model = load_model(recipe.model, checkpointing)
    modules = adapt(model, recipe)
    method = build_method(recipe.method, modules, 20, torch.device("cpu"))
    method.begin_micro_batch(MicroBatch(torch.ones(1, 6)))
    energy = method.energy  # type: ignore[attr-defined]
    ids = torch.arange(3, 9).view(1, 6)
    with patch.object(energy, "_summed_squares", wraps=energy._summed_squares) as squared:
        SummedLoss(model)(ids, torch.tensor([1, 4]), torch.tensor([4, 5])).backward()
        # Of q, k and v; of o; of gate and up; of down.
        assert squared.call_count == 4 * model.config.num_hidden_layers
        method.begin_micro_batch(MicroBatch(torch.ones(1, 6), step=method.last_observed + 1))  # type: ignore[attr-defined]
        SummedLoss(model)(ids, torch.tensor([1, 4]), torch.tensor([4, 5])).backward()
        assert squared.call_count == 4 * model.config.num_hidden_layers  # nothing reads them any more
    assert len(modules) == 7 * model.config.num_hidden_layers
