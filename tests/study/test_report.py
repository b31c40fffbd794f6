"""The report of a study, from records whose figures were worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynrank_ds.study.definition import Run, Study, load_study, points
from dynrank_ds.study.report import write_study_report
from tests.support.studies import add_scores, write_study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """LoRA is best at its second of three rates; PE-DyRA has one."""
    path = write_study(tmp_path)
    path.write_text(path.read_text().replace("      - 0.01\n", "      - 0.01\n      - 0.1\n", 1))
    study = load_study(path)
    for point, solved in zip(points(study, "lora"), (1, 2, 0), strict=True):
        add_scores(study, Run(point, 1), "tuning", [1] * solved + [0] * (3 - solved))
    add_scores(study, Run(points(study, "pe_dyra")[0], 1), "tuning", [1, 1, 1])
    return study


def finish(study: Study, lora: list[list[int]], pe_dyra: list[list[int]], parameters: int = 4000) -> str:
    for arm, place, seeds in (("lora", 1, lora), ("pe_dyra", 0, pe_dyra)):
        for seed, shares in enumerate(seeds, start=1):
            own = parameters if arm == "pe_dyra" else 4000
            add_scores(study, Run(points(study, arm)[place], seed), "final", shares, own)
    return write_study_report(study, "python launcher/sweep.py report study.yaml", 3, 160).read_text()


def test_scores_and_differences_stand_in_the_tables(study: Study) -> None:
    half, most = [1, 0] * 80, [1, 1, 1, 0] * 40
    text = finish(study, [half, half], [most, half])
    assert "| lora | learning_rate=0.01 | 66.7 % | 50.0 % [" in text
    assert "| pe_dyra | learning_rate=0.001 | 100.0 % | 62.5 % [" in text and "75.0 %, 50.0 %" in text
    assert "| pe_dyra | +12.5 [" in text
    assert "not told apart from it: pe_dyra (by this study between" in text
    assert "edge" not in text


def test_a_difference_beyond_chance_is_called_one(study: Study) -> None:
    half, all_solved = [1, 0] * 80, [1] * 160
    text = finish(study, [half, half], [all_solved, all_solved])
    assert "- better than tuned lora, after Holm's correction: pe_dyra." in text
    assert "| < 0.001 | < 0.001 | yes |" in text
    assert "- worse than tuned lora, after Holm's correction: none." in text


def test_an_arm_with_another_budget_is_shown_but_not_tested(study: Study, tmp_path: Path) -> None:
    half, all_solved = [1, 0] * 80, [1] * 160
    for point in points(study, "pe_dyra"):
        (tmp_path / "results" / f"{Run(point, 1).name}.json").unlink()
        add_scores(study, Run(point, 1), "tuning", [1, 1, 1], parameters=5000)
    text = finish(study, [half, half], [all_solved, all_solved], parameters=5000)
    assert "| < 0.001 |  | no |" in text and "nothing can be said" in text


def test_an_unfinished_study_says_what_is_missing(study: Study, tmp_path: Path) -> None:
    text = write_study_report(study, "python launcher/sweep.py report study.yaml", 3, 160).read_text()
    assert "- lora: 3 of 3 tuning runs are done, final runs are not." in text
    assert "nothing can be said" in text
    assert (tmp_path / "results/learning_rates.svg").stat().st_size > 1000
    rows = (tmp_path / "results/tuning.csv").read_text().splitlines()
    assert rows[0] == "arm,point,seed,tuning score,loss,parameters,seconds" and len(rows) == 5


def test_a_best_point_at_the_edge_of_its_grid_is_named(study: Study, tmp_path: Path) -> None:
    point = points(study, "lora")[2]
    (tmp_path / "results" / f"{Run(point, 1).name}.json").unlink()
    add_scores(study, Run(point, 1), "tuning", [1, 1, 1])
    for seed in (1, 2):
        add_scores(study, Run(point, seed), "final", [1, 0] * 80)
    text = write_study_report(study, "python launcher/sweep.py report study.yaml", 3, 160).read_text()
    assert "| lora | learning_rate=0.1, at the grid's edge |" in text


def test_a_run_that_diverged_counts_as_nothing_solved(study: Study) -> None:
    add_scores(study, Run(points(study, "lora")[1], 2), "final", [], diverged="not finite")
    text = finish(study, [[1, 0] * 80], [[1, 0] * 80, [1, 0] * 80])
    assert "| lora | learning_rate=0.01 | 66.7 % | 25.0 % [" in text
