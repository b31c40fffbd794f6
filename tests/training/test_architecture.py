"""What kinds of models `dynrank validate` refuses, each by its name, and what the comparison of losses finds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dynrank_ds.cli import main
from dynrank_ds.data.collating import PackedCollator, PaddedCollator
from dynrank_ds.data.tokenising import TokenisedDataset
from dynrank_ds.errors import ModelError
from dynrank_ds.training import loss
from dynrank_ds.training.architecture import auto_class, find_decoder_layers
from dynrank_ds.training.attention import check_attention
from dynrank_ds.training.loss import SummedLoss, check_loss
from dynrank_ds.training.model import DTYPES
from tests.support.architectures import ARCHITECTURES, architecture_config, write_architecture
from tests.support.recipes import write_recipe
from tests.support.tiny import write_data, write_tokenizer

SMALL = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2},
            "is a gpt2 model, whose layers are tr",
        ),
        (
            {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 4},
            "bert is an encoder, whose tokens see",
        ),
        ({"model_type": "xlm-roberta"}, "xlm-roberta is an encoder, whose tokens see those behind them"),
        ({"model_type": "t5", "d_model": 32}, "t5 is an encoder-decoder (sequence-to-sequence) model"),
        ({"model_type": "bart", "d_model": 32}, "bart is an encoder-decoder (sequence-to-sequence) model"),
        ({"model_type": "vit"}, "vit is of a kind for which transformers has no causal language model"),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}},
            "is quantised (gptq): give the 16-bit or 32-bit model that it was made from",
        ),
        (
            {
                "model_type": "llama",
                "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
            },
            "is quantised (bitsandbytes): give",
        ),
    ],
)
def test_validate_refuses_a_kind_of_model_in_one_sentence_that_names_it(
    values: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(SMALL | values))
    write_data(tmp_path / "data.jsonl", samples=4)
    recipe = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"source": str(tmp_path / "data.jsonl"), "max_length": 200},
        "method": {"name": "lora"},
        "train": {"steps": 2, "global_batch_size": 2, "learning_rate": 1e-3},
        "output": {"dir": str(tmp_path / "run")},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["validate", "--recipe", str(tmp_path / "recipe.yaml")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: model.path") and sentence in lines[-1]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_decoder_layers_are_found(name: str) -> None:
    config = architecture_config(*ARCHITECTURES[name])
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    found = find_decoder_layers(model)
    assert found is not None and len(found[1]) == 2 and found[0] in ("layers", "h")


def samples() -> TokenisedDataset:
    lengths = np.array([30, 21])
    tokens = np.random.default_rng(0).integers(3, 100, lengths.sum()).astype(np.int32)
    starts = np.array([0, 30])
    return TokenisedDataset(tokens, np.ones(len(tokens), np.bool_), starts, lengths, lengths - 1)


def random_model(model_type: str, **values: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SMALL, **values)).eval()


@torch.no_grad()
def check(model: PreTrainedModel, packing: bool) -> None:
    model.config.use_cache = False  # as load_model has it: with a cache, packed samples see each other
    collator = PackedCollator() if packing else PaddedCollator(2)
    check_loss(SummedLoss(model), samples(), collator, "fp32", torch.device("cpu"))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", ["LLaMA", "Gemma-2", "Cohere2", "Granite", "GPT-NeoX"])
def test_models_that_are_trained_right_pass_the_comparison(name: str, packing: bool) -> None:
    torch.manual_seed(0)
    check(AutoModelForCausalLM.from_config(architecture_config(*ARCHITECTURES[name])).eval(), packing)


SEEDS = range(3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rounding_stays_far_below_the_tolerance_of_the_comparison(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every architecture of the table: the figures that dynrank_ds/adapters/README.md states."""
    found: dict[str, float] = {}

    def note(ours: float, own: float) -> float:
        found[name] = max(found.get(name, 0.0), abs(ours - own) / max(abs(own), 1))
        return found[name]

    monkeypatch.setattr(loss, "relative_difference", note)
    for name, (model_type, changes) in ARCHITECTURES.items():
        config = architecture_config(model_type, changes)
        attention = "eager" if name in ("BLOOM", "Gemma-2") else "sdpa"
        for seed in SEEDS:
            torch.manual_seed(seed)
            model = auto_class(config).from_config(config, dtype=DTYPES[dtype], attn_implementation=attention)
            model.eval().config.use_cache = False
            loss.check_loss(loss.SummedLoss(model), samples(), PaddedCollator(2), dtype, torch.device("cpu"))
    largest = max(found, key=lambda name: found[name])
    print(f"{dtype}: {found[largest]:.1e} ({largest}) of {loss.TOLERANCES[dtype]:.0e}")
    assert len(found) == len(ARCHITECTURES)
    assert found[largest] <= loss.TOLERANCES[dtype] / 4


@torch.no_grad()
def test_sdpa_leaves_out_the_cap_of_gemma_2_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """With scores as large as the cap, as this random model's are, the loss is another one."""
    config = architecture_config(*ARCHITECTURES["Gemma-2"])
    config.attn_logit_softcapping, config.initializer_range = 5.0, 0.5
    found = {}
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        tokens = torch.arange(3, 63)[None]
        found[attention] = float(model(input_ids=tokens, labels=tokens).loss)
        check_attention(config, attention)
    print(found)
    assert abs(found["sdpa"] - found["eager"]) > 1e-3
    assert caplog.messages == [
        "gemma2 caps its attention scores (attn_logit_softcapping 5), which sdpa leaves out: give model.attention "
        "auto or eager"
    ]


def test_packed_samples_that_see_each_other_are_refused_before_training() -> None:
    """BLOOM has no position ids and a state-space layer no mask: packed, their samples are one text to them."""
    bloom = random_model("bloom", hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
    check(bloom, packing=False)
    with pytest.raises(ModelError, match=r"cannot be trained with PackedCollator"):
        check(bloom, packing=True)
    hybrid = AutoModelForCausalLM.from_config(architecture_config(*ARCHITECTURES["Falcon-H1"])).eval()
    check(hybrid, packing=False)
    with pytest.raises(ModelError, match=r"cannot be trained with PackedCollator"):
        check(hybrid, packing=True)


def test_logits_that_are_not_made_from_the_decoder_alone_are_refused() -> None:
    """As a model that remote code defines may make them."""
    model = random_model(
        "llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3
    )
    plain = model.forward

    def forward(**inputs: Any) -> Any:
        output = plain(**inputs)
        output.logits = output.logits.cumsum(1)
        return output

    check(model, packing=False)
    model.forward = forward  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"by the model's own forward on each alone"):
        check(model, packing=False)


def test_sdpa_is_refused_where_transformers_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    shutil.rmtree(tmp_path / "model")
    write_architecture(tmp_path / "model", *ARCHITECTURES["BLOOM"])
    linears = ("adapter.targets=all-linear",)
    assert main(["validate", "--recipe", str(recipe), "model.attention=sdpa", *linears]) == 2
    sentence = "error: model.attention is sdpa, which transformers does not have for bloom models: give eager"
    assert sentence in capsys.readouterr().err
    assert main(["validate", "--recipe", str(recipe), *linears]) == 0
