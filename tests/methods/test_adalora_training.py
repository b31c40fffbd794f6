"""A whole training run with AdaLoRA against PEFT's AdaLoRA trained in the order that its documentation shows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from dynrank_ds.adapters.initial import module_generator, svd_factors
from dynrank_ds.data.batching import GlobalBatches
from dynrank_ds.data.collating import PaddedCollator
from dynrank_ds.recipe import Recipe, load_recipe
from dynrank_ds.training.samples import prepare_data
from tests.support.launch import train
from tests.support.recipes import STEPS, lines, write_recipe

RANK, TARGET, ALPHA, T_F = 6, 4, 24.0, 6
MAX_NORM = 0.1  # reached from about the 8th step on
METHOD = {
    "name": "adalora",
    "observe": "after_step",
    "target_rank": TARGET,
    "t_i": 2,
    "interval": 3,
    "t_f": T_F,
}


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_recipe(tmp_path_factory.mktemp("adalora"))
    recipe = yaml.safe_load(path.read_text())
    # PEFT's penalty goes on seeing triples after the final mask, so the run is compared without it.
    recipe["method"] = {**METHOD, "orthogonality": 0.0}
    recipe["adapter"] = {"rank": RANK, "alpha": ALPHA}
    recipe["train"] |= {"schedule": "constant", "warmup": 0, "weight_decay": 0.01, "max_grad_norm": MAX_NORM}
    path.write_text(yaml.safe_dump(recipe))
    return path


class Model(nn.Module):
    """A causal language model whose loss is the mean over the batch's target tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: Any) -> SimpleNamespace:
        logits = self.inner(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return SimpleNamespace(
            loss=cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        )


def peft_training(recipe: Recipe) -> tuple[list[float], dict[int, dict[str, list[int]]]]:
    """Losses of all steps, and after each step with a mask the masked triples of every module."""
    dataset, pad_id = prepare_data(recipe)
    config = AdaLoraConfig(
        init_r=RANK,
        target_r=TARGET,
        tinit=METHOD["t_i"],
        tfinal=T_F,
        deltaT=METHOD["interval"],
        total_step=STEPS,
        lora_alpha=ALPHA * (1 + 1e-5 / RANK),  # type: ignore[arg-type] - PEFT divides by rank + 1e-5
        orth_reg_weight=0.0,
        target_modules=list(recipe.adapter.targets),
    )
    base = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32)
    model = get_peft_model(Model(base), config).base_model
    layers = {n.removeprefix("model.inner."): m for n, m in model.named_modules() if hasattr(m, "lora_E")}
    for name, layer in layers.items():
        drawn = svd_factors(RANK, layer.in_features, layer.out_features, module_generator(0, name, 0))
        layer.lora_A["default"].data.copy_(drawn["lora_A"])
        layer.lora_B["default"].data.copy_(drawn["lora_B"].T)
    trained = [p for p in model.parameters() if p.requires_grad]
    rate, eps = recipe.train.learning_rate, recipe.train.eps
    optimizer = torch.optim.AdamW(trained, lr=rate, eps=eps, weight_decay=0.01)
    batches = GlobalBatches(len(dataset), recipe.train.global_batch_size, 0)
    losses, masked = [], {}
    for global_step in range(STEPS):
        loss: Tensor = model(PaddedCollator(pad_id).collate(dataset, batches.indices(global_step))).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        model.update_and_allocate(global_step)
        optimizer.zero_grad()
        gone = {
            n: (m.lora_E["default"] == 0).flatten().nonzero().flatten().tolist() for n, m in layers.items()
        }
        if any(gone.values()):
            masked[global_step + 1] = {name: triples for name, triples in gone.items() if triples}
    return losses, masked


@pytest.mark.slow
def test_observed_after_the_step_a_run_is_pefts_and_what_it_masks_last_is_removed(recipe_file: Path) -> None:
    train(1, recipe_file)
    run = recipe_file.parent / "run"
    losses, masked = peft_training(load_recipe(str(recipe_file)))
    final = STEPS - T_F + 1
    adjustments = lines(run / "ranks.jsonl")
    assert [line["step"] for line in adjustments] == [4, 7, 10, 13, final]
    for line in adjustments:
        assert line["masked" if line["step"] < final else "pruned"] == masked[line["step"]]
    assert sum(map(len, masked[final].values())) == (RANK - TARGET) * 14
    # From here on PEFT clips by a norm that counts the gradients of masked triples too.
    trained = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    differences = [abs(a - b) for a, b in zip(trained, losses, strict=True)]
    print(
        f"largest loss difference {max(differences[: final + 1]):.2e}, after the final mask {max(differences):.2e}"
    )
    assert max(differences[: final + 1]) <= 2e-6
