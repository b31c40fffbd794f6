"""A hundred rank changes leave nothing behind: no hooks, no engines, no memory."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.launch import outcomes, run_worker
from tests.support.recipes import write_recipe

pytestmark = pytest.mark.slow
MIB = 2**20


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """For each of two processes, what was counted after each of its adjustments."""
    folder = tmp_path_factory.mktemp("rebuilds")
    write_recipe(folder)
    run_worker(2, "rebuilds", folder)
    return outcomes(folder / "rebuilds", "counts", 2)


def test_there_are_a_hundred_adjustments_that_shrink_and_grow_modules(counts: Any) -> None:
    for process in counts:
        assert len(process) >= 100
        moved = [count["ranks"] for count in process if count["ranks"][0] != count["ranks"][1]]
        assert len(moved) >= 10
        assert all(sum(before) == sum(after) for before, after in moved)


def test_no_module_gathers_hooks(counts: Any) -> None:
    for process in counts:
        for count in process:
            assert count["hooks"] == process[0]["hooks"]


def test_every_replaced_parameter_is_gone(counts: Any) -> None:
    for process in counts:
        assert all(count["old_parameters_are_gone"] for count in process)


def test_every_replaced_engine_is_gone(counts: Any) -> None:
    for process in counts:
        early, late = process[19], process[99]
        assert all(count["old_engine_is_gone"] for count in process if count["ranks"][0] != count["ranks"][1])
        assert set(early["alive"].values()) == set(late["alive"].values()) == {1}


def test_no_tensors_and_objects_pile_up(counts: Any) -> None:
    for process in counts:
        early, late = process[19], process[99]
        assert late["tensors"] <= early["tensors"] + 10
        # A few of the notes' own for each of the 80 adjustments.
        print("objects", early["objects"], late["objects"])
        assert late["objects"] - early["objects"] < 80 * 10


def test_resident_memory_stays_flat(counts: Any) -> None:
    for process in counts:
        grown = process[99]["resident"] - process[19]["resident"]
        print(f"80 adjustments: {grown / MIB:+.1f} MiB")
        assert grown < 16 * MIB
