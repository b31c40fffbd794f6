"""Runs that several files of tests read; each is made once a session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.launch import run_worker, train
from tests.support.methods import METHODS
from tests.support.recipes import write_recipe
from tests.zero.workers.shards import NAN_METHODS


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes held in the runs of workers/shards.py."""
    folder = tmp_path_factory.mktemp("shards")
    write_recipe(folder)
    for name in NAN_METHODS:
        (folder / f"{name}.yaml").write_text(json.dumps({"base": "recipe.yaml", "method": METHODS[name]}))
    run_worker(2, "shards", folder)
    return folder


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run at world size 2 with checkpoints at steps 10 and 20: recipe.yaml and run/."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(2, write_recipe(folder), "train.checkpoint_interval=10")
    return folder
