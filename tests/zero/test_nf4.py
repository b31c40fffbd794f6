"""A base in NF4 under ZeRO has the losses and gradients of transformers' NF4 model in a single process."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config

from dynrank_ds.export import merge_adapter
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.loss import SummedLoss
from dynrank_ds.training.model import DTYPES, adapt
from dynrank_ds.zero.config import load_config
from tests.support.launch import outcomes, run_worker, train
from tests.support.nf4 import batch, drawn_factors
from tests.support.recipes import copy_stopped, lines
from tests.support.tiny import write_data, write_tokenizer

PROCESSES = 2  # the mean of two equal gradients is exact
SETUPS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "nf4, double": {"double_quantisation": True},
    "nf4, double, bf16": {"double_quantisation": True, "dtype": "bf16"},
    "nf4, biases": {"kind": "qwen2"},
    "nf4, activation checkpointing": {"checkpointing": True},
    "nf4, sizes that 64 does not divide": {"kind": "odd"},
    "nf4, ZeRO-2": {"config": "zero2"},
    "nf4, double, bf16, ZeRO-2": {"double_quantisation": True, "dtype": "bf16", "config": "zero2"},
    "nf4, ZeRO-1": {"config": "zero1"},
    "nf4, optimizer offloaded": {"config": "zero3_offload"},
    "nf4, double, bf16, parameters offloaded": {
        "double_quantisation": True,
        "dtype": "bf16",
        "config": "zero3_offload_params",
    },
    "nf4, double, hpZ": {"double_quantisation": True, "config": "zero3_hpz"},
    "nf4, real": {"kind": "real", "double_quantisation": True},
}
# 64 x 175 weights are 175 blocks: the shards of two processes meet within one.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 175,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def write_model(folder: Path, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "real":
        data = os.environ.get("DYNRANK_DATA_DIR")
        if not data:
            pytest.skip("DYNRANK_DATA_DIR, the folder of real data, is not set")
        shutil.copytree(Path(data) / "tiny-llama" / "stories260K-hf", folder)
    elif kind == "qwen2":
        model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES, initializer_range=0.15))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        model.save_pretrained(folder)
    else:
        sizes = SIZES | ({"hidden_size": 72} if kind == "odd" else {})
        LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.15)).save_pretrained(folder)
        write_tokenizer(folder)


def write_recipe(
    folder: Path, kind: str = "llama", config: str = "zero3", checkpointing: bool = False, **model: Any
) -> None:
    write_model(folder / "model", kind)
    if config == "zero3_hpz":
        values = load_config(config, bf16=False)
        values["zero_optimization"]["zero_hpz_partition_size"] = PROCESSES
        config = str(folder / "hpz.json")
        Path(config).write_text(json.dumps(values))
    recipe = {
        "model": {"path": str(folder / "model"), "dtype": "fp32", "quantisation": "nf4", **model},
        "data": {"source": str(folder.parent / "data.jsonl")},
        "adapter": {"rank": 3},
        "method": {"name": "lora"},
        "train": {
            "steps": 6,
            "global_batch_size": 6,
            "learning_rate": 1e-2,
            "activation_checkpointing": checkpointing,
        },
        "deepspeed": {"config": config},
        "output": {"dir": str(folder / "run")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4")
    write_data(folder / "data.jsonl")
    names = [name for name in SETUPS if name != "nf4, real" or "DYNRANK_DATA_DIR" in os.environ]
    for name in names:
        write_recipe(folder / name, **SETUPS[name])
    run_worker(PROCESSES, "nf4", folder, *names)
    return folder


def single_process(folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of transformers' model with the same adapters."""
    recipe = load_recipe(str(folder / "recipe.yaml"))
    dtype = DTYPES[recipe.model.dtype]
    model = AutoModelForCausalLM.from_pretrained(
        recipe.model.path,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=recipe.model.double_quantisation,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,
        ),
        device_map={"": "cpu"},
    )
    factors = drawn_factors(model, recipe)
    modules = adapt(model.train(), recipe, factors.items())
    model.enable_input_require_grads()
    loss = SummedLoss(model)(**batch())
    loss.backward()
    gradients = {
        f"{name}.{factor}": parameter.grad.float()
        for name, module in modules.items()
        for factor, parameter in module.factors().items()
        if parameter.grad is not None
    }
    assert len(gradients) == 2 * len(modules) and len(modules) == len(factors)
    return loss.detach(), gradients


@pytest.mark.parametrize("name", SETUPS)
def test_loss_and_every_gradient_are_bit_for_bit_those_of_a_single_process(folder: Path, name: str) -> None:
    if not (folder / name).is_dir():
        pytest.skip("DYNRANK_DATA_DIR, the folder of real data, is not set")
    loss, gradients = single_process(folder / name)
    found = {key: torch.full((gradient.numel(),), torch.nan) for key, gradient in gradients.items()}
    for rank in range(PROCESSES):
        step = torch.load(folder / name / f"step-{rank}.pt", weights_only=True)
        assert torch.equal(step["loss"], loss) and torch.equal(step["evaluated"], loss)
        for key, (start, piece) in step["gradients"].items():
            found[key][start : start + len(piece)] = piece
    for key, gradient in gradients.items():
        assert gradient.abs().max() > 0
        assert torch.equal(found[key], gradient.flatten()), key


@pytest.mark.parametrize("name", SETUPS)
def test_under_zero_3_the_base_is_sharded_from_the_start_and_autograd_keeps_no_gathered_weight(
    folder: Path, name: str
) -> None:
    if not (folder / name).is_dir():
        pytest.skip("DYNRANK_DATA_DIR, the folder of real data, is not set")
    streamed = "ZeRO-" not in name and "64" not in name
    for whole, kept in zip(
        outcomes(folder / name, "whole", PROCESSES), outcomes(folder / name, "kept", PROCESSES), strict=True
    ):
        assert (whole == []) == streamed
        assert (kept == 0) == streamed


def test_a_run_in_nf4_resumes_and_its_adapter_is_merged_into_the_original_base(tmp_path: Path) -> None:
    write_data(tmp_path / "data.jsonl")
    write_recipe(tmp_path / "run-of-nf4", double_quantisation=True)
    recipe = tmp_path / "run-of-nf4" / "recipe.yaml"
    values = yaml.safe_load(recipe.read_text())
    values["method"] = {"name": "pe_dyra", "t_i": 1, "interval": 2, "t_f": 0, "k": 3}
    values["train"]["checkpoint_interval"] = 3
    recipe.write_text(yaml.safe_dump(values))
    run, stopped = recipe.parent / "run", recipe.parent / "stopped"
    train(2, recipe)
    copy_stopped(run, stopped, 3)
    train(2, recipe, f"output.dir={stopped}", "resume=auto")
    whole, resumed = (lines(folder / "metrics.jsonl") for folder in (run, stopped))
    assert [line["loss"] for line in whole] == [line["loss"] for line in resumed] and len(whole) == 6
    adjustments = lines(stopped / "ranks.jsonl")
    assert len(adjustments) == 2 and all(line["before"] != line["after"] for line in adjustments)

    base = recipe.parent / "model"
    merge_adapter(stopped / "adapter", None, tmp_path / "merged")
    tokens = batch()["input_ids"]
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(base)
        before = original(input_ids=tokens).logits
        expected = PeftModel.from_pretrained(original, stopped / "adapter")(input_ids=tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=tokens).logits
    assert (expected - before).abs().max() > 1e-3
    assert (merged - expected).abs().max() < 1e-4
