"""Models of any size written to several safetensors files one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from dynrank_ds.tensorfile import TensorEntry, TensorFileWriter


def write_sharded(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, files: int, spread: float = 0.02
) -> dict[str, int]:
    """A model of that configuration with weights of that spread; returns the bytes of every tensor."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    entries = [TensorEntry(name, dtype, tuple(p.shape)) for name, p in model.named_parameters()]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    pool = torch.randn(1 << 20).mul_(spread).to(dtype)  # drawing all would take longer than all else
    map_of = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        some = entries[number::files]
        with TensorFileWriter(folder / file, some) as writer:
            for entry in some:
                map_of[entry.name] = file
                writer.write(entry.name, _weights(entry, pool))
    index = {"metadata": {}, "weight_map": map_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {entry.name: entry.nbytes for entry in entries}


def _weights(entry: TensorEntry, pool: torch.Tensor) -> torch.Tensor:
    if len(entry.shape) == 1:
        return torch.ones(entry.shape, dtype=entry.dtype)  # of normalisations
    numel = entry.nbytes // entry.dtype.itemsize
    turned = pool.roll(hash_of(entry.name) % len(pool))
    return turned.repeat(-(-numel // len(pool)))[:numel].view(entry.shape)


def hash_of(name: str) -> int:
    """The same in every process, unlike `hash`."""
    return sum(ord(letter) * (place + 1) ** 3 for place, letter in enumerate(name))
