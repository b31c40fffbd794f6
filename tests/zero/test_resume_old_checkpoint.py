"""A checkpoint of the first revision that had the present format (965f359) is resumed by this one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.launch import start_processes, train_command, wait
from tests.support.recipes import lines

SAVED = Path(__file__).parents[1] / "training/fixtures/before_the_glossary"


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_of_an_older_revision_resumes_to_the_losses_that_it_had(
    world_size: int, tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    shutil.copytree(SAVED, folder)
    command = train_command(
        folder / "run/recipe.resolved.yaml",
        f"model.path={folder / 'model'}",
        f"data.source={folder / 'data.jsonl'}",
        f"output.dir={folder / 'run'}",
        "resume=auto",
    )
    processes = start_processes(world_size, command, folder / "logs")
    wait(processes)
    assert [p.returncode for p in processes] == [0] * world_size, [p.output for p in processes]
    assert "resumed from" in processes[0].output
    then = json.loads((folder / "losses.json").read_text())
    now = [line["loss"] for line in lines(folder / "run/metrics.jsonl")]
    # Other matrix kernels than those of the machine that trained it round differently.
    assert now == pytest.approx(then, abs=1e-5)
