"""Rows from files, a folder, the hub, or a generator, one by one in the source's order."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from dynrank_ds.data.reading import COMPRESSED, FILE_ENDINGS, read_file, without_absent
from dynrank_ds.data.rows import Row
from dynrank_ds.errors import DataError
from dynrank_ds.hub import is_hub_id
from dynrank_ds.tensorfile import file_sha256

_GENERATED_ROWS = 3200
GENERATED = "generated:gsm_symbolic"


class Source(Protocol):
    """Where rows come from."""

    def rows(self) -> Iterator[Row]:
        """Yield all rows; DataError, naming file and line, where one cannot be read."""

    def identity(self) -> str:
        """Return a text that changes when the rows change."""


def open_source(
    source: str,
    split: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    n_generated: int | None = None,
    generated: Path = Path("generated"),
) -> Source:
    """Return the source that `source` names.

    source: a file of JSON lines, a JSON array, CSV or Parquet, also compressed; a folder, of which `<split>` or the
    shards `<split>-*` with these endings are read, also from its folder data/, and which is given to
    `datasets.load_dataset` where it has none of these; the hub id of a data set; or GENERATED, whose `n_generated`
    rows are written below the folder `generated`.
    split: which part of a folder or hub data set; "train" where None.
    revision: commit, tag or branch of a hub data set.
    streaming: whether `datasets` reads while downloading, instead of storing the whole first.

    Raises:
        DataError: there is no such file, folder or possible hub id, or it has no parts or revisions to choose from.
    """
    path, part = Path(source).expanduser(), split or "train"
    local = source == GENERATED or path.exists()
    if revision and local:
        raise DataError(f"data.revision is '{revision}', but {source} is not of the hub: leave it out")
    if split and local and not path.is_dir():
        raise DataError(f"data.split is '{split}', but {source} has no parts: leave it out")
    if source == GENERATED:
        return FileSource((_generate(generated, n_generated or _GENERATED_ROWS),))
    if path.is_file():
        return FileSource((path,))
    if path.is_dir():
        files = _split_files(path, part)
        return FileSource(files) if files else FolderSource(path, part, streaming)
    if is_hub_id(source) and not source.endswith((*FILE_ENDINGS, *COMPRESSED)):
        return HubSource(source, part, revision, streaming)
    raise DataError(f"{source}: no such file or folder, and not a hub id either (owner/name)")


def select(rows: Iterable[Row], wanted: Mapping[str, Any], limit: int | None) -> Iterator[Row]:
    """Yield the first `limit` (None: all) of the rows whose fields have one of the values `wanted` for them.

    wanted: {field: value, or a tuple of values}. DataError naming a row that lacks such a field.
    """
    return islice((row for row in rows if _passes(row, wanted)), limit)


def _passes(row: Row, wanted: Mapping[str, Any]) -> bool:
    for field, values in wanted.items():
        if field not in row.fields:
            known = ", ".join(sorted(row.fields)) or "none"
            raise DataError(
                f"{row.origin}: data.filter names the field {field!r}, which is missing (fields there: {known})"
            )
        if row.fields[field] not in (values if isinstance(values, tuple) else (values,)):
            return False
    return True


@dataclass(frozen=True)
class FileSource:
    """Files of any form that `read_file` reads, one after another."""

    paths: tuple[Path, ...]

    def rows(self) -> Iterator[Row]:
        for path in self.paths:
            yield from read_file(path)

    def identity(self) -> str:
        """Return the hash of the files' content, whatever their names."""
        return "files:" + ",".join(_content_hash(path) for path in self.paths)


def _content_hash(path: Path) -> str:
    status = path.stat()
    return _hash_of_version(path.absolute(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hash_of_version(path: Path, size: int, changed: int) -> str:
    """Return a run asks twice, before its processes meet and after: large files are read once."""
    return file_sha256(path)


@dataclass(frozen=True)
class FolderSource:
    """A folder in a form that only the library `datasets` knows."""

    path: Path
    split: str
    streaming: bool

    def rows(self) -> Iterator[Row]:
        return _load_with_datasets(str(self.path), self.split, None, self.streaming)

    def identity(self) -> str:
        """Return the hash of all files of the folder."""
        files = sorted(path for path in self.path.rglob("*") if path.is_file())
        named = (f"{path.relative_to(self.path)}={_content_hash(path)}" for path in files)
        return f"folder:{self.split}:" + ",".join(named)


@dataclass(frozen=True)
class HubSource:
    """A data set of the hub."""

    name: str
    split: str
    revision: str | None
    streaming: bool

    def rows(self) -> Iterator[Row]:
        return _load_with_datasets(self.name, self.split, self.revision, self.streaming)

    def identity(self) -> str:
        """Return id and revision, since content cannot be known without the hub; a commit as revision fixes it."""
        return f"hub:{self.name}@{self.revision or 'main'}:{self.split}"


def _load_with_datasets(source: str, split: str, revision: str | None, streaming: bool) -> Iterator[Row]:
    import datasets

    # What the library logs before it raises would stand beside our sentence.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    number = 0
    try:
        dataset = datasets.load_dataset(source, split=split, revision=revision, streaming=streaming)
        for fields in dataset:
            yield Row(without_absent(fields), f"{source}, {split} row {number}")
            number += 1
    # Its loaders let through whatever their readers, decompressors and HTTP client raise.
    except Exception as error:
        raise DataError(
            f"{source}: split {split!r} cannot be loaded by datasets, after row {number} ({_first(_root(error))})"
        ) from error


def _split_files(folder: Path, split: str) -> tuple[Path, ...]:
    for place in (folder, folder / "data"):
        for ending in FILE_ENDINGS:
            for pattern in (f"{split}{ending}", f"{split}-*{ending}"):
                for compressed in ("", *COMPRESSED):
                    if found := tuple(sorted(place.glob(pattern + compressed))):
                        return found
    return ()


def _generate(folder: Path, n_rows: int) -> Path:
    """Return the file with the training rows of gsm_symbolic, written at the first call with these arguments."""
    from dynrank_ds.data.gsm_symbolic import write_gsm_symbolic

    path = folder / f"gsm_symbolic-{n_rows}" / "train.jsonl"
    return path if path.is_file() else write_gsm_symbolic(path.parent, n_train=n_rows).train


def _root(error: BaseException) -> BaseException:
    """Return what `error` was raised from: the outer ones say only that something was wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
