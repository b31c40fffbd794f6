"""The rows of one file, whatever form it has: JSON lines, a JSON array, CSV, Parquet; plain or compressed.

The form is recognised by the first bytes rather than by the name, except for CSV (`.csv`, `.tsv`), which has no mark.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from dynrank_ds.data.rows import Row
from dynrank_ds.documents import DuplicateKeyError, unique_pairs
from dynrank_ds.errors import DataError

COMPRESSED = (".gz", ".bz2", ".xz")
FILE_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_LONGEST_LINE = 1 << 26
_PIECE = 1 << 20
_BOM = b"\xef\xbb\xbf"
_DECODER = json.JSONDecoder(object_pairs_hook=unique_pairs)
_BETWEEN = re.compile(r"[\s,]*")
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What the decompressors raise."""
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_REFUSED = {
    b"version https://git-lfs": "a Git LFS pointer, not the file: run `git lfs pull` in its repository",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: decompress it (zstd -d), or compress it by gzip",
    b"PK\x03\x04": "a zip archive or a spreadsheet: extract it, or save it as CSV",
    b"ARROW1": "an Arrow file: give the folder that `datasets` saved, or write it as Parquet",
    b"SQLite format 3": "an SQLite database: write its rows as JSON lines",
    b"\x93NUMPY": "a NumPy array: write its rows as JSON lines",
}


def read_file(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, one by one.

    Raises:
        DataError: with file and line or row, for what cannot be read, and for a key or column that stands twice.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(32)
        opener = next((opener for magic, opener in _OPENERS.items() if begin.startswith(magic)), None)
        if opener is not None:
            with opener(path, "rb") as file:
                begin = file.read(32)
    except _BROKEN as error:
        raise _unreadable(path, error) from error
    for magic, what in _REFUSED.items():
        if begin.startswith(magic):
            raise DataError(f"{path}: this is {what}")
    name = path.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    if begin.startswith(b"PAR1") or (name.endswith(".parquet") and opener is None):
        if opener is not None:
            raise DataError(
                f"{path}: Parquet inside a compressed file: decompress it, Parquet is compressed itself"
            )
        yield from read_parquet(path)
        return
    read = _read_csv if name.endswith((".csv", ".tsv")) else _read_json
    try:
        with (opener or Path.open)(path, "rb") as file:
            yield from read(path, file)
    except _BROKEN as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return DataError(f"{path}: cannot be read ({reason})")


def _read_json(path: Path, file: IO[bytes]) -> Iterator[Row]:
    """One object a line; or, where the first character is a bracket, one array of objects."""
    begin = file.read(1 << 16)
    file.seek(0)
    if begin.removeprefix(_BOM).lstrip().startswith(b"["):
        return _read_array(path, io.TextIOWrapper(file, encoding="utf-8-sig"))
    return _read_lines(path, file)


def _read_lines(path: Path, file: IO[bytes]) -> Iterator[Row]:
    for number, line in enumerate(iter(partial(file.readline, _LONGEST_LINE), b""), start=1):
        origin = f"{path}, line {number}"
        if len(line) == _LONGEST_LINE:
            raise DataError(
                f"{origin}: longer than {_LONGEST_LINE:,} bytes, so hardly one JSON object a line"
            )
        if number == 1:
            line = line.removeprefix(_BOM)
        if line.strip():
            yield Row(_json_object(line, origin), origin)


def _json_object(line: bytes, origin: str) -> dict[str, Any]:
    try:
        fields = _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{origin}: not valid JSON ({error.msg} at column {error.colno}), each line must be one JSON object, or "
            "the file one array of objects"
        ) from error
    except DuplicateKeyError as error:
        raise DataError(f"{origin}: {error}, and only one of its values could be read: remove one") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
        raise DataError(f"{origin}: JSON that cannot be read ({error})") from error
    if not isinstance(fields, dict):
        raise DataError(f"{origin}: a {type(fields).__name__}, but each line must be one JSON object")
    return fields


class _Text:
    """A text read piece by piece: what is held of it, the place in it, and that place's line."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.held, self.place, self.line, self.ended = file, "", 0, 1, False

    def more(self) -> None:
        """Read on, as much again as is left, so that a long value is not begun over and over."""
        left = self.held[self.place :]
        piece = self.file.read(max(_PIECE, len(left)))
        self.held, self.place, self.ended = left + piece, 0, not piece

    def move_to(self, place: int) -> None:
        """Go on to a later place."""
        self.line += self.held.count("\n", self.place, place)
        self.place = place


def _read_array(path: Path, file: IO[str]) -> Iterator[Row]:
    """Yield the objects of one array, each held alone."""
    text = _Text(file)
    try:
        while "[" not in text.held:
            text.more()
        text.move_to(text.held.index("[") + 1)
        while True:
            text.move_to(_BETWEEN.match(text.held, text.place).end())  # type: ignore[union-attr]
            if text.place == len(text.held) and not text.ended:
                text.more()
                continue
            if text.held.startswith("]", text.place):
                return
            try:
                fields, end = _DECODER.raw_decode(text.held, text.place)
            except json.JSONDecodeError as error:
                if not text.ended and len(text.held) - text.place < _LONGEST_LINE:
                    text.more()
                    continue
                raise DataError(
                    f"{path}, line {text.line}: the array's element that begins here is not valid JSON ({error.msg})"
                ) from error
            if not isinstance(fields, dict):
                raise DataError(
                    f"{path}, line {text.line}: a {type(fields).__name__}, but each element must be a JSON object"
                )
            yield Row(fields, f"{path}, line {text.line}")
            text.move_to(end)
    except DuplicateKeyError as error:
        raise DataError(
            f"{path}, line {text.line}: {error}, and only one of its values could be read: remove one"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, after line {text.line}: not UTF-8 text ({error.reason})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {text.line}: JSON that cannot be read ({error})") from error


def _read_csv(path: Path, file: IO[bytes]) -> Iterator[Row]:
    """Yield the rows below a header line. All values are text."""
    csv.field_size_limit(_LONGEST_LINE)
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    lines = csv.reader(
        io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True
    )
    header: list[str] | None = None
    last = 0
    try:
        for values in lines:
            origin, last = f"{path}, line {last + 1}", lines.line_num
            if not values:
                continue
            if header is None:
                header = values
                _refuse_twice(header, origin)
            elif len(values) != len(header):
                raise DataError(
                    f"{origin}: {len(values)} values, but {len(header)} columns: quote values that hold "
                    f"{delimiter!r} or line breaks"
                )
            else:
                yield Row(dict(zip(header, values, strict=True)), origin)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, after line {last}: not UTF-8 text ({error.reason})") from error
    except csv.Error as error:
        raise DataError(f"{path}, line {last + 1}: not valid CSV ({error})") from error


def _refuse_twice(names: list[str], origin: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        places = ", ".join(str(place) for place, name in enumerate(names, start=1) if name == twice[0])
        raise DataError(
            f"{origin}: the column {twice[0]!r} stands twice (columns {places}): rename or remove one"
        )


def read_parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file, read a batch at a time; DataError with file and row."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _refuse_twice(file.schema_arrow.names, f"{path}, schema")
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    yield Row(without_absent(fields), f"{path}, row {number}")
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise DataError(f"{path}, after row {number}: not a readable Parquet file ({reason[0]})") from error


def without_absent(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a row of Arrow's without the nested fields that are null.

    Every struct of a column has the fields of all: where a message has no `tool_calls`, Arrow writes a null.
    """
    return {name: _without_nulls(value) for name, value in fields.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
