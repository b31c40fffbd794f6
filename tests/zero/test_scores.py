"""Scores come from shards, plans from scores: neither depends on how many processes there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynrank_ds.recipe import load_recipe
from tests.support.launch import outcomes, run_worker
from tests.support.recipes import lines, write_recipe
from tests.support.replay import check_plans_follow_from_the_log


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores")
    write_recipe(folder)
    return folder


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def scored(request: pytest.FixtureRequest, folder: Path) -> tuple[Path, list[Any]]:
    """The run directory and what each process noted."""
    run_worker(request.param, "scores", folder)
    run = folder / f"scores{request.param}"
    return run, outcomes(run, "scores", request.param)


def test_scores_from_shards_equal_scores_from_whole_tensors(scored: tuple[Path, list[Any]]) -> None:
    for process in scored[1]:
        assert len(process["errors"]) == 5
        assert max(process["errors"]) <= 1e-6, process["errors"]


def test_every_process_makes_the_plan_that_is_logged(scored: tuple[Path, list[Any]]) -> None:
    run, noted = scored
    logged = [line["plan_sha256"] for line in lines(run / "ranks.jsonl")]
    assert all(process["plans"] == logged for process in noted)


def test_logged_scores_give_the_logged_plan_without_any_process_group(
    scored: tuple[Path, list[Any]], folder: Path
) -> None:
    check_plans_follow_from_the_log(scored[0], load_recipe(str(folder / "recipe.yaml")))


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The same run in one process."""
    run_worker(1, "runs", folder, f"output.dir={folder / 'alone'}")
    return folder / "alone"


def test_one_process_and_several_make_the_same_plans(scored: tuple[Path, list[Any]], alone: Path) -> None:
    plans = [[line["plan_sha256"] for line in lines(run / "ranks.jsonl")] for run in (scored[0], alone)]
    assert len(plans[0]) == 5 and plans[0] == plans[1]
