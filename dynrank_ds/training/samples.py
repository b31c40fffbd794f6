"""The tokenised samples of a recipe, from the cache or the source, and the held-out ones among them."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from dynrank_ds.data import store
from dynrank_ds.data.batching import GlobalBatches, MixedBatches, draw_held_out
from dynrank_ds.data.formats import find_format
from dynrank_ds.data.sources import open_source, select
from dynrank_ds.data.text import Format
from dynrank_ds.data.tokenising import TokenisedDataset
from dynrank_ds.errors import DataError, RecipeError
from dynrank_ds.recipe import Recipe
from dynrank_ds.recipe_sections import DataSection, SourceSection
from dynrank_ds.training.model import load_tokenizer

logger = logging.getLogger(__name__)


def prepare_data(recipe: Recipe) -> tuple[TokenisedDataset, int]:
    """Return the tokenised samples and the token to pad with.

    What was tokenised before, with the same content, tokenizer and format, is taken from the cache, by every process
    of a machine; the source is not asked then, so that a hub is needed only the first time.

    Raises:
        DataError, ModelError, RecipeError: what is missing or malformed.
    """
    tokenizer = load_tokenizer(recipe.model.path)
    data, timeout = recipe.data, recipe.deepspeed.timeout
    # Not the padding token, which the model may have no embedding of (LLaMA-2); no other token ever sees padding.
    pad_id = tokenizer.eos_token_id
    if isinstance(data.source, str):
        return _prepare(data, tokenizer, timeout)[0], pad_id
    prepared = [_prepare(_alone(data, one), tokenizer, timeout) for one in data.source.values()]
    names = "+".join(entry.name for _, entry in prepared)
    joined = store.cache_folder() / "tokenised" / hashlib.sha256(names.encode()).hexdigest()[:32]
    with store.locked(joined, timeout) as missing:
        if missing:
            store.join(joined, [entry for _, entry in prepared])
    numbers = [np.full(len(dataset), number, np.int16) for number, (dataset, _) in enumerate(prepared)]
    return replace(store.read(joined)[0], source_of=np.concatenate(numbers)), pad_id


def _alone(data: DataSection, source: SourceSection) -> DataSection:
    """Return the section as it would be with this source alone."""
    own = {key: getattr(source, key) for key in ("source", "split", "revision", "filter", "limit")}
    other = {key: getattr(source, key) for key in ("format", "columns") if getattr(source, key) is not None}
    return data.model_copy(update=own | other)


def make_batches(dataset: TokenisedDataset, recipe: Recipe) -> GlobalBatches | MixedBatches:
    """Return which samples make up each step.

    Raises:
        DataError: a source has fewer samples than its share of a global batch.
    """
    batch, seed, source = recipe.train.global_batch_size, recipe.train.seed, recipe.data.source
    if isinstance(source, str):
        return GlobalBatches(len(dataset), batch, seed)
    sizes = np.bincount(dataset.source_of, minlength=len(source))
    for (name, one), size in zip(source.items(), sizes.tolist(), strict=True):
        if size < one.share * batch:
            raise DataError(
                f"data.source.{name} has {size} samples, fewer than its share {one.share:g} of a global batch of "
                f"{batch}"
            )
    total = sum(one.share for one in source.values())
    return MixedBatches(dataset.source_of, tuple(one.share / total for one in source.values()), batch, seed)


def _prepare(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, timeout: float
) -> tuple[TokenisedDataset, Path]:
    """Return the samples of one source, and their entry in the cache."""
    assert isinstance(data.source, str)
    format = find_format(data.format)
    _check_columns(data, format)
    folder = store.cache_folder()
    source = open_source(
        data.source, data.split, data.revision, data.streaming, data.limit, folder / "generated"
    )
    name = store.fingerprint(
        tokenizer,
        format,
        source=source.identity(),
        filter=data.filter,
        columns=data.columns,
        overflow=data.overflow,
        limit=data.limit,
        max_length=data.max_length,
    )
    entry = folder / "tokenised" / name
    with store.locked(entry, timeout) as missing:
        if missing:
            chosen = select(source.rows(), data.filter, data.limit)
            rows = (row.renamed(data.columns) for row in chosen)
            store.write(entry, rows, tokenizer, format, data.max_length, data.overflow == "truncate")
    dataset, drops = store.read(entry)
    if drops.n_rows == 0:
        passing = " that passes data.filter" if data.filter else ""
        raise DataError(f"{data.source}: the data set is empty, at least one row{passing} is needed")
    advice = drops.advice(dataset.lengths, data.max_length)
    drops.check(data.max_dropped, advice)
    if drops.n_dropped:
        logger.warning("%s and were dropped%s", drops.summary(), advice)
    if drops.n_truncated:
        logger.warning(
            "%d of %d rows were cut to the %d tokens of data.max_length, and lost the end of their answer",
            drops.n_truncated,
            drops.n_rows,
            data.max_length,
        )
    return dataset, entry


def _check_columns(data: DataSection, format: Format) -> None:
    """Refuse names that the format does not read, and columns given to two of them."""
    unknown = sorted(set(data.columns) - set(data.columns if format.fields is None else format.fields))
    if unknown:
        raise RecipeError(
            f"data.columns maps '{unknown[0]}', but data.format {data.format} reads {', '.join(format.fields or ())}"
        )


def split_held_out(dataset: TokenisedDataset, recipe: Recipe) -> tuple[TokenisedDataset, TokenisedDataset]:
    """Return the samples to train on, and those of data.held_out.

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


def described(dataset: TokenisedDataset) -> str:
    """Return the line about the data that commands print."""
    return (
        f"data        {len(dataset):,} samples, {int(dataset.lengths.sum()):,} tokens, "
        f"{int(dataset.target_counts.sum()):,} of them targets"
    )
