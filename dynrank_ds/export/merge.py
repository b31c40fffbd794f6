"""An adapter merged into its base model, tensor by tensor."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dynrank_ds.base_weights import BaseWeights
from dynrank_ds.errors import ModelError, RunError
from dynrank_ds.export.base_model import BaseModel, find_base, loaded_names, model_hash, stored_modules
from dynrank_ds.export.folder import read_record, staged_folder
from dynrank_ds.export.merging import Merge, MergedWeights, Nf4Base, StoredWeights
from dynrank_ds.export.nf4_base import nf4_modules, nf4_settings
from dynrank_ds.export.peft_adapter import PeftAdapter
from dynrank_ds.export.probe import Difference, ProbeError, logit_difference
from dynrank_ds.tensorfile import TensorEntry, TensorFileReader

logger = logging.getLogger(__name__)

_MERGEABLE = (torch.float32, torch.bfloat16, torch.float16)


def merge_adapter(
    adapter: Path,
    base: str | None,
    output: Path,
    workers: int = 1,
    force: bool = False,
    match_quantised_base: bool = False,
) -> Difference | None:
    """Write the Hugging Face model whose weights are W + (alpha / r) B A, under the base's file names.

    Rows of weights that are decomposed are scaled to the adapter's magnitudes. The sum is computed in fp32 and stored
    in the base's dtype. At no time does memory hold more than the largest tensor, one module's factors and some 60 MB
    of scratch space, for each worker.

    Args:
        adapter: the folder of a PEFT LoRA or DoRA adapter.
        base: folder or hub id of the base model; None takes the one that the adapter names.
        output: a folder that is new, empty, or an earlier merge of the same adapter and base.
        workers: files of the base that are merged at one time, by threads.
        force: merge into a base that is not the one that the adapter was trained on, with a warning.
        match_quantised_base: take as W what an adapter that was trained in NF4 saw, the quantised layers dequantised;
            without it the base as it is stored.

    Returns:
        Of an adapter that was trained in NF4, how far the merged model's logits are from those of training's base with
        the adapter; None for others, and for models whose weights cannot be compared one by one.

    Raises:
        RunError: for an adapter that is missing, neither plain LoRA nor DoRA, not finite or without any effect, one
            that was not trained in NF4 with `match_quantised_base`, and an output folder of something else.
        ModelError: for a base that is missing, quantised, has no such modules as the adapter's, or has another hash
            than the one that the adapter was trained on.
    """
    if workers < 1:
        raise RunError(f"--workers is {workers}: give at least 1")
    with PeftAdapter(adapter) as source:
        name = base or source.base_model
        if not name:
            raise RunError(f"{adapter} does not name its base model: name it with --base")
        trained_in = nf4_settings(read_record(adapter))
        if match_quantised_base and trained_in is None:
            raise RunError(
                f"--match-quantised-base is given, but no dynrank.json of {adapter} says that it was trained on a base "
                "in NF4: merge without it"
            )
        model = find_base(name)
        modules = stored_modules(model, source.modules)
        _check_targets(source, model, modules)
        _check_hash(adapter, model, force)
        nf4 = Nf4Base(trained_in, nf4_modules(model, trained_in)) if trained_in else None
        merge = Merge(adapter, model, modules, nf4 if match_quantised_base else None)
        record = {
            "adapter": str(adapter.resolve()),
            "base": str(Path(name).resolve()) if Path(name).is_dir() else name,
            **({"match_quantised_base": True} if match_quantised_base else {}),
        }

        def same(there: Mapping[str, Any]) -> bool:
            return all(there.get(key) == value for key, value in record.items())

        with staged_folder(output, record, same, (adapter, model.folder)) as folder:
            for companion in model.companions:
                shutil.copyfile(model.folder / companion, folder / companion)
            merge.write(folder, workers)
        return _probe(Merge(adapter, model, modules, nf4), output) if nf4 else None


def _probe(as_trained: Merge, merged: Path) -> Difference | None:
    """Compare the merged weights with the exact sums of what training saw."""
    try:
        with MergedWeights(as_trained) as left, BaseWeights(merged) as right:
            names = loaded_names(as_trained.model.folder, list(right.entries))
            return logit_difference(as_trained.model.folder, names, left, StoredWeights(right))
    except ProbeError as error:
        logger.warning("the logits of the merged model were not compared with those of training: %s", error)
        return None


def _check_targets(adapter: PeftAdapter, model: BaseModel, modules: Mapping[str, str]) -> None:
    """Refuse, before anything is written, an adapter that does not fit the base."""
    missing = dict(adapter.modules)
    for shard in model.shards:
        with TensorFileReader(model.folder / shard) as reader:
            for entry in reader.entries.values():
                shape = missing.pop(modules[entry.name], None)
                if shape is not None:
                    _check_target(entry, shape, model)
    if missing:
        raise ModelError(
            f"{model.folder} has no weight {next(iter(missing))}.weight, which the adapter changes "
            f"({len(missing)} of {len(adapter.modules)} modules are missing): is it the adapter's base model?"
        )


def _check_target(entry: TensorEntry, shape: tuple[int, int], model: BaseModel) -> None:
    if entry.shape != shape:
        raise ModelError(
            f"{model.folder}: {entry.name} has shape {entry.shape}, the adapter's module {shape}: "
            "is it the adapter's base model?"
        )
    if entry.dtype not in _MERGEABLE:
        raise ModelError(
            f"{model.folder}: {entry.name} is stored as {entry.dtype}: name a base in 16 or 32 bits"
        )
    if model.tied and entry.name == "lm_head.weight":
        raise ModelError(
            f"{model.folder} ties lm_head to the embedding (tie_word_embeddings): "
            "a merged lm_head would be ignored on loading"
        )


def _check_hash(adapter: Path, model: BaseModel, force: bool) -> None:
    """Refuse a base that is not the one that `dynrank export` recorded; adapters of others record none."""
    trained_on = read_record(adapter).get("base_model_hash")
    if trained_on is None or model_hash(model.folder) == trained_on:
        return
    message = f"{adapter} was trained on another base than {model.folder}: their hashes differ"
    if not force:
        raise ModelError(f"{message}; name the right one with --base, or merge all the same with --force")
    logger.warning("%s", message)
