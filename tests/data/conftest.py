"""A small tokenizer with SmolLM2's habits (no beginning-of-text token, pad = eos) or LLaMA's (with one)."""

import os
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from dynrank_ds.prompts import PROMPTS

TEXT = [
    *PROMPTS.values(),
    "She has 5 apples and 12 pears.\nThe answer is: 17",
    "naïve 漢字 \u20ac3.50 x_1 + y",
] * 3


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
