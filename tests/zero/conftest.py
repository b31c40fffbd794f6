"""Runs that several files of tests read; each is made once a session."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.launch import run_worker, train
from tests.support.methods import METHODS
from tests.support.once import made_once
from tests.support.recipes import write_recipe
from tests.zero.workers.shards import NAN_METHODS


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes held in the runs of workers/shards.py."""
    return made_once(tmp_path_factory, "shards", _run_shards)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run at world size 2 with checkpoints at steps 10 and 20: recipe.yaml and run/."""
    whole = made_once(tmp_path_factory, "uninterrupted", _run_uninterrupted)
    # A copy of this process's own, beside which tests put runs and logs.
    return Path(shutil.copytree(whole, tmp_path_factory.mktemp("uninterrupted") / "copy"))


def _run_shards(folder: Path) -> None:
    write_recipe(folder, micro_batch_size=3)
    for name in NAN_METHODS:
        (folder / f"{name}.yaml").write_text(json.dumps({"base": "recipe.yaml", "method": METHODS[name]}))
    run_worker(2, "shards", folder)


def _run_uninterrupted(folder: Path) -> None:
    train(2, write_recipe(folder, micro_batch_size=3), "train.checkpoint_interval=10")
