"""The evaluation directory: samples.jsonl and results.json."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dynrank_ds.errors import RunError
from dynrank_eval.scoring import Sample


def check_output(folder: Path) -> None:
    """Raise RunError where the folder cannot be created."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise RunError(f"--output {folder}: {existing} is a file; name a folder.")
    if not os.access(existing, os.W_OK):
        raise RunError(f"--output {folder}: {existing} is not writable.")


def write_output(
    folder: Path, samples: Iterable[Sample], tasks: Mapping[str, Any], run: Mapping[str, Any]
) -> None:
    """Write both files, results.json last: where it is, the evaluation is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(asdict(sample)) + "\n" for sample in samples)
    replace_file(folder / "samples.jsonl", "".join(lines))
    replace_file(folder / "results.json", json.dumps({"tasks": tasks, "run": run}, indent=2) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Write a file so that it never exists in part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
