"""`model.dtype: auto` is one dtype in all processes of a run, and stays what it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.support.launch import outcomes, run_worker
from tests.support.recipes import write_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of workers/auto_dtype.py."""
    folder = tmp_path_factory.mktemp("dtype")
    path = write_recipe(folder, dtype="auto")
    recipe = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(recipe | {"method": {"name": "lora"}}))
    run_worker(2, "auto_dtype", folder)
    return folder


@pytest.mark.parametrize(("run", "dtype"), [("native", "bf16"), ("mixed", "fp32"), ("emulated", "fp32")])
def test_auto_is_written_as_what_it_was_resolved_to(run: str, dtype: str, folder: Path) -> None:
    resolved = yaml.safe_load((folder / run / "recipe.resolved.yaml").read_text())
    state = json.loads((folder / run / "checkpoints/step-2/state.json").read_text())
    assert resolved["model"]["dtype"] == state["recipe"]["model"]["dtype"] == dtype


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (0, "model.dtype: bf16: this CPU computes it natively"),
        (1, "model.dtype: fp32: 1 of 2 processes have no bf16 arithmetic"),
        (2, "model.dtype: fp32: this CPU has no bf16 arithmetic"),
        (3, "model.dtype: bf16: the run began with it"),
        (4, "model.dtype: fp32: the run began with it"),
    ],
)
def test_one_line_says_which_dtype_and_why(number: int, sentence: str, folder: Path) -> None:
    first, _ = outcomes(folder, f"messages-{number}", 2)
    assert first[0] == sentence


def test_a_bf16_run_that_is_resumed_without_bf16_arithmetic_is_warned_how_slow_it_is(folder: Path) -> None:
    first, _ = outcomes(folder, "messages-3", 2)
    assert len(first) == 2 and "8 to 40 times slower" in first[1]
