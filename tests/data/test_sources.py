import json
from pathlib import Path

import pytest

from dynrank_ds.data.formats import FORMATS
from dynrank_ds.data.sources import Row, load_rows
from dynrank_ds.errors import DataError


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def test_rows_keep_order_fields_and_line_numbers(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", '{"query": "a"}', "", '{"query": "ü"}')
    assert load_rows(source) == [
        Row({"query": "a"}, f"{source}, line 1"),
        Row({"query": "ü"}, f"{source}, line 3"),
    ]


def test_limit_reads_no_further_than_it_must(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", '{"query": "a"}', "broken")
    assert len(load_rows(source, limit=1)) == 1


def test_a_folder_is_read_by_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", '{"query": "t"}')
    write(tmp_path / "test.jsonl", '{"query": "e"}')
    assert load_rows(str(tmp_path))[0].fields == {"query": "t"}
    assert load_rows(str(tmp_path), split="test")[0].fields == {"query": "e"}


def test_a_folder_of_parquet_is_read_through_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_list([{"query": "a"}, {"query": "b"}]).to_parquet(folder / "train.parquet")
    rows = load_rows(str(folder), limit=1)
    assert rows == [Row({"query": "a"}, f"{folder}, train row 0")]
    with pytest.raises(DataError, match="split 'nothing' cannot be loaded"):
        load_rows(str(folder), split="nothing")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "a"', r"line 2: not valid JSON \(Expecting ',' delimiter at column \d+\)"),
        ("[1, 2]", "line 2: a list, but each line must be one JSON object"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    source = write(tmp_path / "rows.jsonl", '{"query": "a"}', line)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(source)
    assert str(caught.value).startswith(source)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"query": "\xff\xfe"}\n')
    with pytest.raises(DataError, match="line 1: not UTF-8 text"):
        load_rows(str(path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query": "q"}, r"field 'response' is missing \(fields there: query\)"),
        ({"query": "q", "response": 7}, r"field 'response' is 7 \(int\), it must be text"),
        ({"query": "q", "response": " \n"}, "field 'response' is empty"),
        ({"query": None, "response": "r"}, r"field 'query' is None \(NoneType\)"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(tmp_path: Path, fields: dict, message: str) -> None:
    row = load_rows(write(tmp_path / "rows.jsonl", json.dumps(fields)))[0]
    with pytest.raises(DataError, match=f"rows.jsonl, line 1: {message}"):
        FORMATS["metamathqa"].texts(row)


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the data set is empty"):
        load_rows(write(tmp_path / "rows.jsonl", ""))


@pytest.mark.parametrize("source", ["/nowhere/at/all", "nowhere/rows.jsonl", "./set"])
def test_a_missing_file_is_refused_without_asking_the_hub(source: str) -> None:
    with pytest.raises(DataError, match=f"{source}: no such file or folder"):
        load_rows(source)


def test_a_hub_data_set_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing-at-all: split 'train' cannot be loaded by datasets"):
        load_rows("nobody/nothing-at-all")


def test_the_text_of_a_row_is_metamaths(data_dir: Path) -> None:
    rows = load_rows(str(data_dir / "metamathqa" / "metamathqa-40k.excerpt.jsonl"))
    assert len(rows) == 10
    prompt, answer = FORMATS["metamathqa"].texts(rows[1])
    assert prompt.startswith("Below is an instruction that describes a task.")
    assert prompt.endswith("\n\n### Response: Let's think step by step.")
    assert answer.startswith(" If the coffee shop sold 6 teas") and answer.endswith("The answer is: 32")
