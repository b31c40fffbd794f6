"""Losses by plain single-process PyTorch and PEFT, without DeepSpeed or a collator: what runs are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from dynrank_ds.bench.contenders import PeftAlone
from dynrank_ds.data.tokenising import TokenisedDataset
from dynrank_ds.recipe import Recipe
from dynrank_ds.training.model import DTYPES
from dynrank_ds.training.quantisation import quantisation_config
from dynrank_ds.training.samples import make_batches, prepare_data


def lora_losses(recipe: Recipe, device: torch.device) -> list[float]:
    """Train PEFT's LoRA with torch's AdamW on the recipe's batches, one sample at a time; return each step's loss.

    recipe: of LoRA at a constant learning rate.
    """
    contender = PeftAlone("plain", recipe, (), 0)
    model = contender.model().to(device)
    optimizer = contender.optimizer(model)
    dataset, _ = prepare_data(recipe)
    batches = make_batches(dataset, recipe)
    found = []
    for step in range(recipe.train.steps or 0):
        indices = batches.indices(step)
        found.append(mean_loss(model, dataset, indices, device, backward=True))
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, recipe.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return found


def first_losses(recipe: Recipe, adapter: Path, merged: Path, device: torch.device) -> dict[str, float]:
    """Return the loss of the first global batch by the base, in NF4 too, by PEFT's adapter and by the merged model."""
    dataset, _ = prepare_data(recipe)
    indices = make_batches(dataset, recipe).indices(0)

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            return mean_loss(model.eval(), dataset, indices, device)

    section = recipe.model.model_copy(update={"quantisation": "nf4", "double_quantisation": True})
    nf4 = quantisation_config(section, DTYPES[section.dtype])
    found = {
        "nf4": loss(_load(recipe.model.path, recipe, quantization_config=nf4, device_map={"": device})),
        "merged": loss(_load(str(merged), recipe).to(device)),
    }
    base = _load(recipe.model.path, recipe).to(device)
    found["base"] = loss(base)
    found["peft"] = loss(PeftModel.from_pretrained(base, adapter))
    return found


def _load(path: str, recipe: Recipe, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=DTYPES[recipe.model.dtype], attn_implementation=recipe.model.attention, **options
    )


def mean_loss(
    model: nn.Module,
    dataset: TokenisedDataset,
    indices: Any,
    device: torch.device,
    backward: bool = False,
) -> float:
    """Return the mean over the targets of the samples `indices`, each by the model's forward on it alone.

    backward: add its gradient to the model's.
    """
    n_targets = int(dataset.target_counts[indices].sum())
    total = 0.0
    for index in indices:
        ids, targets = dataset.sample(int(index))
        tokens: Tensor = torch.from_numpy(ids.astype(np.int64)).to(device)
        chosen = torch.from_numpy(np.flatnonzero(targets)).to(device)
        logits = model(input_ids=tokens[None]).logits[0, chosen - 1]
        part = F.cross_entropy(logits.float(), tokens[chosen], reduction="sum") / n_targets
        if backward:
            part.backward()
        total += float(part.detach())
    return total
