"""The run directory: what a run leaves for people and programs."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import yaml

from dynrank_ds.checkpoint.initial import INITIAL, UNFINISHED
from dynrank_ds.errors import RunError
from dynrank_ds.files import append_line, read_json, replace_text
from dynrank_ds.recipe import Recipe
from dynrank_ds.shared_disk import patiently

RECIPE, ENVIRONMENT = "recipe.resolved.yaml", "environment.json"
METRICS, RANKS, STATE = "metrics.jsonl", "ranks.jsonl", "state.json"
SLURM = "slurm"
"""Folder of launcher/slurm/submit.py in a run directory, of which the run itself writes nothing."""
_LOCK = ".run.lock"
_TRACKED = {"tensorboard", "wandb", "wandb_id"}
_BEFORE_THE_FIRST_STEP = {
    _LOCK,
    RECIPE,
    ENVIRONMENT,
    METRICS,
    STATE,
    INITIAL,
    UNFINISHED,
    "checkpoints",
    *_TRACKED,
}
_PACKAGES = (
    "dynrank-ds",
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "peft",
    "safetensors",
    "bitsandbytes",
    "flash-attn",
    "flash-attn-3",
)

logger = logging.getLogger(__name__)


class RunDirectory:
    """The files of a run, which only the first process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    @property
    def is_locked(self) -> bool:
        """Whether this object holds the lock."""
        return self._lock is not None

    def lock(self) -> bool:
        """Make the directory and keeps other runs out until `unlock` or the end of this process, killed or not.

        False where another run is in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        # Not filelock's, which where a disk has no locks makes files instead that a killed run leaves behind.
        self._lock = (self.path / _LOCK).open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._lock.close()
            self._lock = None
            return False
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): let no other run write there", self.path, error.strerror
            )
        return True

    def unlock(self) -> None:
        """Let other runs in; a directory whose run ended before its first step goes."""
        if self._lock:
            if self._is_before_the_first_step():
                shutil.rmtree(self.path)
            self._lock.close()
            self._lock = None

    def _is_before_the_first_step(self) -> bool:
        """Whether nothing lies there but what a run writes before its first step, discarded batches' lines too."""
        checkpoints = self.path / "checkpoints"
        if checkpoints.is_dir() and os.listdir(checkpoints):
            return False
        if not _BEFORE_THE_FIRST_STEP.issuperset(os.listdir(self.path)):
            return False
        metrics = self.path / METRICS
        if not metrics.exists():
            return True
        # Something else in its place was not put there by a run that ends before its first step.
        return metrics.is_file() and not any(line["step"] for line in self._lines(METRICS))

    def create(self, recipe: Recipe, identity: Mapping[str, str], world_size: int) -> None:
        """Write the resolved recipe and the environment into the locked directory."""
        # First of all, since by it the directory is known for a run's: one that is killed here can go on.
        replace_text(self.path / RECIPE, recipe.dump())
        environment = {**_environment(world_size), "identity": identity}
        replace_text(self.path / ENVIRONMENT, json.dumps(environment, indent=2) + "\n")
        (self.path / "checkpoints").mkdir(exist_ok=True)

    def metadata(self) -> dict[str, Any] | None:
        """Return the recipe and fingerprints of the run in this directory, as far as they were written."""
        return patiently(self._metadata, self.path)

    def _metadata(self) -> dict[str, Any] | None:
        if not (self.path / RECIPE).is_file():
            return None
        environment = self.path / ENVIRONMENT
        identity = read_json(environment).get("identity", {}) if environment.is_file() else {}
        return {"recipe": yaml.safe_load((self.path / RECIPE).read_text()), "identity": identity}

    def cut_logs(self, step: int, batch: int) -> None:
        """Drop what an interrupted run logged after the checkpoint of `step`, its last line cut short too.

        batch: how many batches were consumed by then; discarded ones are logged under the step before them.
        """
        for name in (METRICS, RANKS):
            path = self.path / name
            if path.is_file():
                kept = [
                    line
                    for line in self._lines(name)
                    if line["step"] <= step and line.get("batch", 0) <= batch
                ]
                replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def log_step(self, **values: Any) -> None:
        """Append a line to metrics.jsonl."""
        self._append(METRICS, values)

    def log_adjustment(self, **values: Any) -> None:
        """Append a line to ranks.jsonl."""
        self._append(RANKS, values)

    def adjustments(self) -> list[dict[str, Any]]:
        """Return the lines of ranks.jsonl."""
        return self._lines(RANKS) if (self.path / RANKS).is_file() else []

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """Return the lines up to the first that is not JSON, as the last line of a killed run may be."""
        found = []
        path = self.path / name
        for line in patiently(lambda: path.read_text(errors="replace"), path).splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                logger.warning("%s: line %d is cut short, from there on it is left out", path, len(found) + 1)
                break
        return found

    def _append(self, name: str, values: dict[str, Any]) -> None:
        append_line(self.path / name, json.dumps(values))


def check_output(path: Path, resume: bool) -> None:
    """Refuse a directory that holds something else, or a run that was not asked to go on.

    Raises:
        RunError: with what to do.
    """
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise RunError(f"output.dir {path}: {there} is a file: give a new folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunError(f"output.dir {path}: {there} may not be written to: give another folder")
    if there != path:
        return
    is_run = (path / RECIPE).is_file()
    if is_run and not resume:
        raise RunError(
            f"output.dir {path} already holds a run: add resume=auto to go on with it, or give a new folder"
        )
    # A run that ends at its very start leaves the lock, its state and the recipe's temporary name; a job is submitted
    # before it runs.
    expected = (_LOCK, STATE, SLURM)
    if not is_run and any(name not in expected and not name.endswith(".tmp") for name in os.listdir(path)):
        raise RunError(f"output.dir {path} is not empty and holds no run: give a new folder")


def package_versions() -> dict[str, str | None]:
    """Return the versions of the packages that shape a run; None for one that is not installed."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _environment(world_size: int) -> dict[str, Any]:
    return {
        "versions": package_versions(),
        "python": sys.version.split()[0],
        "git_revision": code_revision(),
        "world_size": world_size,
        "command": sys.argv,
    }


def code_revision() -> str | None:
    """Return the git revision of this package, of a copy the one that its copier noted; None where it is unknown."""
    noted = Path(__file__).parents[2] / "REVISION"
    if noted.is_file():
        return noted.read_text().strip()
    if not (git := shutil.which("git")):
        return None
    command, here = [git, "rev-parse", "HEAD"], Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
