"""Scores and paired differences of compared runs, against values computed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynrank_ds.report import write_report
from dynrank_ds.report.evaluation import evaluation_plots, paired_differences
from dynrank_ds.report.page import _records
from dynrank_ds.report.record import read_run

from .conftest import START, write_lines, write_run


def write_scores(folder: Path, verdicts: list[bool], protocol: str = "dynrank-math-v1") -> None:
    """An output folder of dynrank-eval, as far as comparing reads it."""
    folder.mkdir(parents=True)
    entry = dict(
        score=sum(verdicts) / len(verdicts),
        interval=[0.1, 0.9],
        n=len(verdicts),
        protocol=protocol,
        data_hash="d",
        samples_per_problem=1,
    )
    (folder / "results.json").write_text(json.dumps({"tasks": {"gsm8k": entry}}))
    rows = [
        dict(task="gsm8k", task_id=str(number), verdict="correct" if right else "wrong")
        for number, right in enumerate(verdicts)
    ]
    write_lines(folder / "samples.jsonl", rows)


def test_the_difference_is_taken_problem_by_problem(run: Path, lora_run: Path) -> None:
    # Of 10 problems both solve 3, this run 5 that the other does not, the other 1.
    write_scores(run / "eval", [True] * 3 + [True] * 5 + [False] + [False])
    write_scores(lora_run / "eval", [True] * 3 + [False] * 5 + [True] + [False])
    record, other = read_run(run), read_run(lora_run)
    (found,), remarks = paired_differences(record, [other])
    assert remarks == []
    assert (found.task, found.other, found.problems) == ("gsm8k", "lora", 10)
    assert found.difference == pytest.approx(0.4)
    assert found.p_value == pytest.approx(2 * (1 + 6) / 2**6)  # McNemar: 6 discordant pairs, 5 to 1
    # Agresti and Min: half a problem more in each cell, (5.5 - 1.5) / 12 +- 1.96 sqrt((7 / 12 - 1 / 9) / 12).
    half = 1.959964 * ((7 / 12 - 1 / 9) / 12) ** 0.5
    assert (found.low, found.high) == pytest.approx((1 / 3 - half, 1 / 3 + half))

    (plot,) = evaluation_plots(record, [other], [found])
    assert [row[:4] for row in plot.rows] == [
        ("score", "gsm8k", "run", 0.8),
        ("score", "gsm8k", "lora", 0.4),
        ("difference, McNemar, exact", "gsm8k", "lora", pytest.approx(0.4)),
    ]
    text = write_report(run, compare=[lora_run]).read_text()
    assert "<td>+40.0 [-5.5, +72.2]</td><td>0.22</td>" in text


def test_scores_that_cannot_be_paired_are_shown_with_the_reason(run: Path, lora_run: Path) -> None:
    write_scores(run / "eval", [True, False])
    write_scores(lora_run / "eval", [True, True], protocol="metamath-v2")
    differences, remarks = paired_differences(read_run(run), [read_run(lora_run)])
    assert differences == [] and len(remarks) == 1
    assert "are not paired" in remarks[0] and "scored by different protocols" in remarks[0]
    (plot,) = evaluation_plots(read_run(run), [read_run(lora_run)], [])
    assert len(plot.figure.axes) == 1 and len(plot.rows) == 2


def test_scores_of_slurm_jobs_are_found_too(run: Path) -> None:
    write_scores(run / "eval/all", [True, False])
    assert read_run(run).scores["gsm8k"] == (0.5, 0.1, 0.9)


def test_runs_without_scores_have_no_such_figure(run: Path, lora_run: Path) -> None:
    assert paired_differences(read_run(run), [read_run(lora_run)]) == ([], [])
    assert evaluation_plots(read_run(run), [read_run(lora_run)], []) == []


def test_runs_of_the_same_name_are_told_apart_by_the_folder_above(tmp_path: Path) -> None:
    for parent, verdict in (("first", True), ("second", False)):
        write_scores(write_run(tmp_path / parent / "run", START, "lora") / "eval", [verdict, False])
    records = _records([tmp_path / "first/run", tmp_path / "second/run"])
    (found,), _ = paired_differences(records[0], records[1:])
    assert records[0].name == "first/run" and found.other == "second/run" and found.difference == 0.5
