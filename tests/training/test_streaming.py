"""What a checkpoint lacks, has too much or has in another shape is reported before anything is allocated."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from dynrank_ds.errors import ModelError
from dynrank_ds.tensorfile import TensorFileError
from dynrank_ds.training.streaming import NotStreamableError, load_streamed
from tests.support.architectures import ARCHITECTURES, write_architecture
from tests.support.tiny import write_model

NAME = "model.layers.1.self_attn.q_proj.weight"


class AllocatesNothing:
    """A partitioner that is not to be used; buffers come first, and ask where they belong."""

    @property
    def device(self) -> torch.device:
        raise AssertionError("the model is being allocated")


def load(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    load_streamed(folder, config, torch.float32, "sdpa", cast(Any, AllocatesNothing()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def change(folder: Path, **changes: torch.Tensor | None) -> None:
    """Sets tensors of the checkpoint, or removes those that are None."""
    file = folder / "model.safetensors"
    weights = load_file(file) | changes
    save_file({name: value for name, value in weights.items() if value is not None}, file, {"format": "pt"})


def test_missing_weights_are_named_and_counted(folder: Path) -> None:
    change(folder, **{NAME: None, "model.norm.weight": None})
    with pytest.raises(ModelError, match=rf"lacks 2 weights, the first {NAME}: give a whole model"):
        load(folder)


def test_a_weight_of_another_shape_is_named_with_both(folder: Path) -> None:
    change(folder, **{NAME: torch.zeros(36, 35)})
    with pytest.raises(ModelError, match=rf"holds {NAME} of shape \(36, 35\), .* it is \(36, 36\): give"):
        load(folder)


def test_tensors_without_a_place_are_named_and_those_of_old_checkpoints_are_not(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(9)})
    with pytest.raises(AssertionError, match="is being allocated"):
        load(folder)
    assert not caplog.records
    change(folder, **{"model.layers.2.mlp.up_proj.weight": torch.zeros(3)})
    with caplog.at_level(logging.WARNING), pytest.raises(AssertionError, match="is being allocated"):
        load(folder)
    assert "holds 1 tensors that its config.json has no place for, the first model.layers.2" in caplog.text


def test_files_that_are_missing_or_cut_short_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(TensorFileError, match=r"model.safetensors is cut short"):
        load(folder)
    file.unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "model-1.safetensors"}}')
    with pytest.raises(ModelError, match=r"index.json names the file model-1.safetensors, which is not in"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("Mixtral", "is converted on loading"), ("Qwen2.5, tied", "are tied and both stored")],
)
def test_what_transformers_changes_on_loading_is_left_to_it(tmp_path: Path, name: str, reason: str) -> None:
    write_architecture(tmp_path, *ARCHITECTURES[name])
    if name != "Mixtral":
        change(tmp_path, **{"lm_head.weight": torch.zeros(100, 32)})
    with pytest.raises(NotStreamableError, match=reason):
        load(tmp_path)


def test_weights_in_other_files_are_left_to_transformers(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(NotStreamableError, match="not in safetensors files"):
        load(folder)
