"""Damage to any file of a checkpoint is noticed, and the checkpoint before it is taken."""

from __future__ import annotations

import logging
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dynrank_ds.checkpoint.files import (
    FORMAT,
    check,
    newest_checkpoint,
    newest_undamaged,
    read_state,
    write_sums,
)
from dynrank_ds.errors import RunError

FILES = ("state.safetensors", "state.json", "SHA256SUMS")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints at steps 5 and 10."""
    for step in (5, 10):
        checkpoint = tmp_path / "checkpoints" / f"step-{step}"
        checkpoint.mkdir(parents=True)
        save_file({"master/x": torch.rand(50)}, checkpoint / "state.safetensors")
        (checkpoint / "state.json").write_text(
            f'{{"format": {FORMAT}, "step": {step}, "about": "{"-" * 99}"}}'
        )
        write_sums(checkpoint)
    return tmp_path


def step_taken(run: Path) -> int:
    whole = newest_undamaged(run)
    assert whole is not None
    return int(read_state(whole)["step"])


def test_the_newest_is_taken_when_it_is_whole_and_names_that_are_no_checkpoints_are_passed_over(
    run: Path,
) -> None:
    for name in ("step-20.tmp", "step-30.damaged", "best-15", "step-x"):
        shutil.copytree(run / "checkpoints/step-10", run / "checkpoints" / name)
    assert step_taken(run) == 10
    assert newest_checkpoint(run).name == "step-10"
    assert newest_undamaged(run / "elsewhere") is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "empty", "missing"])
def test_damage_to_any_file_is_reported_and_the_checkpoint_before_is_taken(
    name: str, damage: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = run / "checkpoints/step-10" / name
    content = path.read_bytes()
    drawn = random.Random(0)
    for place in {0, 1, len(content) - 1, *(drawn.randrange(len(content)) for _ in range(20))}:
        changed = bytearray(content)
        changed[place] ^= 1 << drawn.randrange(7)
        if damage == "missing":
            path.unlink()
        else:
            damaged = {"flipped": changed, "cut": content[:place], "longer": content + b"\n0", "empty": b""}
            path.write_bytes(damaged[damage])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert step_taken(run) == 5
        assert [f"{run / 'checkpoints/step-10'} is damaged" in r.message for r in caplog.records] == [True]
        with pytest.raises(RunError, match="is damaged"):
            check(path.parent)
        path.write_bytes(content)
    assert step_taken(run) == 10


def test_the_sums_are_those_of_sha256sum(run: Path) -> None:
    for checkpoint in (run / "checkpoints").iterdir():
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=checkpoint, check=True)


def test_a_checkpoint_of_another_format_is_refused_not_passed_over(run: Path) -> None:
    newest = run / "checkpoints/step-10"
    (newest / "state.json").write_text('{"format": 1}')
    write_sums(newest)
    with pytest.raises(RunError, match=f"has format 1: this version reads format {FORMAT}"):
        newest_undamaged(run)
