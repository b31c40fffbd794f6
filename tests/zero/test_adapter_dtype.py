"""Triples in fp32 beside a base in bf16, under ZeRO-2 and 3, against PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from dynrank_ds.export import export_checkpoint
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.samples import prepare_data
from tests.support.launch import outcomes, run_worker
from tests.support.recipes import lines, write_recipe

STAGES = ("zero2", "zero3")
SAMPLES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA with fp32 triples on a bf16 base, and PE-DyRA with adjustments, in two processes under each stage."""
    folder = tmp_path_factory.mktemp("dtype")
    recipe = yaml.safe_load(write_recipe(folder, "bf16").read_text())
    recipe["adapter"]["dtype"] = "fp32"
    recipe["data"]["limit"] = SAMPLES
    recipe["train"] |= {"schedule": "constant", "warmup": 0, "checkpoint_interval": 1, "checkpoints_kept": 9}
    for stage in STAGES:
        recipe["deepspeed"] = {"config": stage}
        for name, method, steps in (
            ("lora", {"name": "lora"}, 2),
            ("pe_dyra", {"name": "pe_dyra", "t_i": 1, "interval": 2, "t_f": 2, "k": 5}, 9),
        ):
            run = {"method": method, "output": {"dir": str(folder / f"{name}-{stage}")}}
            values = {**recipe, **run, "train": {**recipe["train"], "steps": steps}}
            (folder / f"{name}-{stage}.yaml").write_text(yaml.safe_dump(values))
    run_worker(2, "adapter_dtype", folder)
    return folder


def test_only_the_triples_are_fp32(folder: Path) -> None:
    for dtypes in outcomes(folder, "dtypes", 2):
        assert list(dtypes) == list(STAGES)
        assert all(of == {"triples": ["torch.float32"], "base": ["torch.bfloat16"]} for of in dtypes.values())


def loss_and_gradient_norm(model: Any, folder: Path) -> tuple[float, float]:
    """Of the whole data, sample by sample, by the model's own forward."""
    dataset, _ = prepare_data(load_recipe(str(folder / "lora-zero3.yaml")))
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(dataset)):
        ids, targets = dataset.sample(i)
        tokens, chosen = torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(np.flatnonzero(targets))
        logits = model(input_ids=tokens[None]).logits[0, chosen - 1].float()
        total = total + F.cross_entropy(logits, tokens[chosen], reduction="sum").double()
    mean = total / int(dataset.target_counts.sum())
    mean.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert {g.dtype for g in gradients} == {torch.float32}
    return float(mean), float(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt())


@pytest.mark.parametrize("stage", STAGES)
def test_the_second_step_starts_from_loss_and_gradient_of_peft_with_its_fp32_adapter(
    stage: str, folder: Path
) -> None:
    run = folder / f"lora-{stage}"
    second = lines(run / "metrics.jsonl")[1]
    export_checkpoint(run / "checkpoints/step-1", folder / f"after-{stage}")
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, folder / f"after-{stage}", is_trainable=True)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    loss, norm = loss_and_gradient_norm(model, folder)
    print(f"loss {second['loss']:.6f} against {loss:.6f}, norm {second['grad_norm']:.5f} against {norm:.5f}")
    assert second["loss"] == pytest.approx(loss, rel=1e-5)
    assert second["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_both_stages_train_alike_and_keep_the_total_rank(folder: Path) -> None:
    losses = [
        [line["loss"] for line in lines(folder / f"pe_dyra-{stage}" / "metrics.jsonl")] for stage in STAGES
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    for stage in STAGES:
        changes = lines(folder / f"pe_dyra-{stage}" / "ranks.jsonl")
        assert len(changes) == 2
        assert all(sum(c["before"].values()) == sum(c["after"].values()) for c in changes)


def test_updates_below_a_step_of_bf16_count_at_once(folder: Path) -> None:
    """The exported weights are those that the next forward has: fp32, not their rounding to bf16."""
    weights = load_file(folder / "lora-zero3" / "adapter" / "adapter_model.safetensors")
    assert any((w.float() != w.bfloat16().float()).any() for w in weights.values())
