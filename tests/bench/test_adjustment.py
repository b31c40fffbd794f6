"""The benchmark of a single adjustment: what it notes is what happened, and what it makes of the notes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dynrank_ds.bench.adjusting import Adjustment, read_adjustments
from dynrank_ds.bench.adjustment import Point, figure_of, growth, in_a_row
from dynrank_ds.bench.cli import main
from tests.support.launch import outcomes, quick_benchmark, run_worker
from tests.support.recipes import lines, write_recipe

MIB = 2**20
ONE = Adjustment({"scores": 0.1, "resize": 0.7, "rest": 0.2}, {"allreduce": 3}, MIB, 2, 50 * MIB, 80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adjustments in two processes."""
    folder = tmp_path_factory.mktemp("adjusting")
    write_recipe(folder)
    run_worker(2, "adjusting", folder)
    return folder


def test_what_is_noted_of_an_adjustment_is_what_the_run_logged(folder: Path) -> None:
    logged = lines(folder / "run" / "ranks.jsonl")
    assert len(logged) == 3
    for process in read_adjustments(folder):
        changed = [len(line["pruned"].keys() | line["added"].keys()) for line in logged]
        assert [adjustment.changed for adjustment in process] == changed
    for adjustment, line in zip(read_adjustments(folder)[0], logged, strict=True):
        in_the_trainer = adjustment.seconds["resize"] + adjustment.seconds["rest"]
        # The trainer's clock starts before the plan and stops behind `applied`, both a few instructions away.
        assert adjustment.seconds["resize"] < line["seconds"]
        assert in_the_trainer < line["seconds"] + 0.01
        assert all(seconds > 0 for seconds in adjustment.seconds.values())


def test_processes_issue_the_same_collectives_and_hooks_stay(folder: Path) -> None:
    first, second = read_adjustments(folder)
    for one, other in zip(first, second, strict=True):
        assert one.collectives == other.collectives and one.received == other.received
        assert (
            sum(one.collectives.values()) >= 4
        )  # two of scores, the check of the plan, one that gathers rows
    assert len({adjustment.hooks for adjustment in [*first, *second]}) == 1
    assert first[0].hooks > 0


def test_collectives_are_counted_with_the_bytes_they_write(folder: Path) -> None:
    expected = [4, 10 * 4 + 2 * 3 * 8 + 5 * 4]
    for calls, written in outcomes(folder, "known", 2):
        # A barrier is a collective too, and gloo may hand it a tensor.
        assert [calls, written] == expected


def test_a_point_takes_the_slowest_process_and_leaves_out_the_first_adjustment() -> None:
    slow = replace(ONE, seconds={"scores": 0.1, "resize": 1.7, "rest": 0.2})
    figure = figure_of(Point(2, 56, 4), [[slow, *[ONE] * 6], [ONE, *[slow] * 6]])
    assert figure.values is not None
    assert figure.values["seconds"] == pytest.approx(2.0) and figure.values["parts"]["resize"] == 1.7
    assert figure.values["collectives"] == 3 and figure.values["bytes"] == MIB
    alone = figure_of(Point(2, 56, 4), [[slow, *[ONE] * 6], [slow, *[ONE] * 6]])
    assert alone.values is not None and alone.values["interval_95"] == pytest.approx([1.0, 1.0])


def test_growth_is_the_last_point_by_the_first() -> None:
    points = [Point(2, 56, 4), Point(2, 560, 4)]
    large = replace(ONE, seconds={"scores": 1.0, "resize": 2.0, "rest": 0.0}, collectives={"allreduce": 30})
    found = {point: figure_of(point, [[one] * 7]) for point, one in zip(points, (ONE, large), strict=True)}
    figure = growth("modules", points, found)
    assert figure.what == "2 processes, modules x 10"
    assert figure.text == "seconds x 3.00, collectives x 10.00, bytes x 1.00"


def test_adjustments_in_a_row_that_grow_are_told_from_those_that_stay() -> None:
    late = replace(ONE, seconds={"scores": 0.2, "resize": 1.4, "rest": 0.4}, resident=60 * MIB, hooks=81)
    [seconds, memory, hooks] = in_a_row(Point(2, 56, 4), [[ONE] * 21, [*[ONE] * 11, *[late] * 10]], 10)
    assert "2.000 [2.000, 2.000]" in seconds.text
    assert memory.text == "+10.0 MiB of 50" and hooks.text == "80 to 81"
    [seconds, memory, hooks] = in_a_row(Point(2, 56, 4), [[late, *[ONE] * 20]] * 2, 10)
    assert (
        "1.000 [1.000, 1.000]" in seconds.text
        and memory.text == "+0.0 MiB of 50"
        and hooks.text == "always 80"
    )


def test_it_is_started_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["adjustment", "--recipe", str(write_recipe(tmp_path))]) == 2
    assert "start their own processes" in capsys.readouterr().err


@pytest.mark.slow
def test_the_quick_run_prints_every_row(tmp_path: Path) -> None:
    printed = quick_benchmark("adjustment", write_recipe(tmp_path))
    for row in (
        "2 processes, 56 modules, rank 4",
        "2 processes, 112 modules, rank 4",
        "2 processes, modules x 2",
        "2 processes, 56 modules, rank 16",
        "2 processes, rank x 4",
        "24 in a row: hooks of the model",
    ):
        assert row in printed
