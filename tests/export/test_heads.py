"""Adapters whose heads are modules, exported and merged: the logits are those of the model that was trained."""

import json
import logging
from dataclasses import asdict

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from dynrank_ds.adapters.heads import head_splits
from dynrank_ds.adapters.initial import lora_factors
from dynrank_ds.checkpoint.files import FORMAT, write_sums
from dynrank_ds.export import export_checkpoint, merge_adapter
from tests.support.named import inject_named

from .conftest import save_base

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base with 4 query and 2 key/value heads, a model with a module a head, and its checkpoint.

    Ranks are 0 to 3, q_proj of layer 0 has none at all; the heads of layer 1 have soft gates.
    """
    root = tmp_path_factory.mktemp("heads")
    base = save_base(root / "base", num_hidden_layers=2)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    modules = inject_named(model, TARGETS, 1, 0.7, lora_factors, 0, head_splits(model.config))
    generator = torch.Generator().manual_seed(3)
    entries, tensors = {}, {}
    for index, (name, module) in enumerate(modules.items()):
        rank = 0 if name.startswith("model.layers.0.self_attn.q_proj") else index % 4
        factors = {
            "lora_A": 0.3 * torch.randn(rank, module.in_features, generator=generator),
            "lora_B": 0.3 * torch.randn(rank, module.out_features, generator=generator),
        }
        module.set_factors(factors if rank else {})
        module.gate = torch.rand(rank, generator=generator) if "layers.1." in name else None
        entries[name] = {
            "rank": rank,
            "scale": 0.7,
            "in_features": module.in_features,
            "out_features": module.out_features,
            "gate": None if module.gate is None else module.gate.tolist(),
            "part": None if module.part is None else asdict(module.part),
        }
        tensors |= {f"master/{name}.{f}": value for f, value in factors.items() if rank}
    checkpoint = root / "step-4"
    checkpoint.mkdir()
    save_file(tensors, checkpoint / "state.safetensors")
    about = {"format": FORMAT, "step": 4, "method": "ard_lora", "base_model": str(base), "blocks": entries}
    (checkpoint / "state.json").write_text(json.dumps(about))
    write_sums(checkpoint)
    return base, model, checkpoint


@pytest.mark.parametrize("format", ["peft", "padded"])
def test_peft_and_the_merged_model_give_the_logits_of_the_trained_one(trained, tokens, tmp_path, format):
    base, model, checkpoint = trained
    export_checkpoint(checkpoint, tmp_path / "adapter", format)
    merge_adapter(tmp_path / "adapter", None, tmp_path / "merged")
    with torch.no_grad():
        expected = model(tokens).logits
        plain = LlamaForCausalLM.from_pretrained(base)
        assert (plain(tokens).logits - expected).abs().max() > 0.1
        with_peft = PeftModel.from_pretrained(plain, tmp_path / "adapter")
        assert (with_peft(tokens).logits - expected).abs().max() < 1e-5
        merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
        assert (merged(tokens).logits - expected).abs().max() < 1e-5


def test_a_linear_has_the_sum_of_its_heads_ranks(trained, tmp_path, caplog):
    _, model, checkpoint = trained
    with caplog.at_level(logging.INFO):
        export_checkpoint(checkpoint, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    sums = {}
    for name, entry in json.loads((checkpoint / "state.json").read_text())["blocks"].items():
        linear = name.partition(".blocks.")[0]
        sums[linear] = sums.get(linear, 0) + entry["rank"]
    assert config["rank_pattern"] == {name: rank for name, rank in sums.items() if rank}
    assert sums["model.layers.0.self_attn.q_proj"] == 0
    assert config["alpha_pattern"] == pytest.approx({n: 0.7 * r for n, r in sums.items() if r})
    largest = max(sums, key=sums.get)
    assert f"rank up to {sums[largest]} ({largest}), the sum of the ranks of its 4 heads" in caplog.text

    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    name = "model.layers.1.self_attn.k_proj"
    ranks = [0 if h.lora_A is None else len(h.lora_A) for h in model.get_submodule(name).blocks]
    b = tensors[f"base_model.model.{name}.lora_B.weight"]
    assert all(ranks) and not b[8:, : ranks[0]].any() and not b[:8, ranks[0] :].any()
