"""Reading JSONL so that a bad line is named."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError


def read_rows(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and row of every non-blank line of `path` (.jsonl, .jsonl.gz, or .json with a list).

    Raises:
        DataError: the file is missing or not UTF-8; a line is not a JSON object or lacks one of `keys`.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    for number, row in _json_array(path, text) if path.suffix == ".json" else _json_lines(path, text):
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is a JSON {type(row).__name__}, not an object.")
        missing = [key for key in keys if key not in row]
        if missing:
            raise DataError(
                f"{path}, line {number} lacks the key {missing[0]!r}; it needs {', '.join(keys)}."
            )
        yield number, row


def _json_array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """The rows of one JSON list, counted from 1 as if each had a line."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error
    yield from enumerate(rows if isinstance(rows, list) else [rows], start=1)


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    # Not splitlines(): it also splits at U+2028 and others, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not valid JSON: {error}.") from error
