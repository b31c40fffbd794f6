"""A run that is killed at any instant loses nothing but the steps since its last checkpoint."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.launch import Started, start_processes, train_command, wait
from tests.support.recipes import STEPS, lines

EVERY_TWO = "train.checkpoint_interval=2"


@dataclass(frozen=True)
class Kill:
    """When which process dies: the first time it passes the point in `step` or later."""

    point: str
    step: int
    process: int
    resumes_at: int
    """The step of the newest checkpoint that was complete before."""


# Adjustments are at steps 4, 7, 10, 13 and 16; only the first process writes.
PLANNED = [
    Kill("before the model is loaded", 0, 1, 0),
    Kill("with half a recipe written", 0, 0, 0),
    Kill("in a forward", 3, 1, 2),
    Kill("with one tensor written", 4, 0, 2),
    Kill("with changed modules gathered", 7, 1, 6),
    Kill("before the rename", 8, 0, 6),
    Kill("while an old checkpoint is removed", 10, 0, 10),
    Kill("with half a line logged", 13, 0, 12),
    Kill("with the adapter written but not renamed", STEPS, 0, STEPS),
]
MORE = [
    Kill("with half a line logged", 1, 0, 0),
    Kill("with a checkpoint's folder made", 2, 0, 0),
    Kill("after a backward", 3, 0, 2),
    Kill("before an adjustment", 4, 1, 2),
    Kill("before an adjustment", 4, 0, 2),
    Kill("before the engine is rebuilt", 4, 0, 2),
    Kill("before the engine is rebuilt", 4, 1, 2),
    Kill("with all tensors written", 4, 0, 2),
    Kill("before the sums", 6, 0, 4),
    Kill("after the rename", 6, 0, 6),
    Kill("with changed modules gathered", 7, 0, 6),
    Kill("after an adjustment", 7, 1, 6),
    Kill("after an adjustment", 7, 0, 6),
    Kill("after an optimizer step", 9, 1, 8),
    Kill("in a forward", 10, 0, 8),
    Kill("with one tensor written", 12, 0, 10),
    Kill("before the rename", 14, 0, 12),
    Kill("after an optimizer step", 16, 0, 14),
    Kill("with all tensors written", STEPS, 0, 18),
    Kill("with the adapter exported", STEPS, 0, STEPS),
]


def start(uninterrupted: Path, run: Path, *kill: str) -> list[Started]:
    """The resumed run, in two processes of which one may kill itself."""
    # One that is killed before the processes have met is waited for.
    options = (EVERY_TWO, "deepspeed.timeout=15", f"output.dir={run}", "resume=auto")
    _, *arguments = train_command(uninterrupted / "recipe.yaml", *options)
    command = ["-m", "tests.zero.workers.killed", *(kill or ("nowhere", "0", "0")), *arguments]
    return start_processes(2, command, uninterrupted / "logs")


def resumed_at(processes: list[Started]) -> int:
    found = re.search(r"resumed from \S*step-(\d+)", processes[0].output)
    return int(found[1]) if found else 0


def killed(uninterrupted: Path, run: Path, kill: Kill) -> int:
    """Kill the run as planned, and return the step that it had resumed from."""
    processes = start(uninterrupted, run, kill.point, str(kill.step), str(kill.process))
    wait(processes)
    outputs = [process.output for process in processes]
    codes = [process.returncode for process in processes]
    assert codes[kill.process] == -signal.SIGKILL, (kill, outputs)
    assert codes[1 - kill.process] == 1, (kill, outputs)
    assert f"process {kill.process} died or hung" in outputs[1 - kill.process], (kill, outputs)
    return resumed_at(processes)


def check_the_same_run(run: Path, uninterrupted: Path) -> None:
    whole = uninterrupted / "run"
    for log, keys in (
        ("metrics.jsonl", ("step", "loss")),
        ("ranks.jsonl", ("step", "after", "scores", "plan_sha256")),
    ):
        first, second = ([[line[k] for k in keys] for line in lines(r / log)] for r in (run, whole))
        assert first == second
    weights = "adapter/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (whole / weights).read_bytes()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"step-{STEPS - 2}", f"step-{STEPS}"]
    assert not [path for path in run.rglob("*.tmp")]


def go_through(kills: list[Kill], uninterrupted: Path, run: Path) -> None:
    expected = 0
    for kill in kills:
        assert killed(uninterrupted, run, kill) == expected, kill
        expected = kill.resumes_at
    processes = start(uninterrupted, run)
    wait(processes)
    assert [process.returncode for process in processes] == [0, 0], [p.output for p in processes]
    assert resumed_at(processes) == expected
    check_the_same_run(run, uninterrupted)


def test_a_run_killed_at_three_planned_instants_ends_bit_for_bit_as_the_uninterrupted_one(
    uninterrupted: Path,
) -> None:
    go_through(PLANNED[2::3], uninterrupted, uninterrupted / "killed-thrice")


@pytest.mark.slow
def test_a_run_killed_at_nine_planned_instants_does_too(uninterrupted: Path) -> None:
    go_through(PLANNED, uninterrupted, uninterrupted / "killed")


@pytest.mark.soak
def test_a_run_killed_at_twenty_more_planned_instants_does_too(uninterrupted: Path) -> None:
    go_through(MORE, uninterrupted, uninterrupted / "killed-more")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_ten_random_instants_does_too(uninterrupted: Path, seed: int) -> None:
    print("seed", seed)
    drawn = random.Random(seed)
    run = uninterrupted / f"killed-random-{seed}"
    kills = 0
    while kills < 10:
        processes = start(uninterrupted, run)
        time.sleep(drawn.uniform(0, 6))
        victim = processes[drawn.randrange(2)]
        if victim.returncode is None:
            os.kill(victim.pid, signal.SIGKILL)
        wait(processes)
        if victim.returncode == 0:  # it had finished: begin another one
            check_the_same_run(run, uninterrupted)
            run = run.with_name(f"{run.name}-again")
        else:
            kills += 1
    processes = start(uninterrupted, run)
    wait(processes)
    assert [process.returncode for process in processes] == [0, 0], [p.output for p in processes]
    check_the_same_run(run, uninterrupted)
