"""Files in the forms that people have: the same rows from each, or one sentence that says what to do."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynrank_ds.data import reading
from dynrank_ds.data.reading import read_file
from dynrank_ds.data.sources import open_source
from dynrank_ds.errors import DataError

ROWS = [
    {"query": '1 + 1, or "two"?', "response": "2\nof them"},
    {"query": "[ü]", "response": "{漢字}"},
    {"query": "q", "response": "r"},
]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def array(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=1, ensure_ascii=False).encode()


def separated(delimiter: str) -> Callable[[list[dict[str, Any]]], bytes]:
    def write(rows: list[dict[str, Any]]) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()

    return write


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


FORMS = {
    "rows.jsonl": jsonl,
    "rows.json": array,
    "rows.csv": separated(","),
    "rows.tsv": separated("\t"),
    "rows.parquet": parquet,
    "rows": jsonl,
    "lines.json": jsonl,
    "array.jsonl": array,
}


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        (name, ending)
        for name in FORMS
        for ending in (("",) if name == "rows.parquet" else ("", ".gz", ".bz2", ".xz"))
    ],
)
def test_every_form_gives_the_same_rows(name: str, ending: str, tmp_path: Path) -> None:
    compress = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[ending]
    path = tmp_path / (name + ending)
    path.write_bytes(compress(FORMS[name](ROWS)))
    assert [row.fields for row in open_source(str(path)).rows()] == ROWS
    (tmp_path / "set").mkdir()
    if "." in name:
        in_folder = tmp_path / "set" / f"train.{name.split('.')[1]}{ending}"
        in_folder.write_bytes(path.read_bytes())
        assert [row.fields for row in open_source(str(tmp_path / "set")).rows()] == ROWS


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.dictionaries(st.text(max_size=5), st.text(max_size=30) | st.lists(st.floats(0, 1e9), max_size=4)),
        max_size=20,
    ),
    indent=st.sampled_from([None, 0, 3]),
    piece=st.integers(1, 40),
)
def test_an_array_is_read_as_json_reads_it_wherever_its_pieces_end(
    rows: list[dict[str, Any]],
    indent: int | None,
    piece: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "_PIECE", piece)
    text = " \n" + json.dumps(rows, indent=indent)
    (tmp_path / "rows.json").write_text(text)
    found = list(read_file(tmp_path / "rows.json"))
    assert [row.fields for row in found] == json.loads(text)
    if indent == 0 and rows and all(rows):
        lines = text.splitlines()
        assert all(lines[int(row.origin.rsplit(" ", 1)[1]) - 1] == "{" for row in found)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("r.jsonl", b'{"p": "a", "c": 1, "c": 2}\n', "line 1: the key 'c' stands twice in one object"),
        ("r.jsonl", b'{"m": [{"role": "user", "role": "system"}]}', "line 1: the key 'role' stands twice"),
        ("r.json", b'[{"p": 1},\n {"c": 1,\n "c": 2}]', "line 2: the key 'c' stands twice"),
        ("r.csv", b"p,c,p\n1,2,3\n", "line 1: the column 'p' stands twice (columns 1, 3)"),
        ("r.csv", b"p,c\n1,2\n3,4,5\n", "line 3: 3 values, but 2 columns: quote values"),
        ("r.csv", b'p,c\n1,"2\n', "line 2: not valid CSV (unexpected end of data)"),
        ("r.csv", b"p,c\n1,\xff\n", "after line"),
        (
            "r.json",
            b'[{"p": 1},\n {"p": 2}',
            "line 2: the array's element that begins here is not valid JSON",
        ),
        ("r.json", b'[{"p": 1},\n 7]', "line 2: a int, but each element must be a JSON object"),
        ("r.json", b'{\n "p": 1\n}', "line 1: not valid JSON"),
        ("r.jsonl.gz", gzip.compress(b'{"p": 1}\n' * 999, mtime=0)[:-20], "cannot be read ("),
        ("r.jsonl", b"\x28\xb5\x2f\xfd....", "this is compressed by zstd: decompress it"),
        ("r.xlsx", b"PK\x03\x04....", "this is a zip archive or a spreadsheet"),
        (
            "r.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "this is a Git LFS pointer, not the file: run `git lfs pull`",
        ),
        (
            "r.parquet.gz",
            gzip.compress(parquet(ROWS), mtime=0),
            "Parquet inside a compressed file: decompress it",
        ),
    ],
)
def test_what_cannot_be_read_is_reported_with_its_place_and_what_to_do(
    name: str, content: bytes, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_file(path))
    assert str(caught.value).startswith(str(path)) and sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parquet_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """pyarrow's own rows would hold the last of the two."""
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["query", "response", "query"])
    pyarrow.parquet.write_table(table, tmp_path / "r.parquet")
    with pytest.raises(DataError, match=r"schema: the column 'query' stands twice \(columns 1, 3\)"):
        list(read_file(tmp_path / "r.parquet"))


def test_nulls_that_arrow_fills_in_are_no_keys(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [{"id": "1"}]}]
    path = tmp_path / "r.parquet"
    path.write_bytes(parquet([{"messages": messages, "lang": None}]))
    assert [row.fields for row in read_file(path)] == [{"messages": messages, "lang": None}]


def test_a_mark_of_byte_order_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    for name, form in FORMS.items():
        if name != "rows.parquet":
            (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + form(ROWS))
            assert [row.fields for row in read_file(tmp_path / name)] == ROWS
