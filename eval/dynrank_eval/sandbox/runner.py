"""Runs programs: each one's solution and its tests in two cells that talk through pipes."""

import os
import queue
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dynrank_ds.errors import MachineError
from dynrank_eval.cpus import usable_cpus
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
    """Raise MachineError where the sandbox cannot run programs on this machine."""
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
    """Run each program, as many at a time as there are CPUs to use unless `workers` says otherwise.

    Args:
        limits: for all, or one for each.
        isolation: the strongest of this machine where None.
        folder: where the programs' own folders are made; None: the system's place for temporary files.

    Raises:
        MachineError: a process could not be started or confined.
    """
    each = limits if isinstance(limits, Sequence) else [limits or Limits()] * len(programs)
    isolation = isolation or detect()
    workers = max(1, min(workers or usable_cpus(), len(programs), len(_UNUSED_UIDS) // 2))
    processes = max((some.processes for some in each), default=0)
    with ExitStack() as held:
        slots = _slots(workers, processes, held)
        return _run_all(programs, each, isolation, workers, slots, folder)


def _run_all(
    programs: Sequence[Program],
    each: Sequence[Limits],
    isolation: Isolation,
    workers: int,
    slots: "queue.SimpleQueue[_Slot]",
    folder: Path | None,
) -> list[Result]:
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


def _slots(workers: int, processes: int, held: ExitStack) -> "queue.SimpleQueue[_Slot]":
    slots: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
    if os.geteuid() != 0:
        # An ordinary user's own tasks, and the other cells', count too.
        tasks = tasks_of(os.getuid()) + 2 * workers * processes
        for _ in range(workers):
            slots.put(_Slot(None, None, tasks))
        return slots
    users = _free_users(held)
    for _ in range(workers):
        slots.put(_Slot(next(users), next(users), processes))
    return slots


def _free_users(held: ExitStack) -> Iterator[int]:
    """Claim users that no other evaluator has, which would kill their programs, until `held` ends."""
    for uid in random.SystemRandom().sample(_UNUSED_UIDS, len(_UNUSED_UIDS)):
        claim = held.enter_context(socket.socket(socket.AF_UNIX))
        try:
            claim.bind(f"\0dynrank-sandbox-{uid}")  # a name without a file, gone with the evaluator
        except OSError:
            claim.close()
            continue
        yield uid
    raise MachineError(f"the sandbox has no user left of {_UNUSED_UIDS}: other evaluators use them all.")


@contextmanager
def _own_folder(where: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="dynrank-sandbox-", dir=where))
    try:
        yield folder
    finally:
        with suppress(RecursionError):
            shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():  # folders in folders, too deep for Python's stack or its open files
            subprocess.run(["rm", "-rf", "--", str(folder)], stderr=subprocess.DEVNULL, check=False)


def _run(program: Program, limits: Limits, isolation: Isolation, slot: _Slot, where: Path | None) -> Result:
    with ExitStack() as stack, ExitStack() as pipes:
        questions, answers = os.pipe(), os.pipe()
        for end in (*questions, *answers):
            pipes.callback(os.close, end)
        solution = {
            "solution": program.solution,
            "tolerant": program.tolerant,
            "reader": questions[0],
            "writer": answers[1],
        }
        tests = {
            "prelude": program.prelude,
            "names": list(program.names),
            "tests": list(program.tests),
            "reader": answers[0],
            "writer": questions[1],
        }
        cells = []
        for request, uid in ((solution, slot.solution_uid), (tests, slot.judge_uid)):
            folder = stack.enter_context(_own_folder(where))
            cell = Cell(request, isolation, limits, folder, uid, slot.tasks)
            stack.callback(cell.end)
            cells.append(cell)
        # Only the cells hold the pipes now: the judge sees the end when the solution is gone.
        pipes.close()
        for cell in cells:
            cell.await_ready(_STARTUP_SECONDS)
        return _verdict(cells[1], cells[0], limits)


def _verdict(judge: Cell, solution: Cell, limits: Limits) -> Result:
    """Read the judge's report: a line for each test source that passed, then the verdict."""
    start = time.monotonic()
    passed = 0
    while True:
        remaining = limits.wall_seconds - (time.monotonic() - start)
        line = judge.read_line(remaining, watched=solution)
        seconds = time.monotonic() - start
        if line is None:
            return Result(Outcome.TIMEOUT, seconds, passed)
        if line != "test passed":
            outcome = Outcome(line) if line in ("passed", "unparsable") else Outcome.FAILED
            return Result(outcome, seconds, passed)
        passed += 1
