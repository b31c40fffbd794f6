"""The comparison with PEFT: that it has every row, and that both sides do the same work."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dynrank_ds.bench.cli import main
from dynrank_ds.bench.figures import median_interval
from tests.support.recipes import write_recipe

ROWS = [
    "step, alone: lora / peft lora",
    "step, alone: pe_dyra / peft lora",
    "step, alone: adalora / peft lora",
    "step, alone: adalora / peft adalora",
    "step, deepspeed: lora / peft lora",
    "step, deepspeed: pe_dyra / peft lora",
    "step, deepspeed: adalora / peft lora",
    "peft adalora, deepspeed",
    "step, trainer: lora / peft lora",
    "memory, alone: lora / peft lora",
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("peers")
    recipe, file = write_recipe(folder), folder / "peers.json"
    command = [sys.executable, "-m", "dynrank_ds.bench", "peers", "--quick", "--recipe", str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, "--json", str(file)], env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(row in done.stdout for row in ROWS)
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def values(written: dict[str, Any], what: str) -> dict[str, Any]:
    [found] = [f["values"] for f in written["benchmarks"]["peers"] if f["what"] == what]
    return dict(found)


@pytest.mark.slow
def test_every_row_is_there_with_the_machine_and_the_versions(written: dict[str, Any]) -> None:
    assert [figure["what"] for figure in written["benchmarks"]["peers"]] == ROWS
    assert {"cpu", "features", "cores", "load_average"} <= written["machine"].keys()
    assert {"torch", "deepspeed", "transformers", "peft", "accelerate"} <= written["versions"].keys()
    assert "--quick" in written["command"]


@pytest.mark.slow
def test_ratios_are_finite_and_inside_their_intervals(written: dict[str, Any]) -> None:
    for what in ROWS:
        row = values(written, what)
        if "crash" in row:
            continue
        assert math.isfinite(row["ratio"]) and row["ratio"] > 0
        if row["kind"] == "time":
            low, high = row["interval_95"]
            assert low <= row["ratio"] <= high
            assert len(row["ratios"]) == row["pairs"] == 6 and row["threads_per_process"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["alone", "deepspeed", "trainer"])
def test_our_lora_and_pefts_do_the_same_work(setup: str, written: dict[str, Any]) -> None:
    ours, theirs = values(written, f"step, {setup}: lora / peft lora")["first_losses"]
    # The first loss is that of the base; the others follow from gradients, clipping and AdamW.
    assert len(ours) == 3 and ours[2] < ours[0] - 0.1
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
def test_pefts_adalora_does_not_train_under_zero3(written: dict[str, Any]) -> None:
    assert "Error" in values(written, "peft adalora, deepspeed")["crash"]


@pytest.mark.slow
def test_peak_memory_is_more_than_the_libraries_alone(written: dict[str, Any]) -> None:
    assert all(peak > 200 * 2**20 for peak in values(written, ROWS[-1])["peak_bytes"])


def test_the_interval_of_a_median_covers_it_as_often_as_stated() -> None:
    # Binomial tails by hand: of 10 values P(X < 2) = 11 / 1024, of 6 P(X < 1) = 1 / 64.
    assert median_interval([10, 1, 2, 9, 3, 8, 4, 7, 5, 6]) == (5.5, 2, 9)
    assert median_interval([6, 5, 4, 3, 2, 1]) == (3.5, 1, 6)


def test_mistakes_are_reported_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path))
    assert main(["peers", "--quick", "--recipe", recipe, "data.packing=true"]) == 2
    assert "data.packing is true" in capsys.readouterr().err
    assert main(["peers", "--recipe", recipe, "--json", str(tmp_path / "no/f.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err
