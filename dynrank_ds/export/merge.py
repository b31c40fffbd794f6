"""An adapter merged into its base model, tensor by tensor."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dynrank_ds.errors import ModelError, RunError
from dynrank_ds.export.base_model import BaseModel, find_base, model_hash, stored_modules
from dynrank_ds.export.folder import read_record, staged_folder
from dynrank_ds.export.peft_adapter import PeftAdapter, Update
from dynrank_ds.tensorfile import TensorEntry, TensorFileReader, TensorFileWriter

logger = logging.getLogger(__name__)

_MERGEABLE = (torch.float32, torch.bfloat16, torch.float16)
# Elements whose fp32 copies exist at one time. Smaller pieces spend their time on waking threads: on a busy
# 2-core machine a fourth of this took three times as long.
_ELEMENTS_AT_ONCE = 1 << 22


def merge_adapter(
    adapter: Path, base: str | None, output: Path, workers: int = 1, force: bool = False
) -> None:
    """Write the Hugging Face model whose weights are W + (alpha / r) B A, under the base's file names.

    The sum is computed in fp32 and stored in the base's dtype. At no time does memory hold more than the
    largest tensor, one module's factors and some 60 MB of scratch space, for each worker.

    Args:
        adapter: the folder of a PEFT LoRA adapter.
        base: folder or hub id of the base model; None takes the one that the adapter names.
        output: a folder that is new, empty, or an earlier merge of the same adapter and base.
        workers: files of the base that are merged at one time, by threads.
        force: merge into a base that is not the one that the adapter was trained on, with a warning.

    Raises:
        RunError: for an adapter that is missing, not plain LoRA, not finite or without any effect, and an
            output folder of something else.
        ModelError: for a base that is missing, quantised, has no such modules as the adapter's, or has another hash
            than the one that the adapter was trained on.
    """
    if workers < 1:
        raise RunError(f"--workers is {workers}: give at least 1")
    with PeftAdapter(adapter) as source:
        name = base or source.base_model
        if not name:
            raise RunError(f"{adapter} does not name its base model: name it with --base")
        model = find_base(name)
        modules = stored_modules(model, source.modules)
        _check_targets(source, model, modules)
        _check_hash(adapter, model, force)
        record = {
            "adapter": str(adapter.resolve()),
            "base": str(Path(name).resolve()) if Path(name).is_dir() else name,
        }

        def same(there: Mapping[str, Any]) -> bool:
            return all(there.get(key) == value for key, value in record.items())

        with staged_folder(output, record, same, (adapter, model.folder)) as folder:
            for companion in model.companions:
                shutil.copyfile(model.folder / companion, folder / companion)
            _merge_shards(adapter, model, modules, folder, workers)


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


def _merge_shards(
    adapter: Path, model: BaseModel, modules: Mapping[str, str], folder: Path, workers: int
) -> None:
    total = sum((model.folder / shard).stat().st_size for shard in model.shards)
    with (
        tqdm(total=total, desc="merge", unit="B", unit_scale=True) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):

        def merge(shard: str) -> int:
            return _merge_shard(adapter, model.folder / shard, modules, folder / shard, bar)

        futures = [pool.submit(merge, shard) for shard in model.shards]
        try:
            changed = sum(future.result() for future in futures)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if changed == 0:
        raise RunError(f"No weight of {model.folder} changes at its precision: the adapter changes nothing")
    logger.info("merged: %d modules changed their weight", changed)


def _merge_shard(
    adapter: Path, source: Path, modules: Mapping[str, str], path: Path, bar: "tqdm[Any]"
) -> int:
    """Write the merged copy of one file; returns how many of its tensors differ from the base's."""
    changed = 0
    with (
        PeftAdapter(adapter) as updates,
        TensorFileReader(source) as reader,
        TensorFileWriter(path, list(reader.entries.values()), reader.metadata) as writer,
    ):
        for entry in reader.entries.values():
            changed += _merge_tensor(updates, entry.name, modules[entry.name], reader, writer)
            bar.update(entry.nbytes)
    return changed


def _merge_tensor(
    adapter: PeftAdapter, name: str, module: str, reader: TensorFileReader, writer: TensorFileWriter
) -> bool:
    """Copy one tensor with what the adapter adds to it; returning frees it before the next one is read."""
    if module not in adapter.modules:
        writer.copy(name, reader)
        return False
    tensor = reader.read(name)
    changed = _add(tensor, adapter.update(module))
    writer.write(name, tensor)
    return changed


def _add(weight: torch.Tensor, update: Update) -> bool:
    """Add the update to `weight` (out, in) in place, some rows at a time; tells whether any value changed."""
    changed = False
    # One piece of memory for all rows: new memory each time costs more than the arithmetic.
    scratch = torch.empty(_rows_at_once(weight), weight.shape[1])
    for rows in _slices(weight):
        merged = scratch[: len(weight[rows])].copy_(weight[rows])
        merged.addmm_(update.b[rows], update.a, alpha=update.scale)
        # Compared until a difference is found, which is mostly in the first rows.
        changed = changed or not torch.equal(merged.to(weight.dtype), weight[rows])
        weight[rows] = merged
    return changed


def _rows_at_once(weight: torch.Tensor) -> int:
    return min(len(weight), max(1, _ELEMENTS_AT_ONCE // weight.shape[1]))


def _slices(weight: torch.Tensor) -> Iterator[slice]:
    rows = _rows_at_once(weight)
    for start in range(0, weight.shape[0], rows):
        yield slice(start, start + rows)
