"""Any part of any tensor of a model folder, in the dtype and place that are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dynrank_ds import base_weights
from dynrank_ds.base_weights import BaseWeights, weight_files
from dynrank_ds.errors import ModelError

WEIGHTS = {"half": torch.randn(7, 11).to(torch.bfloat16), "single": torch.randn(101)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"half": WEIGHTS["half"]}, tmp_path / "a.safetensors")
    save_file({"single": WEIGHTS["single"]}, tmp_path / "b.safetensors")
    index = '{"weight_map": {"half": "a.safetensors", "single": "b.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["half", "single"])
def test_a_part_is_read_and_converted_as_torch_converts_it(
    folder: Path, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_weights, "_SCRATCH_BYTES", 24)  # of several pieces, the last one shorter
    with BaseWeights(folder) as weights:
        out = torch.full((60,), torch.nan, dtype=dtype)
        weights.read_into(name, 5, out[:58])
        weights.read_into(name, 0, out[:0])
    assert torch.equal(out[:58], WEIGHTS[name].flatten()[5:63].to(dtype))
    assert out[58:].isnan().all()


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="only safetensors weights are read"):
        weight_files(tmp_path)
