"""A long run leaves nothing behind: memory, open files, hooks and the time of a step stay flat.

DYNRANK_SOAK_MINUTES says how long, 3 by default; tests/run.sh --soak takes 60. DYNRANK_SOAK_MODEL is a folder with a
real model to take in place of the random one of a few KiB, such as .cache/smollm2-135m-instruct. It is trained in fp32:
in bf16 on CPU oneDNN keeps a kernel for every new shape, up to a thousand, and memory grows for long.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import outcomes, run_worker
from tests.support.recipes import write_recipe

MINUTES = float(os.environ.get("DYNRANK_SOAK_MINUTES", "3"))
MODEL = os.environ.get("DYNRANK_SOAK_MODEL")
CYCLES_A_MINUTE = 1 if MODEL else 20
MIB = 2**20

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What each of two processes held after every cycle of an adjustment, a checkpoint and a held-out loss."""
    folder = tmp_path_factory.mktemp("soak")
    write_recipe(folder)
    real = [f"model.path={Path(MODEL).absolute()}"] if MODEL else []
    run_worker(2, "soak", folder, str(60 * MINUTES), *real, timeout=60 * MINUTES + 600)
    found: list[list[dict[str, Any]]] = outcomes(folder, "cycles", 2)
    print(f"{len(found[0])} cycles in {MINUTES} minutes")
    for process in found:
        assert len(process) > CYCLES_A_MINUTE * MINUTES
    # The first cycles fill caches.
    return [process[len(process) // 4 :] for process in found]


def test_resident_memory_stays_flat(watched: list[list[dict[str, Any]]]) -> None:
    for process in watched:
        half = len(process) // 2
        early, late = (
            statistics.median(c["resident"] for c in part) for part in (process[:half], process[half:])
        )
        print(f"resident memory {early / MIB:.1f} -> {late / MIB:.1f} MiB")
        assert late - early < 8 * MIB + 0.02 * early


@pytest.mark.parametrize("what", ["files", "hooks", "threads", "checkpoints"])
def test_what_is_counted_stays_the_same(what: str, watched: list[list[dict[str, Any]]]) -> None:
    for process in watched:
        assert {cycle[what] for cycle in process} == {process[0][what]}


def test_the_time_of_a_cycle_stays_flat(watched: list[list[dict[str, Any]]]) -> None:
    for process in watched:
        half = len(process) // 2
        early, late = (
            statistics.median(c["seconds"] for c in part) for part in (process[:half], process[half:])
        )
        print(f"CPU seconds of a cycle {early:.3f} -> {late:.3f}")
        assert late < 1.5 * early
