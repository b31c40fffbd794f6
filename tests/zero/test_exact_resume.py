"""What a resumed run holds before its first update is what the run that was not stopped held there, bit for bit.

Every save of seven processes is resumed by two, and some of two by seven, through the adjustments that follow.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.launch import outcomes, run_worker
from tests.support.recipes import STEPS, copy_stopped, lines, write_recipe

pytestmark = pytest.mark.slow

EVERY_SAVE = range(1, STEPS)
# Before, between and after adjustments, which are at steps 4, 7, 10, 13 and 16.
SOME = (3, 9, 17)
CASES = {"7-2": EVERY_SAVE, "2-7": SOME, "2-2": SOME}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs 7 and 2 of so many processes, and FROM-TO-STEP: run FROM resumed at STEP by TO processes."""
    folder = tmp_path_factory.mktemp("exact")
    write_recipe(folder)
    for size in (7, 2):
        run_worker(size, "exact", folder, "record", str(size))
    for case, saves in CASES.items():
        saved_by, resumed_by = case.split("-")
        for step in saves:
            copy_stopped(folder / saved_by, folder / f"{case}-{step}", step)
        run_worker(int(resumed_by), "exact", folder, saved_by, *(f"{case}-{step}" for step in saves))
    return folder


@pytest.mark.parametrize(("case", "step"), [(case, step) for case, saves in CASES.items() for step in saves])
def test_weights_moments_and_ages_are_exact_and_the_run_goes_on_as_the_other(
    case: str, step: int, folder: Path
) -> None:
    saved_by, resumed_by = case.split("-")
    run, whole = folder / f"{case}-{step}", folder / saved_by
    assert outcomes(folder, f"differing-{run.name}", int(resumed_by)) == [[]] * int(resumed_by)
    before, after = ([line["loss"] for line in lines(r / "metrics.jsonl")] for r in (whole, run))
    assert len(after) == STEPS
    difference = max(abs(one - other) for one, other in zip(before, after, strict=True))
    print("largest difference of losses", difference)
    assert difference == 0 if saved_by == resumed_by else difference <= 1e-6
    plans = [[line["plan_sha256"] for line in lines(r / "ranks.jsonl")] for r in (whole, run)]
    assert plans[0] == plans[1] and len(plans[0]) == 5
