"""Random LLaMAs of chosen sizes, written as folders that every side loads like any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dynrank_ds.training.model import model_without_weights

TREND: dict[str, dict[str, int]] = {
    "llama-38m": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    # The shape of SmolLM2-360M.
    "llama-350m": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
}
"""Shapes; vocabulary and tokenizer are those of the recipe's model."""


def write_random(like: str, shape: dict[str, int], folder: Path) -> Path:
    """Write a random LLaMA of `shape` in bf16 to `folder`, with the tokenizer of the model `like`."""
    base = AutoConfig.from_pretrained(like)
    kept = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    values: dict[str, Any] = {**shape, **{name: getattr(base, name) for name in kept}}
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**values, tie_word_embeddings=True))
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return folder


def describe(path: str) -> dict[str, Any]:
    """Return name, number of parameters and shape of a model."""
    model = model_without_weights(path)
    shape = {name: getattr(model.config, name) for name in TREND["llama-38m"]}
    return {"name": Path(path).name, "parameters": sum(p.numel() for p in model.parameters()), **shape}
