"""Tokenised data on disk: written once, mapped into memory by every process of every run that needs it.

An entry is a folder named by a hash of all that the tokens depend on: the source's content, what is chosen of it,
the format and its prompts, the tokenizer with its chat template, and the versions of the tokenising libraries.
Rows stream through, so that neither writing nor reading ever holds a whole data set in memory.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dynrank_ds.data.rows import Drops, Row
from dynrank_ds.data.text import Format
from dynrank_ds.data.tokenising import Sample, TokenisedDataset, tokenise
from dynrank_ds.errors import DataError, MachineError
from dynrank_ds.files import DISK_FULL

logger = logging.getLogger(__name__)

_FORMAT = 3
_METADATA = "about.json"
_ARRAYS = {"tokens": np.int32, "targets": np.bool_, "lengths": np.int64, "target_counts": np.int64}


def cache_folder() -> Path:
    """Return the folder of the entries: $DYNRANK_CACHE, else dynrank_ds in the user's cache folder."""
    if chosen := os.environ.get("DYNRANK_CACHE"):
        return Path(chosen).expanduser()
    # Two lines instead of the package platformdirs: DeepSpeed runs on Linux, where this is all that it does.
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynrank_ds"


def fingerprint(tokenizer: PreTrainedTokenizerBase, format: Format, **choices: Any) -> str:
    """Return the name of an entry: a hash of the tokenizer, the format, and whatever else the tokens depend on."""
    parts = {
        "store": _FORMAT,
        "tokenizer": tokenizer_hash(tokenizer),
        "format": format.definition(),
        "libraries": [transformers.__version__, tokenizers.__version__],
        **choices,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the tokenizer's pipeline, special tokens and chat template, wherever it was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        type(tokenizer).__name__,
        backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.chat_template,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@contextmanager
def locked(entry: Path, timeout: float) -> Iterator[bool]:
    """Hold the entry's lock, and yield whether the entry is still to be written.

    timeout: seconds for which another process that writes it is waited for without any progress of it.

    Raises:
        MachineError: the cache folder cannot be written to, or the other process made no progress for so long.
    """
    # Asked first: a compute node may see its cache read-only.
    if (entry / _METADATA).is_file():
        yield False
        return
    lock = FileLock(f"{entry}.lock")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, entry, timeout)
    except Timeout as error:  # an OSError too
        raise MachineError(
            f"another process is tokenising into {entry} and has written nothing for {timeout:g} s: look whether it "
            "hangs, or tokenise before the run with `dynrank prepare`"
        ) from error
    except OSError as error:
        raise MachineError(
            f"the cache folder {entry.parent} cannot be written ({error.strerror}): set DYNRANK_CACHE to one that can"
        ) from error
    try:
        yield not (entry / _METADATA).is_file()
    finally:
        lock.release()


def _acquire(lock: FileLock, entry: Path, timeout: float) -> None:
    written = _bytes_written(entry)
    while True:
        try:
            lock.acquire(timeout)
            return
        except Timeout:
            before, written = written, _bytes_written(entry)
            if written == before:
                raise


def _bytes_written(entry: Path) -> int:
    """Return how much of an entry that is being written is there."""
    with suppress(FileNotFoundError):  # it is whole now, or its folder not made yet
        return sum(path.stat().st_size for path in _unfinished(entry).iterdir())
    return 0


def _unfinished(entry: Path) -> Path:
    return entry.with_name(entry.name + ".tmp")


def write(
    entry: Path,
    rows: Iterator[Row],
    tokenizer: PreTrainedTokenizerBase,
    format: Format,
    max_length: int,
    truncates: bool = False,
) -> None:
    """Tokenise all rows into the folder `entry`, under a temporary name until it is whole.

    Raises:
        DataError, ModelError: a row that cannot be read, no row at all, or a tokenizer that cannot be trained with.
        MachineError: the disk is full.
    """
    unfinished = _unfinished(entry)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    drops = Drops()
    try:
        n_samples, n_tokens = _write_arrays(
            unfinished, tokenise(rows, tokenizer, format, max_length, drops, truncates)
        )
        metadata = {"samples": n_samples, "tokens": n_tokens, "drops": asdict(drops)}
        (unfinished / _METADATA).write_text(json.dumps(metadata))
        unfinished.rename(entry)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise MachineError(
            f"the cache folder {entry.parent}: {error.strerror}; make room, or set DYNRANK_CACHE to another disk"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_arrays(folder: Path, chunks: Iterator[list[Sample]]) -> tuple[int, int]:
    n_samples = n_tokens = 0
    with (
        (folder / "tokens").open("wb") as tokens,
        (folder / "targets").open("wb") as targets,
        (folder / "lengths").open("wb") as lengths,
        (folder / "target_counts").open("wb") as target_counts,
        tqdm(unit=" samples", desc="tokenising", leave=False, disable=None) as bar,
    ):
        for chunk in chunks:
            for sample in chunk:
                # Not tofile, whose error does not say that the disk is full.
                tokens.write(sample.ids.tobytes())
                targets.write(sample.targets.tobytes())
            sizes = np.array([len(sample.ids) for sample in chunk], dtype=np.int64)
            lengths.write(sizes.tobytes())
            counts = np.array([sample.targets.sum() for sample in chunk], dtype=np.int64)
            target_counts.write(counts.tobytes())
            n_samples, n_tokens = n_samples + len(chunk), n_tokens + int(sizes.sum())
            bar.update(len(chunk))
    return n_samples, n_tokens


def read(entry: Path) -> tuple[TokenisedDataset, Drops]:
    """Return the samples of a written entry, mapped, and what was left out of them.

    Raises:
        DataError: there are none, or the entry is damaged.
    """
    try:
        metadata = json.loads((entry / _METADATA).read_text())
        drops = Drops(**metadata["drops"])
        sizes = {"tokens": metadata["tokens"], "targets": metadata["tokens"]}
        arrays = {name: _mapped(entry / name, sizes.get(name, metadata["samples"])) for name in _ARRAYS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{entry}: the tokenised data is damaged ({error}), delete this folder") from error
    starts = np.cumsum(arrays["lengths"]) - arrays["lengths"]
    return TokenisedDataset(starts=starts, **arrays), drops


def join(entry: Path, parts: Sequence[Path]) -> None:
    """Write the samples of other entries, one after another, into the folder `entry`, as `write` does.

    Raises:
        MachineError: the disk is full.
    """
    unfinished = entry.with_name(entry.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        of_parts = [json.loads((part / _METADATA).read_text()) for part in parts]
        for name in _ARRAYS:
            with (unfinished / name).open("wb") as joined:
                for part in parts:
                    with (part / name).open("rb") as file:
                        shutil.copyfileobj(file, joined)
        metadata = {key: sum(one[key] for one in of_parts) for key in ("samples", "tokens")}
        (unfinished / _METADATA).write_text(json.dumps({**metadata, "drops": asdict(Drops())}))
        unfinished.rename(entry)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise MachineError(
            f"the cache folder {entry.parent}: {error.strerror}; make room, or set DYNRANK_CACHE to another disk"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _mapped(path: Path, size: int) -> NDArray[Any]:
    dtype = np.dtype(_ARRAYS[path.name])
    if path.stat().st_size != size * dtype.itemsize:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {size * dtype.itemsize}")
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r", shape=(size,)) if size else np.empty(0, dtype)
