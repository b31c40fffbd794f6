"""Where a benchmark's rows come from: a folder, a package, or the hub."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError
from dynrank_eval.tasks.base import Problem


def find_file(data_dir: Path | None, task: str, names: Sequence[str]) -> Path | None:
    """Return the first of `names` (they may hold wildcards) in the folder's subfolder `task`, else in the folder."""
    if data_dir is None:
        return None
    for folder in (data_dir / task, data_dir):
        for name in names:
            found = sorted(folder.glob(name))
            if found:
                return found[0]
    return None


def file_source(path: Path, variant: str) -> dict[str, str]:
    """Return what results say of a data file: its path, its SHA-256 and its variant."""
    return {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "variant": variant}


def make_problems(
    source: Path | str, rows: Iterable[tuple[int, dict[str, Any]]], make: Callable[[dict[str, Any]], Problem]
) -> list[Problem]:
    """Make a problem of each numbered row; DataError naming the line where `make` cannot."""
    problems = []
    for line, row in rows:
        try:
            problems.append(make(row))
        except DataError as error:
            raise DataError(f"{source}, line {line}: {error}") from error
        except SyntaxError as error:
            raise DataError(
                f"{source}, line {line}: its code or tests are no valid Python: {error}."
            ) from error
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{source}, line {line}: the row is not in the task's format: {error!r}."
            ) from error
    return problems


def hub_rows(
    task: str,
    data_dir: Path | None,
    names: Sequence[str],
    hub: str,
    configurations: Iterable[str],
    split: str,
) -> list[dict[str, Any]]:
    """Return the rows of a data set on the hub (or in its local cache), one configuration after another.

    Raises:
        DataError: it cannot be had; the message says what was looked for in `data_dir` before.
    """
    where = f"{data_dir} has none of {', '.join(names)}" if data_dir else "no --data-dir was given"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{task}: {where}, and the package datasets is not installed: {error}.") from error
    try:
        return [
            dict(row)
            for configuration in configurations
            for row in load_dataset(hub, configuration, split=split)
        ]
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{task}: {where}, and {hub} could not be fetched from the hub: {first}") from error
