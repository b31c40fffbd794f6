"""A process that dies, hangs or fails ends the others in a stated time, with a message that says which."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from dynrank_ds.zero.peer_failure import GRACE
from tests.support.launch import Started, reported_errors, start_processes, train_command, wait, wait_until
from tests.support.recipes import lines, write_recipe

TIMEOUT = 8.0


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of more steps than a test waits for."""
    return write_recipe(tmp_path_factory.mktemp("lost"))


def running(recipe: Path, name: str, world_size: int, zero: str = "zero3") -> list[Started]:
    """Processes of a run that has made a step."""
    run = recipe.parent / name
    command = train_command(
        recipe,
        f"output.dir={run}",
        "train.steps=10000",
        "train.global_batch_size=12",  # of one to four processes
        f"deepspeed.timeout={TIMEOUT}",
        "method.interval=1000",
        f"deepspeed.config={zero}",
    )
    processes = start_processes(world_size, command, recipe.parent / "logs")
    wait_until(lambda: (run / "metrics.jsonl").is_file() and lines(run / "metrics.jsonl"), processes)
    return processes


@pytest.mark.parametrize("world_size, victim", [pytest.param(4, 2, marks=pytest.mark.slow), (2, 0)])
def test_one_that_dies_is_named_soon(recipe: Path, world_size: int, victim: int) -> None:
    processes = running(recipe, f"dies-{victim}", world_size)
    os.kill(processes[victim].pid, signal.SIGKILL)
    begun = time.monotonic()
    wait(processes)
    assert time.monotonic() - begun < 3 * GRACE
    others = [p for number, p in enumerate(processes) if number != victim]
    assert [p.returncode for p in others] == [1] * (world_size - 1)
    [message] = reported_errors(processes)
    assert f"process {victim} died or hung" in message and "resume=auto" in message
    assert not any("Traceback" in p.output for p in others)
    state = json.loads((recipe.parent / f"dies-{victim}" / "state.json").read_text())
    assert state["state"] == "failed" and f"process {victim} died or hung" in state["error"]


@pytest.mark.parametrize(
    "victim, zero",
    [
        (1, "zero3"),
        pytest.param(1, "zero2", marks=pytest.mark.slow),
        pytest.param(0, "zero3", marks=pytest.mark.slow),
    ],
)
def test_one_that_hangs_is_named_after_the_timeout(recipe: Path, victim: int, zero: str) -> None:
    processes = running(recipe, f"hangs-{victim}-{zero}", 2, zero)
    os.kill(processes[victim].pid, signal.SIGSTOP)
    begun = time.monotonic()
    other = processes[1 - victim]
    try:
        wait([other])
        seconds = time.monotonic() - begun
    finally:
        os.kill(processes[victim].pid, signal.SIGKILL)
    assert TIMEOUT - 1 < seconds < TIMEOUT + 3 * GRACE
    assert other.returncode == 1
    [message] = reported_errors([other])
    assert f"process {victim} died or hung" in message
    wait(processes)


def test_one_whose_run_hangs_is_named_though_it_answers(recipe: Path) -> None:
    processes = running(recipe, "waits", 3)
    run = recipe.parent / "waits"
    # The first process waits for ever for a reader of its log.
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    try:
        wait(processes[1:])
    finally:
        os.kill(processes[0].pid, signal.SIGKILL)
    [message] = reported_errors(processes[1:])
    assert "in every process but 0, which may hang: " in message
    wait(processes)


def test_one_that_fails_is_named_with_its_error(recipe: Path) -> None:
    processes = running(recipe, "fails", 3)
    # The first process cannot log any more.
    run = recipe.parent / "fails"
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    wait(processes)
    assert [p.returncode for p in processes] == [1, 1, 1]
    assert "IsADirectoryError" in processes[0].output
    state = json.loads((run / "state.json").read_text())
    assert state["state"] == "failed" and state["step"] >= 1
    assert state["error"].startswith("process 0 failed first: IsADirectoryError")
    [message] = reported_errors(processes)
    assert "process 0 failed first: IsADirectoryError" in message
