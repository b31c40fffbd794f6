"""Which layers are quantised, what is refused, and what a CPU must not do to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import modules
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dynrank_ds import quantised_layers
from dynrank_ds.errors import MachineError, ModelError, RecipeError
from dynrank_ds.quantised_layers import quantised_linears
from dynrank_ds.recipe import check_recipe
from dynrank_ds.recipe_sections import ModelSection
from dynrank_ds.training.model import load_model
from dynrank_ds.training.quantisation import check_quantisable
from tests.support.architectures import ARCHITECTURES, architecture_config


def section(folder: Path) -> ModelSection:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=100,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return ModelSection(path=str(folder), dtype="fp32", quantisation="nf4")


def test_all_linear_layers_but_the_head_are_quantised_and_never_rearranged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    linears = quantised_linears(load_model(section(tmp_path), False))
    assert len(linears) == 2 * 7 and not any("head" in name for name in linears)
    assert not any(linear.support_avx512bf16_for_cpu for linear in linears.values())


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised_layers, "find_spec", lambda _: None)
    with pytest.raises(
        MachineError, match=r"model.quantisation nf4 needs bitsandbytes: pip install bitsandbytes"
    ):
        load_model(section(tmp_path), False)


def test_a_model_of_which_nothing_would_be_quantised_is_refused() -> None:
    """Falcon's linear layers are of a class of their own."""
    nf4 = ModelSection(path="m", quantisation="nf4")
    with torch.device("meta"):
        falcon, llama = (
            AutoModelForCausalLM.from_config(architecture_config(*ARCHITECTURES[name]))
            for name in ("Falcon", "LLaMA")
        )
    check_quantisable(nf4, llama)
    check_quantisable(ModelSection(path="m"), falcon)
    with pytest.raises(ModelError, match=r"m is a falcon model, none of whose layers transformers quantises"):
        check_quantisable(nf4, falcon)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"quantisation": "int8"}, r"'model.quantisation' is 'int8': not supported: .*give nf4"),
        ({"quantisation": "nf5"}, r"'model.quantisation' is 'nf5': input should be 'nf4'"),
        ({"double_quantisation": True}, r"double_quantisation is given without model.quantisation: give nf4"),
    ],
)
def test_other_quantisations_are_refused_with_a_reason(model: dict[str, object], message: str) -> None:
    values = {
        "model": {"path": "m", **model},
        "data": {"source": "d.jsonl"},
        "method": {"name": "lora"},
        "train": {"steps": 1, "global_batch_size": 1, "learning_rate": 1e-3},
        "output": {"dir": "r"},
    }
    with pytest.raises(RecipeError, match=message):
        check_recipe(values, "a recipe")
