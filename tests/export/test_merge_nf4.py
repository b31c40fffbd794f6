"""Adapters trained in NF4 merge into the stored base, or into the weights that they were trained against."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from dynrank_ds.cli import main
from dynrank_ds.errors import RunError
from dynrank_ds.export import merge_adapter, merging
from dynrank_ds.export.base_model import model_hash

from .conftest import save_base

SIZES = {"hidden_size": 64, "intermediate_size": 175, "num_attention_heads": 4, "num_hidden_layers": 2}
# Of rows that no whole number of blocks of 64 weights makes up, with tied embeddings.
ODD = {"hidden_size": 72, "intermediate_size": 100, "tie_word_embeddings": True}


def probe_tokens() -> Tensor:
    return torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(0))


def setting(tmp_path: Path, double: bool, dora: bool = False, **sizes: Any) -> tuple[Path, Path]:
    """A base, and an adapter on some of its layers whose dynrank.json says that it was trained in NF4."""
    base = save_base(tmp_path / "base", **SIZES | sizes)
    torch.manual_seed(1)
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], use_dora=dora)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    trained = {"quantisation": "nf4", "double_quantisation": double, "dtype": "fp32"}
    record = {"base_model_hash": model_hash(base), "recipe": {"model": trained}}
    (tmp_path / "adapter/dynrank.json").write_text(json.dumps(record))
    return base, tmp_path / "adapter"


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=probe_tokens()).logits


def as_trained(base: Path, adapter: Path, double: bool) -> Tensor:
    """Logits of transformers' and PEFT's model on a base in NF4."""
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = LlamaForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=quantised, device_map={"": "cpu"}
    )
    return logits(PeftModel.from_pretrained(model, adapter))


@pytest.mark.parametrize(
    ("double", "dora", "sizes"),
    [(False, False, {}), (True, False, {}), (True, True, {}), (True, False, ODD)],
    ids=["lora", "double", "dora", "odd sizes, tied"],
)
def test_matched_it_has_the_logits_of_training_and_otherwise_says_how_far_it_is_from_them(
    double: bool, dora: bool, sizes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_ELEMENTS_AT_ONCE", 500)  # rows that begin within a block
    base, adapter = setting(tmp_path, double, dora, **sizes)
    expected = as_trained(base, adapter, double)
    matched = merge_adapter(adapter, str(base), tmp_path / "matched", match_quantised_base=True)
    stored = merge_adapter(adapter, str(base), tmp_path / "stored")
    found = logits(LlamaForCausalLM.from_pretrained(tmp_path / "matched"))
    assert (found - expected).abs().max() < 2e-5
    assert matched is not None and matched.largest < 2e-5
    plain = logits(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter))
    found = logits(LlamaForCausalLM.from_pretrained(tmp_path / "stored"))
    assert (found - plain).abs().max() < 2e-5
    distance = float((plain - expected).abs().max())
    assert stored is not None and stored.largest == pytest.approx(distance, rel=1e-3) and distance > 0.01
    assert stored.logits == pytest.approx(float(expected.abs().max()), rel=1e-3)


def test_a_16_bit_base_keeps_its_dtype_and_the_command_prints_both_differences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = setting(tmp_path, True, dtype=torch.bfloat16)
    command = ["merge", "--adapter", str(adapter), "--base", str(base), "--output"]
    assert main([*command, str(tmp_path / "stored")]) == 0
    assert main([*command, str(tmp_path / "matched"), "--match-quantised-base"]) == 0
    said = re.findall(r"largest difference of logits .*: (\S+), of logits up to", capsys.readouterr().out)
    stored, matched = map(float, said)
    print(stored, matched)
    assert 0 < matched < stored / 4  # rounding to bf16, and that of NF4
    for name in ("stored", "matched"):
        model = LlamaForCausalLM.from_pretrained(tmp_path / name, dtype="auto")
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_an_adapter_that_was_not_trained_in_nf4_matches_no_quantised_base(tmp_path: Path) -> None:
    base, adapter = setting(tmp_path, False)
    (adapter / "dynrank.json").unlink()
    with pytest.raises(RunError, match=r"--match-quantised-base is given, but no dynrank\.json .* in NF4"):
        merge_adapter(adapter, str(base), tmp_path / "merged", match_quantised_base=True)
    assert merge_adapter(adapter, str(base), tmp_path / "merged") is None
