"""A small tokenizer with SmolLM2's habits (no beginning-of-text token, pad = eos) or LLaMA's (with one)."""

import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dynrank_ds.data import store
from dynrank_ds.data.formats import Format
from dynrank_ds.data.rows import Row
from dynrank_ds.data.tokenising import TokenisedDataset
from dynrank_ds.prompts import PROMPTS

TEXT = [
    *PROMPTS.values(),
    "She has 5 apples and 12 pears.\nThe answer is: 17",
    "naïve 漢字 \u20ac3.50 x_1 + y",
] * 3


def tokenised(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    format: Format,
    max_length: int = 10_000,
    max_dropped: float = 0.01,
) -> TokenisedDataset:
    """The rows by way of an entry on disk, as a run has them; DataError where too many were dropped."""
    with TemporaryDirectory() as folder:
        store.write(Path(folder) / "entry", iter(rows), tokenizer, format, max_length)
        dataset, drops = store.read(Path(folder) / "entry")
    drops.check(max_dropped)
    return dataset


def _byte_level_bpe(prepends_bos: bool) -> PreTrainedTokenizerFast:
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(TEXT, vocab_size=500, special_tokens=["<s>", "</s>"])
    if prepends_bos:
        from tokenizers.processors import TemplateProcessing

        backend._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="session", params=[False, True], ids=["without bos", "with bos"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return _byte_level_bpe(request.param)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    folder = os.environ.get("DYNRANK_DATA_DIR")
    if not folder:
        pytest.skip("DYNRANK_DATA_DIR, the folder of real data, is not set")
    return Path(folder)
