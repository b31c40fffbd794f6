"""Rows from a JSONL file, a folder or the hub."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_JSONL_ENDINGS = {".jsonl", ".json"}


@dataclass(frozen=True)
class Row:
    """One row, and where it stands, so that an error about it can say so."""

    fields: dict[str, Any]
    origin: str

    def text(self, field: str) -> str:
        """The field without surrounding white space; DataError where it is missing, no text, or empty."""
        if field not in self.fields:
            known = ", ".join(sorted(self.fields)) or "none"
            raise DataError(f"{self.origin}: field {field!r} is missing (fields there: {known})")
        value = self.fields[field]
        if not isinstance(value, str):
            raise DataError(
                f"{self.origin}: field {field!r} is {value!r} ({type(value).__name__}), it must be text"
            )
        if not value.strip():
            raise DataError(f"{self.origin}: field {field!r} is empty, it must be text")
        return value.strip()


def load_rows(source: str, split: str | None = None, limit: int | None = None) -> list[Row]:
    """The first `limit` rows (None: all) of `source`, in the source's order.

    source: a JSONL file (one object a line, blank lines skipped, `split` unused); a folder, read as
    `<split>.jsonl` where that file is in it and by `datasets.load_dataset` otherwise; or a hub id.
    split: which part of a folder or hub data set; "train" where None.

    Raises DataError, naming file and line, for a missing source, broken JSON, or no rows at all.
    """
    path = Path(source).expanduser()
    part = split or "train"
    if path.is_file():
        rows = list(islice(read_jsonl(path), limit))
    elif (path / f"{part}.jsonl").is_file():
        rows = list(islice(read_jsonl(path / f"{part}.jsonl"), limit))
    elif path.is_dir() or (_HUB_ID.fullmatch(source) and path.suffix not in _JSONL_ENDINGS):
        rows = _load_with_datasets(source, part, limit)
    else:
        raise DataError(f"{source}: no such file or folder, and not a hub id either (owner/name)")
    if not rows:
        raise DataError(f"{source}: the data set is empty, at least one row is needed")
    return rows


def read_jsonl(path: Path) -> Iterator[Row]:
    """The rows of a JSONL file one by one; DataError with file and line for what is not a JSON object."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            origin = f"{path}, line {number}"
            try:
                fields = json.loads(line)
            except UnicodeDecodeError as error:
                raise DataError(f"{origin}: not UTF-8 text ({error.reason} at byte {error.start})") from error
            except json.JSONDecodeError as error:
                raise DataError(f"{origin}: not valid JSON ({error.msg} at column {error.colno})") from error
            if not isinstance(fields, dict):
                raise DataError(f"{origin}: a {type(fields).__name__}, but each line must be one JSON object")
            yield Row(fields, origin)


def _load_with_datasets(source: str, split: str, limit: int | None) -> list[Row]:
    import datasets

    try:
        dataset = datasets.load_dataset(source, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{source}: split {split!r} cannot be loaded by datasets ({reason})") from error
    return [Row(fields, f"{source}, {split} row {i}") for i, fields in enumerate(islice(dataset, limit))]
