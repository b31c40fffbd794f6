"""What a run's directory may be, and what is noted there."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from dynrank_ds.checkpoint import files
from dynrank_ds.checkpoint.files import complete_checkpoints, incomplete_checkpoints
from dynrank_ds.errors import RunError
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.rundir import RunDirectory, _environment, check_output


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


def test_an_old_checkpoint_that_cannot_be_removed_is_reported_and_no_checkpoint_any_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "somebody reads it", str(path))

    for name in ("step-2", "step-4.old.tmp", "step-6"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    monkeypatch.setattr(files.shutil, "rmtree", busy)
    files.remove([*complete_checkpoints(tmp_path)[1:], *incomplete_checkpoints(tmp_path)])
    monkeypatch.undo()
    assert complete_checkpoints(tmp_path) == [tmp_path / "checkpoints" / "step-6"]
    left = sorted(path.name for path in incomplete_checkpoints(tmp_path))
    assert left == ["step-2.old.tmp", "step-4.old.tmp"]
    assert caplog.text.count("could not be removed") == 2


def test_a_directory_is_one_runs_at_a_time_and_goes_when_nothing_was_written(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first, second = RunDirectory(path), RunDirectory(path)
    assert first.lock() and not second.lock()
    second.unlock()
    assert not second.lock()
    first.unlock()
    assert not path.exists()
    assert second.lock()
    second.log_step(step=1)
    second.unlock()
    assert path.is_dir() and first.lock()


def test_a_run_that_failed_before_its_first_step_leaves_no_directory(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart")
    path = tmp_path / "runs" / "run"

    def begun() -> RunDirectory:
        directory = RunDirectory(path)
        assert directory.lock()
        directory.create(recipe, {}, 1)
        (path / "state.json").write_text("{}")
        return directory

    begun().unlock()
    assert not path.exists()
    discarded = begun()
    discarded.log_step(step=0, batch=1)
    discarded.unlock()
    assert not path.exists()
    stepped = begun()
    stepped.log_step(step=0, batch=1)
    stepped.log_step(step=1, batch=2)
    stepped.unlock()
    assert path.exists()
    (path / "metrics.jsonl").unlink()
    (path / "checkpoints" / "step-1").mkdir()
    resumed = RunDirectory(path)
    resumed.lock()
    resumed.unlock()
    assert path.exists(), "a checkpoint is worth more than the log"
    (path / "checkpoints" / "step-1").rmdir()
    (path / "metrics.jsonl").mkdir()
    replaced = RunDirectory(path)
    replaced.lock()
    replaced.unlock()
    assert path.exists(), "no run leaves a folder in place of its log"
