"""The first recipe that a person writes: a model, data, the name of a method and a number of steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dynrank_ds.data import gsm_symbolic
from dynrank_ds.methods import METHODS
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.checks import check_run
from tests.support.launch import free_port
from tests.support.tiny import write_data, write_model

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / ".cache" / "smollm2-135m-instruct"
LEAST_SCORE = 0.2
"""Share of exact answers on the templates that were trained on; the base has none right."""


def first_recipe(folder: Path, model: Path, data: Path, method: str) -> Path:
    values = {
        "model": {"path": str(model)},
        "data": {"source": str(data)},
        "method": {"name": method},
        "train": {"steps": 60},
    }
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("method", METHODS)
def test_the_name_of_a_method_is_enough_for_a_run_that_adjusts_ranks(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = first_recipe(
        tmp_path, write_model(tmp_path / "model"), write_data(tmp_path / "data.jsonl", longest=30), method
    )
    run = check_run(load_recipe(str(path)), n_processes=2)
    planned = run.method.planned_adjustments()
    assert planned == 0 if method == "lora" else 1 <= planned <= 20
    assert run.recipe.train.learning_rate is not None and run.recipe.adapter.alpha is not None


@pytest.mark.soak
@pytest.mark.skipif(not MODEL.is_dir(), reason="the quickstart's model: python launcher/smollm2.py makes it")
@pytest.mark.parametrize("method", METHODS)
def test_a_first_recipe_of_every_method_learns(method: str, tmp_path: Path) -> None:
    gsm_symbolic.main(["--output", str(tmp_path / "data")])
    recipe = first_recipe(tmp_path, MODEL, tmp_path / "data" / "train.jsonl", method)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

    def run(*command: object, **variables: str) -> None:
        subprocess.run(list(map(str, command)), cwd=tmp_path, env={**environment, **variables}, check=True)

    run(
        *("deepspeed", "--master_port", free_port(), "--num_accelerators", 2),
        *(ROOT / "launcher/train.py", "--recipe", recipe),
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
    )
    adapter = tmp_path / "runs" / method / "adapter"
    run(
        sys.executable, "-m", "dynrank_ds.cli", "merge", "--adapter", adapter, "--output", tmp_path / "merged"
    )
    run(
        *("dynrank-eval", "run", "--model", tmp_path / "merged", "--task", "gsm_symbolic", "--limit", 160),
        *("--data-dir", tmp_path / "data", "--max-new-tokens", 160, "--output", tmp_path / "scores"),
    )
    score = json.loads((tmp_path / "scores" / "results.json").read_text())["tasks"]["gsm_symbolic"]
    print(f"{method}: {score['score']:.1%} {score['interval']}")
    assert score["score"] >= LEAST_SCORE
