"""The adapter that a run leaves is the model that was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dynrank_ds.export import merge_adapter

SCALE = 16.0 / 4


def logits(model: nn.Module) -> Tensor:
    """(2, 40, vocabulary) of fixed random tokens."""
    tokens = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def base_model(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def trained(shards: Path) -> Tensor:
    """Logits of W + s B^T diag(e) A, of the weights that the two processes held after the last step."""
    factors = load_file(shards / "fp32" / "trained.safetensors")
    model = base_model(shards)
    for name in sorted({name.rpartition(".")[0] for name in factors}):
        a, e, b = (factors[f"{name}.{factor}"] for factor in ("lora_A", "lora_E", "lora_B"))
        model.get_submodule(name).weight.data += SCALE * b.T @ torch.diag(e) @ a
    return logits(model)


def test_training_moved_the_logits_far_beyond_the_tolerance(shards: Path, trained: Tensor) -> None:
    assert (trained - logits(base_model(shards))).abs().max() > 0.01


def test_peft_loads_it_and_gives_the_trained_logits(shards: Path, trained: Tensor) -> None:
    model = PeftModel.from_pretrained(base_model(shards), shards / "fp32" / "adapter")
    torch.testing.assert_close(logits(model), trained, rtol=0, atol=1e-5)


def test_the_merged_model_gives_the_trained_logits(shards: Path, trained: Tensor, tmp_path: Path) -> None:
    merge_adapter(shards / "fp32" / "adapter", str(shards / "model"), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-5)
