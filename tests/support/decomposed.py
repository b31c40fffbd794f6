"""Plain training with PEFT's DoRA, and the model of a checkpoint, to compare weight-decomposed runs with."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from dynrank_ds.adapters.initial import lora_factors, module_generator
from dynrank_ds.checkpoint.reading import Checkpoint
from dynrank_ds.data.batching import GlobalBatches
from dynrank_ds.recipe import Recipe, load_recipe
from dynrank_ds.training.model import adapt
from dynrank_ds.training.samples import prepare_data


def peft_losses(recipe: Recipe, rates: list[float]) -> list[float]:
    """Losses of PEFT's DoRA under torch's AdamW in one process, a sample at a time, from our initial factors."""
    section = recipe.adapter
    model = _peft_model(recipe)
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            sides = (layer.in_features, layer.out_features)
            drawn = lora_factors(section.rank, *sides, module_generator(recipe.train.seed, name, 0))
            layer.lora_A["default"].weight.data.copy_(drawn["lora_A"])
    dataset, _ = prepare_data(recipe)
    batches = GlobalBatches(len(dataset), recipe.train.global_batch_size, recipe.train.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, eps=recipe.train.eps, weight_decay=0.0)
    losses = []
    for step, rate in enumerate(rates):
        samples = [dataset.sample(index) for index in batches.indices(step)]
        targets = sum(len(sample.ids) - sample.n_prompt for sample in samples)
        total = 0.0
        for sample in samples:
            ids = torch.tensor(sample.ids.tolist())
            logits = model(input_ids=ids[None]).logits[0, sample.n_prompt - 1 : -1]
            loss = F.cross_entropy(logits, ids[sample.n_prompt :], reduction="sum") / targets
            loss.backward()
            total += float(loss)
        losses.append(total)
        nn.utils.clip_grad_norm_(trained, recipe.train.max_grad_norm)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _peft_model(recipe: Recipe) -> PeftModel:
    section = recipe.adapter
    config = LoraConfig(
        r=section.rank, lora_alpha=section.alpha, target_modules=list(section.targets), use_dora=True
    )
    base = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32)
    model: PeftModel = get_peft_model(base, config)
    return model.train()


def trained_model(recipe_file: Path, checkpoint: Path) -> PreTrainedModel:
    """The base with the adapter of a checkpoint, in this process, as training computes it."""
    recipe = load_recipe(str(recipe_file))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32)
    saved = Checkpoint(checkpoint)
    adapt(model, recipe, saved.factors(), saved.initial_ranks())
    return model.eval()
