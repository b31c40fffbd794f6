"""The run directory: what a run leaves for people and programs."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from dynrank_ds.errors import RunError
from dynrank_ds.recipe import Recipe

_PACKAGES = ("dynrank-ds", "torch", "deepspeed", "transformers", "datasets", "peft", "safetensors")


class RunDirectory:
    """Writes the files of a run; only the first process makes one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, recipe: Recipe, world_size: int) -> None:
        """Makes the directory with the resolved recipe and the environment."""
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        (self.path / "recipe.resolved.yaml").write_text(recipe.dump())
        (self.path / "environment.json").write_text(json.dumps(_environment(world_size), indent=2) + "\n")

    def cut_logs(self, step: int) -> None:
        """Drops what an interrupted run logged after the checkpoint of `step`."""
        for name in ("metrics.jsonl", "ranks.jsonl"):
            path = self.path / name
            if path.is_file():
                kept = [
                    line
                    for line in path.read_text().splitlines()
                    if line and json.loads(line)["step"] <= step
                ]
                path.write_text("".join(line + "\n" for line in kept))

    def log_step(self, **values: Any) -> None:
        """Appends a line to metrics.jsonl."""
        self._append("metrics.jsonl", values)

    def log_adjustment(self, **values: Any) -> None:
        """Appends a line to ranks.jsonl."""
        self._append("ranks.jsonl", values)

    def adjustments(self) -> list[dict[str, Any]]:
        """The lines of ranks.jsonl."""
        path = self.path / "ranks.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

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
    is_run = (path / "recipe.resolved.yaml").is_file()
    if is_run and not resume:
        raise RunError(
            f"output.dir {path} already holds a run: add resume=auto to go on with it, or give a new folder"
        )
    if not is_run and any(path.iterdir()):
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
