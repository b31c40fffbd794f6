"""The plans of a run follow from its log alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from dynrank_ds.cli import main
from tests.support.recipes import lines


def test_every_logged_plan_follows_from_the_log(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--run", str(uninterrupted / "run"), "--replay"]) == 0
    assert capsys.readouterr().out == "all 5 logged plans follow from the logged scores and ranks\n"


def test_a_plan_that_does_not_follow_from_the_log_is_named(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted / "run", run)
    logged = lines(run / "ranks.jsonl")
    scores = logged[2]["scores"]
    logged[2]["scores"] = {name: values[::-1] for name, values in scores.items()}
    (run / "ranks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    assert main(["report", "--run", str(run), "--replay"]) == 1
    assert "1 of 5 logged plans do not follow from the log: steps [10]" in capsys.readouterr().out


def test_a_run_whose_starting_adapter_is_gone_is_replayed_too(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted / "run", run)
    recipe = yaml.safe_load((run / "recipe.resolved.yaml").read_text())
    recipe["adapter"]["init_from"] = str(tmp_path / "gone")
    (run / "recipe.resolved.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["report", "--run", str(run), "--replay"]) == 0
    assert "all 5 logged plans" in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--run", str(tmp_path), "--replay"]) == 2
    assert "recipe.resolved.yaml does not exist: name the folder of a training run" in capsys.readouterr().err
