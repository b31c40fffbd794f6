"""Which process ended a run: where one dies, hangs or fails, the others' collectives fail, and say nothing of it.

A dead process closes its connections, so that the others' next collective fails at once; one that hangs is waited
for as long as the process group's timeout. The others then meet once more, at the store through which all found each
other, and who is not there is named. (NCCL's own watchdog ends a process that waits for too long, naming the
collective, before this is reached.)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

GRACE = 5.0
"""Seconds for which the roll call waits."""
_COUNT = "dynrank/failed"


class LostProcessError(RuntimeError):
    """Another process ended the run; the message says which.

    speaks: whether this process is the one to tell, of all that know.
    """

    def __init__(self, message: str, speaks: bool) -> None:
        super().__init__(message)
        self.speaks = speaks


@contextmanager
def naming_the_lost() -> Iterator[None]:
    """Every process of the group runs its share of a run in this context.

    Raises:
        LostProcessError: in place of what torch says of a collective that another process has not taken part in.
    """
    try:
        yield
    except Exception as error:
        lost = _of_a_collective(error)
        message = f"{type(error).__name__}: {error}"
        answer: list[tuple[str, bool]] = []
        # In a thread of its own, since a store whose process hangs never answers.
        call = threading.Thread(target=_roll_call, args=(message, lost, answer), daemon=True)
        call.start()
        call.join(2 * GRACE)
        if not lost:
            raise
        first = "process 0 died or hung: it keeps the store that the others meet at, which does not answer"
        raise LostProcessError(*(answer[0] if answer else (first, dist.get_rank() == 1))) from error


def _of_a_collective(error: Exception) -> bool:
    """gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _roll_call(message: str, lost: bool, answer: list[tuple[str, bool]]) -> None:
    """Answers for this process and, if it failed for another's sake, appends who that is."""
    store = dist.distributed_c10d._get_default_store()
    rank, size = dist.get_rank(), dist.get_world_size()
    store.set_timeout(timedelta(seconds=GRACE))
    try:
        order = store.add(_COUNT, 1)
        store.set(f"{_COUNT}/{rank}", f"{order:06} {'lost' if lost else 'own'} {message}")
        if not lost:
            return
        deadline = time.monotonic() + GRACE
        while store.add(_COUNT, 0) < size and time.monotonic() < deadline:
            time.sleep(0.1)
        present = [other for other in range(size) if store.check([f"{_COUNT}/{other}"])]
        answers = {other: store.get(f"{_COUNT}/{other}").decode().split(" ", 2) for other in present}
    except RuntimeError:
        return  # the store is gone with its process: no answer is one
    answer.append(_verdict(answers, rank, size))
    if rank == 0:
        time.sleep(1)  # it keeps the store: the others read after it


def _verdict(answers: dict[int, list[str]], rank: int, size: int) -> tuple[str, bool]:
    """Who ended the run, and whether this process tells; answers: {process: [order, own or lost, message]}."""
    own = {other: told for other, told in answers.items() if told[1] == "own"}
    speaks = rank == min(answers.keys() - own.keys())
    if own:
        first = min(own, key=lambda other: own[other][0])
        return f"process {first} failed first: {own[first][2]}", speaks
    absent = [str(other) for other in range(size) if other not in answers]
    if absent:
        # Those that wait for one that has failed, and not for the lost one, do not know of it yet.
        among = "one of the processes" if len(absent) > 1 else "process"
        return f"{among} {', '.join(absent)} died or hung: no answer within {GRACE:.0f} s", speaks
    return f"a collective failed in every process: {answers[rank][2]}", speaks
