"""What a run is built of, apart from processes: shared by training and by `dynrank validate`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynrank_ds import dtypes
from dynrank_ds.adapters.heads import head_splits
from dynrank_ds.adapters.inject import inject
from dynrank_ds.adapters.linear import AdaptedModule
from dynrank_ds.data import store
from dynrank_ds.data.batching import draw_held_out
from dynrank_ds.data.formats import FORMATS
from dynrank_ds.data.sources import open_source, select
from dynrank_ds.data.tokenising import TokenisedDataset
from dynrank_ds.errors import DataError, RecipeError
from dynrank_ds.methods import build_method, method_class
from dynrank_ds.recipe import Recipe
from dynrank_ds.training.model import fetch_model, load_tokenizer, model_without_weights
from dynrank_ds.zero.config import load_config

logger = logging.getLogger(__name__)


def prepare_data(recipe: Recipe) -> tuple[TokenisedDataset, int]:
    """The tokenised samples and the token to pad with.

    What was tokenised before, with the same content, tokenizer and format, is taken from the cache, by every process
    of a machine; the source is not asked then, so that a hub is needed only the first time.

    Raises:
        DataError, ModelError, RecipeError: what is missing or malformed.
    """
    data = recipe.data
    if data.format not in FORMATS:
        raise RecipeError(f"data.format is '{data.format}': known are {', '.join(sorted(FORMATS))}")
    tokenizer = load_tokenizer(recipe.model.path)
    folder = store.cache_folder()
    source = open_source(
        data.source, data.split, data.revision, data.streaming, data.limit, folder / "generated"
    )
    name = store.fingerprint(
        tokenizer,
        FORMATS[data.format],
        source=source.identity(),
        filter=data.filter,
        limit=data.limit,
        max_length=data.max_length,
    )
    entry = folder / "tokenised" / name
    with store.locked(entry, recipe.deepspeed.timeout) as missing:
        if missing:
            rows = select(source.rows(), data.filter, data.limit)
            store.write(entry, rows, tokenizer, FORMATS[data.format], data.max_length)
    dataset, drops = store.read(entry)
    if drops.n_rows == 0:
        chosen = " that passes data.filter" if data.filter else ""
        raise DataError(f"{data.source}: the data set is empty, at least one row{chosen} is needed")
    drops.check(data.max_dropped)
    if drops.n_dropped:
        logger.warning("%s and were dropped", drops.told())
    # Not the padding token, which the model may have no embedding of (LLaMA-2); no other token ever sees padding.
    return dataset, tokenizer.eos_token_id


def split_held_out(dataset: TokenisedDataset, recipe: Recipe) -> tuple[TokenisedDataset, TokenisedDataset]:
    """The samples to train on, and those of data.held_out.

    Raises:
        RecipeError: none would be left to train on, or data.held_out is a share that holds no sample.
    """
    wanted = recipe.data.held_out
    count = wanted if isinstance(wanted, int) else round(wanted * len(dataset))
    if count >= len(dataset) or (wanted and not count):
        raise RecipeError(
            f"data.held_out is {wanted}, {count} of {len(dataset)} samples: give at least 1 and fewer than all"
        )
    trained, held_out = draw_held_out(len(dataset), count, recipe.train.seed)
    return dataset.select(trained), dataset.select(held_out)


def prepare(recipe: Recipe) -> str:
    """Fetches the model and tokenises the data, so that a run with HF_HUB_OFFLINE=1 finds both; says what there is.

    Raises:
        DataError, ModelError, RecipeError: what is missing or malformed.
    """
    model = fetch_model(recipe.model.path)
    dataset, _ = prepare_data(recipe)
    split_held_out(dataset, recipe)  # refused here, not on the machine without internet
    return "\n".join([f"model       {model}", _described(dataset), f"cache       {store.cache_folder()}"])


def _described(dataset: TokenisedDataset) -> str:
    return (
        f"data        {len(dataset):,} samples, {int(dataset.lengths.sum()):,} tokens, "
        f"{int(dataset.target_counts.sum()):,} of them targets"
    )


def adapt(
    model: PreTrainedModel, recipe: Recipe, restored: Iterable[tuple[str, Mapping[str, Tensor]]] = ()
) -> dict[str, AdaptedModule]:
    """Freezes the model and injects the recipe's adapters.

    restored: (module, {factor: weights}) that take the place of initial values.
    """
    section = recipe.adapter
    method = method_class(recipe.method)
    splits = head_splits(model.config) if method.per_head else {}
    modules = inject(
        model, section.targets, section.rank, section.scale, method.init, recipe.train.seed, splits
    )
    for name, factors in restored:
        modules[name].set_factors(factors)
    return modules


def _with_dtype_of_this_machine(recipe: Recipe) -> tuple[Recipe, str]:
    """The recipe as a run here would have it, and its dtype with the reason."""
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    device_type = "cpu" if on_cpu else "cuda"
    dtype, reason = dtypes.resolve_dtype(recipe.model.dtype, device_type)
    if warning := dtypes.slow_dtype_warning(dtype, device_type):
        logger.warning("model.dtype: %s", warning)
    return recipe.with_dtype(dtype), reason


def validate(recipe: Recipe) -> str:
    """Checks everything of a recipe that can be checked without processes, and says what a run would be.

    Raises:
        DynrankError: what cannot be run.
    """
    recipe, reason = _with_dtype_of_this_machine(recipe)
    load_config(recipe.deepspeed.config, recipe.model.dtype == "bf16")
    recipe.accumulation(world_size=1)
    dataset, held_out = split_held_out(prepare_data(recipe)[0], recipe)
    model = model_without_weights(recipe.model.path)
    modules = adapt(model, recipe)
    steps = recipe.total_steps(len(dataset))
    method = build_method(recipe.method, modules, steps, torch.device("meta"))
    trainable = sum(p.numel() for b in modules.values() for p in b.factors().values())
    base = sum(p.numel() for p in model.parameters()) - trainable
    linears = len({module.part.linear if module.part else name for name, module in modules.items()})
    return "\n".join(
        [
            f"model       {recipe.model.path}: {base:,} parameters, in {reason}",
            _described(dataset) + (f"; {len(held_out):,} more are held out" if len(held_out) else ""),
            f"adapter     {linears} linears, total rank {recipe.adapter.rank * len(modules)}, "
            f"{trainable:,} trainable parameters ({trainable / base:.3%})",
            f"method      {recipe.method.name}: {method.planned_adjustments()} adjustments in {steps} steps",
        ]
    )
