"""How fast rows are tokenised, global batches made, and how much of them is padding."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import cycle, islice
from unittest.mock import patch

import numpy as np

from dynrank_ds.bench.figures import Figure
from dynrank_ds.data import store
from dynrank_ds.data.batching import GlobalBatches
from dynrank_ds.data.collating import Collator, PackedCollator, PaddedCollator
from dynrank_ds.data.formats import find_format
from dynrank_ds.data.rows import Drops, Row
from dynrank_ds.data.sources import open_source
from dynrank_ds.data.tokenising import TokenisedDataset, tokenise
from dynrank_ds.errors import RecipeError
from dynrank_ds.recipe import Recipe
from dynrank_ds.training.model import load_tokenizer
from dynrank_ds.training.samples import prepare_data

GLOBAL_BATCH, MICRO_BATCH, PROCESSES = 128, 4, 8


def measure_data(recipe: Recipe, quick: bool) -> Iterator[Figure]:
    """Yield (what, figure) of the recipe's tokenizer and rows, which are repeated to 512 (quick) or 8,192."""
    data = recipe.data
    generated = store.cache_folder() / "generated"
    if not isinstance(data.source, str):
        raise RecipeError("this bench measures one source: give data.source a path or an id")
    source = open_source(data.source, data.split, data.revision, data.streaming, data.limit, generated)
    rows = list(islice(source.rows(), data.limit or 4096))
    rows = list(islice(cycle(rows), 512 if quick else 8192))
    for parallel, cores in (("false", "one core"), ("true", f"{os.cpu_count()} cores")):
        with patch.dict(os.environ, {"TOKENIZERS_PARALLELISM": parallel}):
            yield Figure(f"tokenising, {cores}", _tokenising_rate(recipe, rows))
    dataset, pad_id = prepare_data(recipe)
    for name, collator in (("grouped by length", PaddedCollator(pad_id)), ("packed", PackedCollator())):
        yield from _collator_figures(name, collator, dataset, steps=5 if quick else 50)


def _tokenising_rate(recipe: Recipe, rows: list[Row]) -> str:
    tokenizer = load_tokenizer(recipe.model.path)
    started = time.perf_counter()
    chunks = tokenise(rows, tokenizer, find_format(recipe.data.format), recipe.data.max_length, Drops())
    tokens = sum(len(sample.ids) for chunk in chunks for sample in chunk)
    seconds = time.perf_counter() - started
    return f"{len(rows) / seconds:,.0f} rows/s, {tokens / seconds:,.0f} tokens/s"


def _collator_figures(
    name: str, collator: Collator, dataset: TokenisedDataset, steps: int
) -> Iterator[Figure]:
    batches = GlobalBatches(len(dataset), GLOBAL_BATCH, seed=0)
    tokens = computed = 0
    started = time.perf_counter()
    for step in range(steps):
        indices = batches.indices(step)
        sizes = [
            [collator.collate(dataset, chosen).input_ids.numel() for chosen in dealt]
            for dealt in (
                collator.micro_batches(indices, dataset.lengths, rank, PROCESSES, MICRO_BATCH)
                for rank in range(PROCESSES)
            )
        ]
        computed += PROCESSES * int(np.max(sizes, axis=0).sum())
        tokens += int(dataset.lengths[indices].sum())
    seconds = time.perf_counter() - started
    yield Figure(f"batches of {GLOBAL_BATCH}, {name}", f"{steps * GLOBAL_BATCH / seconds:,.0f} samples/s")
    yield Figure(
        f"padding and waiting, {name}",
        f"{1 - tokens / computed:.2%} at {PROCESSES} processes x {MICRO_BATCH}",
    )
