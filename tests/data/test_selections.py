"""The papers' selections of their data sets, as recipes name them, on the real rows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynrank_ds.data.reading import read_file
from dynrank_ds.data.tokenising import TokenisedDataset
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.samples import prepare_data
from tests.support.tiny import write_model

PAPER = "llama2_7b_metamathqa_pe_dyra"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("selections") / "model")


def selected(model: Path, source: Path, *overrides: str) -> TokenisedDataset:
    """The samples that the paper's recipe takes from `source`, with another model's tokenizer."""
    return prepare_data(load_recipe(PAPER, [f"model.path={model}", f"data.source={source}", *overrides]))[0]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_of_metamathqa_the_first_rows_are_taken(model: Path, data_dir: Path) -> None:
    data = load_recipe(PAPER).data
    assert (data.source, data.limit, data.format) == ("meta-math/MetaMathQA", 100_000, "metamathqa")
    rows = data_dir / "metamathqa" / "metamathqa-40k.excerpt.jsonl"
    everything, first = selected(model, rows), selected(model, rows, "data.limit=4")
    assert (len(everything), len(first)) == (10, 4)
    assert np.array_equal(first.tokens, everything.tokens[: len(first.tokens)])


def test_of_codefeedback_the_python_rows_are_taken(model: Path, data_dir: Path, tmp_path: Path) -> None:
    [real] = read_file(data_dir / "codefeedback" / "codefeedback-filtered-instruction.excerpt.jsonl")
    languages = [real.fields["lang"], "python", "cpp", "python", "python"]
    assert languages[0] == "sql", "so the Python rows here are copies that say so"
    rows = [
        {**real.fields, "query": f"{number} {real.fields['query']}", "lang": language}
        for number, language in enumerate(languages)
    ]
    every = write(tmp_path / "every.jsonl", rows)
    python = write(tmp_path / "python.jsonl", [row for row in rows if row["lang"] == "python"])
    format, choice = "data.format=codefeedback", "data.filter={lang: python}"
    chosen, alone = selected(model, every, format, choice), selected(model, python, format)
    assert len(chosen) == 3 and np.array_equal(chosen.tokens, alone.tokens)
    first = selected(model, every, format, choice, "data.limit=2")
    assert len(first) == 2 and np.array_equal(first.tokens, alone.tokens[: len(first.tokens)])
