"""LLaMA-2's and LLaMA-3's real tokenizers: one BOS, the end-of-text token learned, padding never a target."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from dynrank_ds.data.collating import IGNORED, PackedCollator, PaddedCollator
from dynrank_ds.data.formats import FORMATS
from dynrank_ds.data.reading import read_file
from dynrank_ds.data.rows import Drops, Row
from dynrank_ds.data.tokenising import tokenise
from tests.data.conftest import tokenised

Reference = Callable[[str], list[int]]
# As meta-llama/llama-models has it, models/llama3/tokenizer.py.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3_SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(254)),
]


@pytest.fixture(scope="module", params=["llama2", "llama3"])
def llama(
    request: pytest.FixtureRequest, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedTokenizerBase, Reference]:
    """The tokenizer as transformers has it, and the ids of a text by the field's own package, without BOS."""
    path = data_dir / "tokenizers" / f"{request.param}-tokenizer.model"
    if request.param == "llama2":
        sentencepiece = pytest.importorskip("sentencepiece")
        folder = tmp_path_factory.mktemp("llama2")
        (folder / "tokenizer.model").symlink_to(path)
        return (
            LlamaTokenizer.from_pretrained(folder, add_bos_token=True),
            sentencepiece.SentencePieceProcessor(model_file=str(path)).encode,
        )
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    backend = TikTokenConverter(str(path), LLAMA3_PATTERN, extra_special_tokens=LLAMA3_SPECIALS).converted()
    bos = LLAMA3_SPECIALS[0]
    backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 128000)])
    encoding = tiktoken.Encoding(
        "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=load_tiktoken_bpe(str(path)), special_tokens={}
    )
    return (
        PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=LLAMA3_SPECIALS[1]),
        encoding.encode,
    )


@pytest.fixture(scope="module")
def rows(data_dir: Path) -> list[tuple[str, Row]]:
    """(format, row) of real data; two spaces in a row are left out.

    transformers 5.19 merges them in another order than sentencepiece does.
    """
    files = [
        ("metamathqa", data_dir / "metamathqa" / "metamathqa-40k.excerpt.jsonl"),
        ("metamathqa", data_dir / "metamathqa" / "metamathqa.transcribed.jsonl"),
        ("codefeedback", data_dir / "codefeedback" / "codefeedback-filtered-instruction.excerpt.jsonl"),
    ]
    chosen = [(format, row) for format, path in files for row in read_file(path)]
    gsm8k = list(read_file(data_dir / "gsm8k" / "train.jsonl"))[:300]
    chosen += [
        (
            "completion",
            Row({"prompt": r.fields["question"], "completion": " " + r.fields["answer"]}, r.origin),
        )
        for r in gsm8k
    ]
    return [(format, row) for format, row in chosen if "  " not in json.dumps(row.fields)]


def test_samples_are_the_reference_tokens_between_one_bos_and_one_end_of_text(
    llama: tuple[PreTrainedTokenizerBase, Reference], rows: list[tuple[str, Row]]
) -> None:
    tokenizer, reference = llama
    assert len(rows) > 200
    for format in ("metamathqa", "codefeedback", "completion"):
        mine = [row for name, row in rows if name == format]
        dataset = tokenised(mine, tokenizer, FORMATS[format])
        for row, (ids, targets) in zip(mine, map(dataset.sample, range(len(dataset))), strict=True):
            text = FORMATS[format].text(row, tokenizer)
            assert ids.tolist() == [tokenizer.bos_token_id, *reference(text.text), tokenizer.eos_token_id]
            prompt = [tokenizer.bos_token_id, *reference(text.prompts[0])]
            assert ids[~targets].tolist() == prompt, "no token of the prompt is a target, every other one is"
            assert targets[-1] and np.count_nonzero(ids == tokenizer.bos_token_id) == 1
            assert tokenizer.decode(ids, skip_special_tokens=True) == text.text


def test_padding_is_never_a_target_though_it_is_the_end_of_text_token(
    llama: tuple[PreTrainedTokenizerBase, Reference], rows: list[tuple[str, Row]]
) -> None:
    tokenizer, _ = llama
    dataset = tokenised([row for name, row in rows if name == "metamathqa"], tokenizer, FORMATS["metamathqa"])
    indices = np.arange(len(dataset))
    batch = PaddedCollator(tokenizer.eos_token_id).collate(dataset, indices)
    assert (batch.labels[batch.attention_mask == 0] == IGNORED).all() and (batch.attention_mask == 0).any()
    assert (batch.labels == tokenizer.eos_token_id).sum(1).tolist() == [1] * len(dataset)
    packed = PackedCollator().collate(dataset, indices)
    assert int((packed.labels == tokenizer.eos_token_id).sum()) == len(dataset)
    assert sorted(packed.inputs()["targets"].tolist()) == sorted(batch.inputs()["targets"].tolist())


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(
    format=st.sampled_from(["metamathqa", "codefeedback", "alpaca", "completion"]), first=TEXTS, second=TEXTS
)
def test_no_token_of_a_prompt_is_ever_a_target(
    llama: tuple[PreTrainedTokenizerBase, Reference], format: str, first: str, second: str
) -> None:
    """Whatever the texts: a row is either dropped, or its targets are exactly what follows the prompt's tokens."""
    tokenizer, _ = llama
    names = ("query", "instruction", "prompt"), ("response", "answer", "output", "completion")
    row = Row(
        {name: text for group, text in zip(names, (first, second), strict=True) for name in group}, "row"
    )
    drops = Drops()
    (samples,) = tokenise([row], tokenizer, FORMATS[format], 1000, drops)
    assert len(samples) + drops.n_dropped == 1
    for ids, targets in samples:
        (prompt,) = FORMATS[format].text(row, tokenizer).prompts
        assert ids[~targets].tolist() == tokenizer(prompt)["input_ids"]
        assert targets.tolist() == sorted(targets), "no target before the prompt's end"
