"""What must be the same in every process before training begins: code, packages, recipe, model, tokenizer, data."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynrank_ds.errors import RunError
from dynrank_ds.recipe import Recipe
from dynrank_ds.training.rundir import package_versions
from dynrank_ds.zero import processes

_MAY_DIFFER: dict[str, Any] = {"model": {"path"}, "data": {"source"}, "output": {"dir"}, "eval": True}
"""Keys of the recipe that say where things lie, which may be on a disk of each node; contents are compared instead."""


def process_versions(recipe: Recipe) -> dict[str, str]:
    """Return what this process runs: versions, and hashes of the recipe and of this package's Python files."""
    versions = {name: str(version) for name, version in package_versions().items()}
    values = json.dumps(recipe.model_dump(mode="json", exclude=_MAY_DIFFER), sort_keys=True)
    return {
        "code of dynrank_ds": _code_hash(),
        "recipe": hashlib.sha256(values.encode()).hexdigest(),
        "python": platform.python_version(),
        **versions,
    }


def _code_hash() -> str:
    folder, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def check_same_everywhere(versions: Mapping[str, str], device: torch.device) -> None:
    """Compare what the processes hold, by name; one collective where it is the same.

    Raises:
        RunError: on every process: what differs from process 0, and on which nodes.
    """
    text = json.dumps({"host": socket.gethostname(), **versions}, sort_keys=True)
    if processes.agree(hashlib.sha256(json.dumps(versions, sort_keys=True).encode()).hexdigest(), device):
        return
    first, *others = (json.loads(one) for one in _from_each_process(text, device))
    raise RunError(
        f"the processes are not alike: {'; '.join(_differences(first, others))}. They must be the same on every node"
    )


def _differences(first: Mapping[str, str], others: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a sentence for each thing and node, of its first process that differs."""
    found: dict[tuple[str, str], str] = {}
    for process, other in enumerate(others, start=1):
        for name in first:
            if name != "host" and other.get(name) != first[name]:
                here = f"{name} is {_short(other.get(name))} in process {process} on {other['host']}"
                there = f"{_short(first[name])} in process 0 on {first['host']}"
                found.setdefault((name, other["host"]), f"{here}, {there}")
    return list(found.values())


def _short(value: str | None) -> str:
    return str(value)[:12]


def _from_each_process(text: str, device: torch.device) -> list[str]:
    """Return the text of every process; two collectives."""
    encoded = np.frombuffer(text.encode(), dtype=np.uint8)
    sizes = processes.gather_flat(torch.tensor([len(encoded)], device=device)).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: len(encoded)] = torch.tensor(encoded, device=device)
    rows = processes.gather_flat(padded).cpu().numpy()
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]
