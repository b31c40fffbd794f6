"""What `dynrank plan` counts against the peak that the GPU's allocator counted: what the plans of 70B rest on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dynrank_ds.planning.activations import MicroBatch
from dynrank_ds.planning.architecture import describe
from dynrank_ds.planning.memory import memory
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.samples import prepare_data
from dynrank_ds.zero.config import load_config
from launcher.gpu_check.outcome import CheckFailedError, NotHereError
from launcher.gpu_check.setting import Setting

_TOLERANCE = 0.1
_TOKENS = 512
_SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
"""Of TinyLlama: 1.1 B parameters."""
# As of a model of tens of gigabytes, most of which is not kept from forward to backward.
_SMALL_BUFFERS = {"stage3_max_reuse_distance": 20_000_000, "stage3_prefetch_bucket_size": 20_000_000}


def check_planned_memory(setting: Setting) -> str:
    """Two steps of LoRA on a random model of 1.1 B parameters, in bf16 and in NF4."""
    if setting.device == "cpu":
        raise NotHereError("on CPUs tests/planning/test_memory.py compares plans with real runs")
    model, data = setting.folder / "one-billion", setting.folder / "long.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(setting.model)
    _write(model, data, tokenizer)
    config = setting.config_file("zero3", **_SMALL_BUFFERS)
    ratios = {}
    for name, quantised in (("bf16", {}), ("nf4", {"quantisation": "nf4", "double_quantisation": True})):
        path = setting.recipe(
            f"memory-{name}",
            model={"path": str(model), **quantised},
            data={"source": str(data), "max_length": _TOKENS, "overflow": "truncate"},
            method={"name": "lora"},
            train={"steps": 2, "micro_batch_size": 2, "global_batch_size": 4 * setting.processes},
            deepspeed={"config": config},
        )
        setting.work(f"memory-{name}", "run", str(path))
        measured = max(float(line["memory_gib"]) for line in setting.metrics(f"memory-{name}"))
        ratios[name] = planned_bytes(path, setting.processes) / (measured * 2**30)
    text = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
    if not all(abs(ratio - 1) <= _TOLERANCE for ratio in ratios.values()):
        raise CheckFailedError(f"planned over measured: {text}; within {_TOLERANCE:.0%} is allowed")
    return f"planned over measured: {text}"


def planned_bytes(path: Path, processes: int) -> int:
    """Return the planned bytes of a process's tensors, for the largest micro-batch of the recipe's data."""
    recipe = load_recipe(str(path))
    dataset, _ = prepare_data(recipe)
    size = recipe.train.micro_batch_size
    batch = MicroBatch(size, int(dataset.lengths.max()), size * int(dataset.target_counts.max()))
    architecture = describe(recipe)
    zero: dict[str, Any] = load_config(recipe.deepspeed.config, bf16=True)["zero_optimization"]
    trainable = architecture.trainable_parameters
    return memory(recipe, architecture, zero, processes, batch, trainable, 0).parts.total


def _write(model: Path, data: Path, tokenizer: Any) -> None:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=2 * _TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        **_SIZES,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(config).save_pretrained(model)
    finally:
        torch.set_default_dtype(before)
    tokenizer.save_pretrained(model)
    # Cut to the same length, all of them.
    rows = [
        {"query": f"Count from {n}.", "response": " ".join(map(str, range(n, n + 600)))} for n in range(64)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
