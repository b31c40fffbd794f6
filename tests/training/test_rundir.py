"""What a run's directory may be, and what is noted there."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynrank_ds.checkpoints import STEP
from dynrank_ds.errors import RunError
from dynrank_ds.training import checkpoint
from dynrank_ds.training.loop import StepResult
from dynrank_ds.training.rundir import RunDirectory, _environment, check_output
from dynrank_ds.training.saving import Saving


@pytest.mark.parametrize("name", ["file", "file/run", "file/a/b"])
def test_a_directory_that_cannot_be_made_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"output\.dir .*file.* is a file: give a new folder"):
        check_output(tmp_path / name, resume=True)


def test_a_new_directory_and_an_empty_one_are_taken(tmp_path: Path) -> None:
    check_output(tmp_path, resume=False)
    check_output(tmp_path / "a" / "b", resume=False)


def test_a_machine_without_git_has_no_revision_to_note(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _environment(world_size=1)["git_revision"] is None


def test_logs_are_cut_after_a_checkpoints_last_batch(tmp_path: Path) -> None:
    batches = [(1, 1), (1, 2), (2, 3), (2, 4), (3, 5)]
    lines = [json.dumps({"step": step, "batch": batch}) + "\n" for step, batch in batches]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    (tmp_path / "ranks.jsonl").write_text('{"step": 2}\n{"step": 3}\n{"st')
    RunDirectory(tmp_path).cut_logs(step=2, batch=3)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:3])
    assert (tmp_path / "ranks.jsonl").read_text() == '{"step": 2}\n'


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint._remove_old([tmp_path / "gone"])
    assert "an old checkpoint could not be removed" in caplog.text


def test_a_step_is_saved_once_however_often_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a signal while batches are discarded: what is there would have to go before the same can be written."""
    saved: list[Any] = []
    monkeypatch.setattr(checkpoint, "save", lambda *arguments: saved.append(arguments[-1]))
    trainer: Any = SimpleNamespace(
        progress=SimpleNamespace(step=4),
        recipe=SimpleNamespace(train=SimpleNamespace(checkpoint_interval=2, checkpoints_kept=2)),
        run=SimpleNamespace(path=tmp_path),
        about={},
        engine=None,
        method=None,
        total_steps=9,
    )
    saving = Saving(trainer)
    saving.after_step(StepResult(1.0, 1.0, stop=False, applied=True))
    saving.after_step(StepResult(1.0, 1.0, stop=True, applied=False))
    assert saved == [STEP]
