"""Runs programs: each one's solution and its tests in two cells that talk through pipes."""

import os
import queue
import random
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dynrank_ds.errors import MachineError
from dynrank_eval.sandbox.cell import Cell, tasks_of
from dynrank_eval.sandbox.isolation import Isolation, detect
from dynrank_eval.sandbox.limits import Limits, Outcome, Program, Result

# Ids that the UIDS-GIDS convention of systemd leaves to nobody.
_UNUSED_UIDS = range(60706, 61184)
# The interpreter's own start is not the program's time: machines under load take seconds for it.
_STARTUP_SECONDS = 60.0
_PROBE = Program(
    "import collections.abc, heapq, math, random, typing\ndef f():\n    return [1]\n",
    ("assert f() == [1]",),
    ("f",),
)


def check(isolation: Isolation | None = None) -> None:
    """Raises MachineError where the sandbox cannot run programs on this machine."""
    if run_programs([_PROBE], isolation=isolation)[0].outcome is not Outcome.PASSED:
        raise MachineError(
            "the sandbox cannot import the standard library; install Python where every user may read it."
        )


def run_programs(
    programs: Sequence[Program],
    limits: Limits | Sequence[Limits] | None = None,
    isolation: Isolation | None = None,
    workers: int | None = None,
    folder: Path | None = None,
) -> list[Result]:
    """Runs each program, as many at a time as there are CPUs unless `workers` says otherwise.

    Args:
        limits: for all, or one for each.
        isolation: the strongest of this machine where None.
        folder: where the programs' own folders are made; None: the system's place for temporary files.

    Raises:
        MachineError: a process could not be started or confined.
    """
    each = limits if isinstance(limits, Sequence) else [limits or Limits()] * len(programs)
    isolation = isolation or detect()
    workers = max(1, min(workers or os.cpu_count() or 1, len(programs), len(_UNUSED_UIDS) // 2))
    slots = _slots(workers, max((some.processes for some in each), default=0))

    def run_one(program: Program, some: Limits) -> Result:
        slot = slots.get()
        try:
            return _run(program, some, isolation, slot, folder)
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(run_one, programs, each)
        return list(tqdm(results, "running", len(programs), unit="program", disable=None))


@dataclass(frozen=True)
class _Slot:
    """Users for the two cells of a worker (None: stay), and how many tasks such a user may have."""

    solution_uid: int | None
    judge_uid: int | None
    tasks: int


def _slots(workers: int, processes: int) -> "queue.SimpleQueue[_Slot]":
    slots: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
    if os.geteuid() != 0:
        # An ordinary user's own tasks, and the other cells', count too.
        tasks = tasks_of(os.getuid()) + 2 * workers * processes
        for _ in range(workers):
            slots.put(_Slot(None, None, tasks))
        return slots
    # Drawn, so that two evaluators at a time hardly share a user.
    users = random.SystemRandom().sample(_UNUSED_UIDS, 2 * workers)
    for worker in range(workers):
        slots.put(_Slot(users[2 * worker], users[2 * worker + 1], processes))
    return slots


def _run(program: Program, limits: Limits, isolation: Isolation, slot: _Slot, where: Path | None) -> Result:
    with ExitStack() as stack, ExitStack() as pipes:
        questions, answers = os.pipe(), os.pipe()
        for end in (*questions, *answers):
            pipes.callback(os.close, end)
        solution = {"solution": program.solution, "reader": questions[0], "writer": answers[1]}
        tests = {
            "prelude": program.prelude,
            "names": list(program.names),
            "tests": list(program.tests),
            "reader": answers[0],
            "writer": questions[1],
        }
        cells = []
        for request, uid in ((solution, slot.solution_uid), (tests, slot.judge_uid)):
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="dynrank-sandbox-", dir=where, ignore_cleanup_errors=True)
            )
            cell = Cell(request, isolation, limits, Path(folder), uid, slot.tasks)
            stack.callback(cell.end)
            cells.append(cell)
        # Only the cells hold the pipes now: the judge sees the end when the solution is gone.
        pipes.close()
        for cell in cells:
            cell.await_ready(_STARTUP_SECONDS)
        start = time.monotonic()
        line = cells[1].read_line(limits.wall_seconds, watched=cells[0])
        seconds = time.monotonic() - start
    if line is None:
        return Result(Outcome.TIMEOUT, seconds)
    return Result(Outcome(line) if line in ("passed", "unparsable") else Outcome.FAILED, seconds)
