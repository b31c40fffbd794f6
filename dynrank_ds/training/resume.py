"""Resuming a run: its directory is locked, the newest undamaged checkpoint found, and what shapes the result compared.

A run is the same run while nothing that shapes its result has changed: model, tokenizer and data are compared by
fingerprints of their content, the recipe key by key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic_core import to_jsonable_python

from dynrank_ds.checkpoint import files
from dynrank_ds.checkpoint.content import check_content
from dynrank_ds.checkpoint.files import BEST, STEP
from dynrank_ds.checkpoint.reading import Checkpoint
from dynrank_ds.data.store import tokenizer_hash
from dynrank_ds.data.tokenising import TokenisedDataset
from dynrank_ds.errors import RunError
from dynrank_ds.export.base_model import model_hash
from dynrank_ds.recipe import Recipe
from dynrank_ds.training.agreement import check_same_everywhere
from dynrank_ds.training.model import fetch_model, load_tokenizer
from dynrank_ds.training.rundir import RunDirectory, check_output
from dynrank_ds.zero import processes

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
    "output": {"dir", "report_to", "log_batches"},
    "eval": {"tasks", "data_dir"},
}
"""Keys of the recipe that say where things lie or how they are computed, not what: model and data are compared by
content instead."""

FORMER_VALUES: dict[str, Any] = {"adapter.alpha": 8.0}
"""`section.key` of keys whose default is not how runs behaved that do not name them, with what they did."""


def fingerprints(recipe: Recipe, dataset: TokenisedDataset) -> dict[str, str]:
    """Return SHA-256 hashes of the base model, the tokenizer and the tokenised data, independent of their paths."""
    found = {
        "base model": model_hash(fetch_model(recipe.model.path)),
        "tokenizer": tokenizer_hash(load_tokenizer(recipe.model.path)),
        "tokenised data": data_hash(dataset),
    }
    if not isinstance(recipe.data.source, str):
        shares = str([one.share for one in recipe.data.source.values()])
        found["mixture of sources"] = hashlib.sha256(shares.encode()).hexdigest()
    return found


def data_hash(dataset: TokenisedDataset) -> str:
    """Hash every sample's length and number of targets, and at most a million tokens."""
    digest = hashlib.sha256()
    if len(dataset.source_of):
        digest.update(np.ascontiguousarray(dataset.source_of).data)
    for values in (
        dataset.lengths,
        dataset.target_counts,
        dataset.tokens[:: len(dataset.tokens) // 2**20 + 1],
    ):
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def lock_directory(
    directory: RunDirectory, resume: bool, current: Mapping[str, str], device: torch.device
) -> None:
    """Lock the run directory: from here on no other run changes it.

    current: `fingerprints` of this run.

    Raises:
        RunError: on every process: another run uses the directory, or the processes hold different models or data.
    """
    check_same_everywhere(current, device)
    refused = torch.tensor(float(processes.rank() == 0 and not directory.lock()), device=device)
    if processes.all_reduce_sum(refused) > 0:
        raise RunError(
            f"output.dir {directory.path} is in use by another run: wait for it or stop it, or give a new folder"
        )
    check_output(directory.path, resume)


def find_checkpoint(
    directory: RunDirectory, recipe: Recipe, current: Mapping[str, str], device: torch.device
) -> Checkpoint | None:
    """Return the newest undamaged checkpoint of this run, None where it has not written one yet.

    Damaged checkpoints are renamed, incomplete ones removed.

    Raises:
        RunError: the directory holds a run that differs from this one, or only damaged checkpoints, or is not shared.
    """
    folder, metadata = directory.path, directory.metadata()
    undamaged = {kind: files.newest_undamaged(folder, kind) for kind in (STEP, BEST)}
    # Each process has looked for itself: they must have seen the same folder before anything is renamed in it.
    seen = hashlib.sha256(f"{metadata} {undamaged}".encode()).hexdigest()
    if not processes.agree(seen, device):
        raise RunError(
            f"the processes see different checkpoints in {folder}: output.dir must be on a disk that all of them share"
        )
    if metadata is None:
        return None
    found = [Checkpoint(path) for path in undamaged.values() if path]
    for one in found:
        check_content(one.path, one.metadata)
    checkpoint = max(found, key=lambda checkpoint: checkpoint.progress.step, default=None)
    if checkpoint is None:
        _refuse_without_checkpoint(folder)
    before = metadata if checkpoint is None else checkpoint.metadata
    refuse_changes(folder if checkpoint is None else checkpoint.path, before, recipe, current)
    processes.barrier()
    if processes.rank() == 0:
        files.remove(files.incomplete_checkpoints(folder))
        for kind, path in undamaged.items():
            files.rename_damaged(files.complete_checkpoints(folder, kind), path)
    return checkpoint


def _refuse_without_checkpoint(folder: Path) -> None:
    if files.complete_checkpoints(folder) or files.complete_checkpoints(folder, BEST):
        raise RunError(
            f"every checkpoint in {folder} is damaged: give a new output.dir, or remove them to start from step 0"
        )
    if (folder / "adapter").exists():
        raise RunError(
            f"{folder} holds the adapter of a run but no checkpoint to resume from: give a new output.dir"
        )


def refuse_changes(path: Path, before: Mapping[str, Any], recipe: Recipe, current: Mapping[str, str]) -> None:
    """Compare the recipe and fingerprints that a checkpoint, or a run without one, holds with those of this run.

    A key that the recipe did not have then counts as the value that runs had then. `train.steps` may be raised where
    the steps before do not depend on it: a constant learning rate, warm-up in steps, and fixed ranks.

    Raises:
        RunError: naming everything that differs.
    """
    old, new = before["recipe"], recipe.model_dump(mode="json")
    differing = []
    for section, values in new.items():
        known = old.get(section, {})
        for key in sorted({*values, *known} - MAY_CHANGE.get(section, set())):
            then = known[key] if key in known else _value_then(recipe, section, key)
            if values.get(key) != then:
                differing.append(f"{section}.{key} is {values.get(key)!r}, was {then!r}")
    differing += [
        f"the {what} is a different one"
        for what, digest in current.items()
        if before["identity"].get(what, digest) != digest
    ]
    longer = _is_longer(recipe, old)
    if differing and not (longer and len(differing) == 1 and _begins_alike_at_any_length(recipe)):
        raise RunError(
            f"{path} cannot be resumed, since this run differs from it: {'; '.join(differing)}. "
            f"Set these back, or give a new output.dir{_TO_TRAIN_LONGER if longer else ''}"
        )


def _value_then(recipe: Recipe, section: str, key: str) -> Any:
    """Return the value that a run had for a key which its recipe does not know: by default the key's default."""
    path = f"{section}.{key}"
    if path in FORMER_VALUES:
        return FORMER_VALUES[path]
    fields = type(getattr(recipe, section)).model_fields
    if key not in fields or fields[key].is_required():
        return None
    return to_jsonable_python(fields[key].get_default(call_default_factory=True))


_TO_TRAIN_LONGER = (
    "; a run can be made longer only with train.schedule constant, train.warmup in steps and fixed ranks"
)


def _is_longer(recipe: Recipe, old: Mapping[str, Any]) -> bool:
    now, then = recipe.train.steps, old["train"]["steps"]
    return now is not None and then is not None and now > then


def _begins_alike_at_any_length(recipe: Recipe) -> bool:
    train = recipe.train
    return (
        train.schedule == "constant"
        and isinstance(train.warmup, int)
        and train.steps is not None
        and len(recipe.method.adjustments(train.steps)) == 0
    )
