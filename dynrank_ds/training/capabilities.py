"""One line that says what a run computes with on this machine."""

from __future__ import annotations

from importlib.metadata import version

import torch
from transformers import PreTrainedModel

from dynrank_ds.recipe import Recipe
from dynrank_ds.training.attention import choose_attention
from dynrank_ds.training.loss import SummedLoss


def describe_capabilities(recipe: Recipe, loss: SummedLoss, world_size: int, device: torch.device) -> str:
    """Return dtype, device, attention kernel, quantisation, recomputation and rows of logits of a loaded model.

    recipe: with model.dtype bf16 or fp32.
    """
    model: PreTrainedModel = loss.model
    backend = torch.distributed.get_backend()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    _, reason = choose_attention(recipe.model, model.config, device)
    parts = [
        f"{recipe.model.dtype} in {world_size} process{'es' * (world_size > 1)} ({name}, {backend})",
        f"attention {model.config._attn_implementation} ({reason})",
        f"logits of at most {loss.cross_entropy.rows:,} tokens at a time",
    ]
    if recipe.train.activation_checkpointing:
        parts.append("activations recomputed in backward")
    if recipe.model.quantisation:
        double = ", doubly quantised" if recipe.model.double_quantisation else ""
        parts.append(f"base in {recipe.model.quantisation}{double} (bitsandbytes {version('bitsandbytes')})")
    return "; ".join(parts)
