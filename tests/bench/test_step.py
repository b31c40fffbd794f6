"""The benchmark of what dynamic ranks add to a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.launch import Started, outcomes, run_worker, start_processes, wait
from tests.support.methods import METHODS
from tests.support.recipes import write_recipe


def bench(world_size: int, recipe: Path, *overrides: str) -> list[Started]:
    command = ["-m", "dynrank_ds.bench", "step", "--quick", "--recipe", str(recipe), *overrides]
    started = start_processes(world_size, command, recipe.parent / "logs")
    wait(started)
    return started


@pytest.mark.parametrize(("world_size", "method"), [(1, "weightlora_plus"), (2, "pe_dyra")])
def test_it_prints_what_a_method_and_an_adjustment_add(world_size: int, method: str, tmp_path: Path) -> None:
    overrides = [f"method.{key}={value}" for key, value in METHODS[method].items()]
    process, *others = bench(world_size, write_recipe(tmp_path), *overrides)
    assert process.returncode == 0, process.output
    assert all(other.returncode == 0 and "with fixed" not in other.output for other in others)
    for what in (
        "with fixed",
        "the method adds",
        "inside backward",
        "in observation",
        "one adjustment",
        "the step after it",
        "added, adjusting",
    ):
        assert f"step       {what}" in process.output


def test_the_method_sees_the_steps_in_which_it_works_and_ranks_change_only_in_an_adjustment(
    tmp_path: Path,
) -> None:
    write_recipe(tmp_path)  # adjusts at 4, 7, 10, 13, 16
    run_worker(1, "step_timing", tmp_path)
    assert outcomes(tmp_path, "seen", 1)[0] == [
        [15, True, True, True, 0],
        [15, False, True, False, 0],
        [4, True, True, True, 1],
        [15, True, True, True, 1],
    ]


def test_time_inside_is_that_of_the_methods_own_work(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    run_worker(1, "step_timing", tmp_path)
    inside = outcomes(tmp_path, "inside", 1)[0]
    in_backward, in_observation = (
        0.01 * 14 * 6,
        0.01,
    )  # 14 linears in 6 micro-batches, each call made 10 ms slower
    print(inside, in_backward, in_observation)
    assert inside["on_backward"] > in_backward
    assert in_observation < inside["observe"] < in_backward
    assert sum(inside.values()) < 1.5 * (in_backward + in_observation)


def test_a_method_without_adjustments_is_reported(tmp_path: Path) -> None:
    [process] = bench(1, write_recipe(tmp_path), "method.name=lora")
    assert process.returncode == 2
    assert "error: method.name is lora, which never adjusts ranks: give another" in process.output
