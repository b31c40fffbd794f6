"""Write samples.jsonl and results.json, and replace them only by a repetition of the same evaluation."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError, RunError
from dynrank_eval.jobs import Job
from dynrank_eval.scoring import Sample

SETTINGS, SAMPLES, RESULTS = "generation.json", "samples.jsonl", "results.json"
# What makes two evaluations of a task the same, beside the completions.
_SAME = ("protocol", "n", "samples_per_problem", "data_hash")


def check_output(folder: Path) -> None:
    """Raise RunError where the folder cannot be created."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise RunError(f"--output {folder}: {existing} is a file; name a folder.")
    if not os.access(existing, os.W_OK):
        raise RunError(f"--output {folder}: {existing} is not writable.")


def check_same_evaluation(folder: Path, jobs: Sequence[Job], completions: Path | None) -> None:
    """Check that `folder` holds no other evaluation, which this one would replace.

    Args:
        completions: the file that is scored; None where a model generates, whose settings `generation` compares.

    Raises:
        RunError: results.json is of other tasks, problems, protocols or completions; or there are completions without
            results.
    """
    path = folder / RESULTS
    if not path.exists():
        if completions is not None and (folder / SAMPLES).exists():
            raise RunError(f"--output {folder} holds completions without results; name another folder.")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        tasks = {name: [entry[key] for key in _SAME] for name, entry in before["tasks"].items()}
        scored = before["run"].get("generations_sha256")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path} is not an evaluation's ({error!r}); name another --output.") from error
    current = {
        job.task.name: [job.protocol.name, len(job.problems), job.samples, job.data_hash()] for job in jobs
    }
    if tasks != current:
        raise RunError(
            f"--output {folder} holds another evaluation ({_listed(tasks)}; now {_listed(current)}); name another "
            "folder or remove it."
        )
    if scored != (None if completions is None else sha256(completions)):
        raise RunError(
            f"--output {folder} holds the scores of other completions ({before['run'].get('generations', 'generated')})"
            "; name another folder or remove it."
        )


def _listed(tasks: Mapping[str, Sequence[Any]]) -> str:
    return ", ".join(
        f"{name}: {n} problems, {protocol}, --n {samples}, data {data[:8]}"
        for name, (protocol, n, samples, data) in tasks.items()
    )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content; DataError where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def write_output(
    folder: Path, samples: Iterable[Sample], tasks: Mapping[str, Any], run: Mapping[str, Any]
) -> None:
    """Write both files, results.json last: where it is, the evaluation is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(sample)) + "\n" for sample in samples)
    results = json.dumps({"tasks": tasks, "run": run}, indent=2) + "\n"
    written = [_temporary(folder / SAMPLES, lines), _temporary(folder / RESULTS, results)]
    for temporary in written:
        temporary.replace(temporary.with_suffix(""))


def replace_file(path: Path, text: str) -> None:
    """Write a file so that it never exists in part."""
    _temporary(path, text).replace(path)


def _temporary(path: Path, text: str) -> Path:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    return temporary
