"""The run directory: what a run leaves for people and programs."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from dynrank_ds.errors import RunError
from dynrank_ds.files import replace_text
from dynrank_ds.recipe import Recipe

RECIPE, METRICS, RANKS = "recipe.resolved.yaml", "metrics.jsonl", "ranks.jsonl"
_PACKAGES = ("dynrank-ds", "torch", "deepspeed", "transformers", "datasets", "peft", "safetensors")

logger = logging.getLogger(__name__)


class RunDirectory:
    """Writes the files of a run; only the first process makes one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, recipe: Recipe, world_size: int) -> None:
        """Makes the directory with the resolved recipe and the environment."""
        self.path.mkdir(parents=True, exist_ok=True)
        # First of all, since by it the directory is known for a run's: one that is killed here can go on.
        replace_text(self.path / RECIPE, recipe.dump())
        replace_text(self.path / "environment.json", json.dumps(_environment(world_size), indent=2) + "\n")
        (self.path / "checkpoints").mkdir(exist_ok=True)

    def cut_logs(self, step: int) -> None:
        """Drops what an interrupted run logged after the checkpoint of `step`, its last line cut short too."""
        for name in (METRICS, RANKS):
            path = self.path / name
            if path.is_file():
                kept = [line for line in self._lines(name) if line["step"] <= step]
                replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def log_step(self, **values: Any) -> None:
        """Appends a line to metrics.jsonl."""
        self._append(METRICS, values)

    def log_adjustment(self, **values: Any) -> None:
        """Appends a line to ranks.jsonl."""
        self._append(RANKS, values)

    def adjustments(self) -> list[dict[str, Any]]:
        """The lines of ranks.jsonl."""
        return self._lines(RANKS) if (self.path / RANKS).is_file() else []

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """Up to the first line that is no JSON, as the last one of a run that was killed may be."""
        found = []
        for line in (self.path / name).read_text(errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                logger.warning(
                    "%s: line %d is cut short, from there on it is left out", self.path / name, len(found) + 1
                )
                break
        return found

    def _append(self, name: str, values: dict[str, Any]) -> None:
        with (self.path / name).open("a") as file:
            file.write(json.dumps(values) + "\n")


def check_output(path: Path, resume: bool) -> None:
    """Refuses a directory that holds something else, or a run that was not asked to go on.

    Raises:
        RunError: with what to do.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError(f"output.dir {path} is a file: give a new folder")
    is_run = (path / RECIPE).is_file()
    if is_run and not resume:
        raise RunError(
            f"output.dir {path} already holds a run: add resume=auto to go on with it, or give a new folder"
        )
    # A run killed at its very start leaves the recipe's temporary name.
    if not is_run and any(not name.endswith(".tmp") for name in os.listdir(path)):
        raise RunError(f"output.dir {path} is not empty and holds no run: give a new folder")


def _environment(world_size: int) -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    here = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return {
        "versions": versions,
        "python": sys.version.split()[0],
        "git_revision": git.stdout.strip() or None,
        "world_size": world_size,
        "command": sys.argv,
    }
