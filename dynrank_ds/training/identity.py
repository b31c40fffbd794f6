"""What makes a run the same run: a checkpoint is gone on with only where nothing that shapes the result has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dynrank_ds.data.store import tokenizer_hash
from dynrank_ds.data.tokenising import TokenisedDataset
from dynrank_ds.errors import RunError
from dynrank_ds.recipe import Recipe
from dynrank_ds.training.model import fetch_model, load_tokenizer

MAY_CHANGE = {
    "model": {"path", "attention"},
    "data": {"source", "split", "revision", "streaming", "max_dropped"},
    "train": {
        "micro_batch_size",
        "activation_checkpointing",
        "checkpoint_interval",
        "checkpoints_kept",
        "held_out_interval",
    },
    "deepspeed": {"config", "timeout"},
    "output": {"dir"},
    "eval": {"tasks", "data_dir"},
}
"""Keys of the recipe that say where things lie or how they are computed, not what: model and data are compared by
content instead."""

_SAMPLES, _SAMPLE_BYTES = 64, 4096


def identity(recipe: Recipe, dataset: TokenisedDataset) -> dict[str, str]:
    """Hashes of the base model, the tokenizer and the tokenised data, wherever they lie."""
    return {
        "base model": model_hash(fetch_model(recipe.model.path)),
        "tokenizer": tokenizer_hash(load_tokenizer(recipe.model.path)),
        "tokenised data": data_hash(dataset),
    }


def model_hash(folder: Path) -> str:
    """Of config.json, and of every weight file its size and 64 samples of 4 KiB: a 70B model takes a second."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for number in range(_SAMPLES):
                file.seek(number * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def data_hash(dataset: TokenisedDataset) -> str:
    """Of every sample's length and targets, and of a million tokens at most."""
    digest = hashlib.sha256()
    for values in (
        dataset.lengths,
        dataset.target_counts,
        dataset.tokens[:: len(dataset.tokens) // 2**20 + 1],
    ):
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def refuse_changes(path: Path, about: Mapping[str, Any], recipe: Recipe, now: Mapping[str, str]) -> None:
    """Compares what a checkpoint, or a run without one, says of its recipe and identity with these.

    Raises:
        RunError: with everything that differs.
    """
    before, after = about["recipe"], recipe.model_dump(mode="json")
    differing = [
        f"{section}.{key} is {values.get(key)!r}, was {before[section].get(key)!r}"
        for section, values in after.items()
        for key in sorted({*values, *before[section]} - MAY_CHANGE.get(section, set()))
        if values.get(key) != before[section].get(key)
    ]
    differing += [
        f"the {what} is another"
        for what, digest in now.items()
        if about["identity"].get(what, digest) != digest
    ]
    if differing:
        raise RunError(
            f"{path} cannot be gone on with, since this run differs from its own: {'; '.join(differing)}. "
            "Set that back, or give a new output.dir"
        )
