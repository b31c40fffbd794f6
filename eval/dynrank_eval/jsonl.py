"""Reading JSONL so that a bad line is named."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError


def read_rows(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number (from 1) and row of every non-blank line of `path` (.jsonl, .jsonl.gz, or .json with a list).

    A byte order mark is skipped.

    Raises:
        DataError: the file is missing or not UTF-8; a line is not a JSON object, gives a key twice or lacks one of
            `keys`.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; ValueError where a key is given twice, of which `json` would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return found


def _json_array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Return the rows of one JSON list, counted from 1 as if each had a line."""
    try:
        rows = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error
    yield from enumerate(rows if isinstance(rows, list) else [rows], start=1)


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    # Not splitlines(): it also splits at U+2028 and others, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not valid JSON: {error}.") from error
