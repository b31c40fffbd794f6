"""The tokenised samples of a recipe, from the cache or the source, and the held-out ones among them."""

from __future__ import annotations

import logging

from dynrank_ds.data import store
from dynrank_ds.data.batching import draw_held_out
from dynrank_ds.data.formats import find_format
from dynrank_ds.data.sources import open_source, select
from dynrank_ds.data.text import Format
from dynrank_ds.data.tokenising import TokenisedDataset
from dynrank_ds.errors import DataError, RecipeError
from dynrank_ds.recipe import DataSection, Recipe
from dynrank_ds.training.model import load_tokenizer

logger = logging.getLogger(__name__)


def prepare_data(recipe: Recipe) -> tuple[TokenisedDataset, int]:
    """Return the tokenised samples and the token to pad with.

    What was tokenised before, with the same content, tokenizer and format, is taken from the cache, by every process
    of a machine; the source is not asked then, so that a hub is needed only the first time.

    Raises:
        DataError, ModelError, RecipeError: what is missing or malformed.
    """
    data = recipe.data
    format = find_format(data.format)
    _check_columns(data, format)
    tokenizer = load_tokenizer(recipe.model.path)
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
    with store.locked(entry, recipe.deepspeed.timeout) as missing:
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
    # Not the padding token, which the model may have no embedding of (LLaMA-2); no other token ever sees padding.
    return dataset, tokenizer.eos_token_id


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
