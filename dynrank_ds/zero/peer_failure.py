"""Which process ended a run: where one dies, hangs or fails, the others' collectives fail, and say nothing of it.

A dead process closes its connections, so that its neighbours' next collective fails at once; one that hangs is waited
for as long as the process group's timeout; those that wait for a neighbour that is well notice only when it leaves. So
a thread of every process looks whether any has failed, at the store through which all found each other, and answers
for its own: who does not answer is named. (NCCL's own watchdog ends a process that waits for too long, naming the
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
_PAUSE = 0.5
"""Seconds between two looks at the store: all processes' looks are served by process 0."""
_KEYS = ("called", "answer", "answers", "first", "lost", "verdict", "read")
_CALLED, _ANSWER, _ANSWERS, _FIRST, _LOST, _VERDICT, _READ = (f"dynrank/{key}" for key in _KEYS)


class PeerFailureError(RuntimeError):
    """Another process ended the run; the message says which.

    speaks: whether this process is the one to tell, of all that know.
    """

    def __init__(self, message: str, speaks: bool) -> None:
        super().__init__(message)
        self.speaks = speaks


@contextmanager
def name_failed_peer() -> Iterator[None]:
    """Every process of the group runs its share of a run in this context.

    Raises:
        PeerFailureError: in place of what torch says of a collective that another process has not taken part in.
    """
    call = _PeerMonitor()
    call.start()
    try:
        yield
    except Exception as error:
        lost = _of_a_collective(error)
        call.run_failed(f"{type(error).__name__}: {error}", lost)
        if not lost:
            raise
        raise PeerFailureError(*call.verdict()) from error
    finally:
        call.run_over()


def _of_a_collective(error: Exception) -> bool:
    """gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class _PeerMonitor(threading.Thread):
    """One process's part in the roll call, taken even while its run waits in a collective.

    It is a thread also because a store whose process hangs never answers.
    """

    def __init__(self) -> None:
        super().__init__(name="roll call", daemon=True)
        self._store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=GRACE))
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._over = threading.Event()
        self._failure = ""
        self._lost = False
        self._agreed: tuple[str, bool] | None = None

    def run_failed(self, message: str, lost: bool) -> None:
        """Calls the roll; returns when its verdict is there. lost: it failed for another process's sake."""
        self._lost = lost
        self._failure = message  # last: the thread looks at it first
        self.run_over(2 * GRACE)

    def run_over(self, seconds: float = 1.0) -> None:
        """The run needs no answers any more."""
        self._over.set()
        self.join(seconds)

    def verdict(self) -> tuple[str, bool]:
        """What ended the run, and whether this process is to tell."""
        first = "process 0 died or hung: it keeps the store that the others meet at, which does not answer"
        return self._agreed or (first, self._rank == 1)

    def run(self) -> None:
        try:
            called = False
            while not called and not self._over.wait(_PAUSE):
                called = self._store.check([_CALLED])
            if called or self._failure:
                self._meet()
        except RuntimeError:
            return  # the store is gone with its process: no verdict says so

    def _meet(self) -> None:
        """Answers, waits for the others' answers, and agrees with them on one verdict."""
        store, told = self._store, False
        store.set(f"{_ANSWER}/{self._rank}", "")
        store.add(_ANSWERS, 1)
        deadline = time.monotonic() + GRACE
        while True:
            if self._failure and not told:
                self._tell()
                told = True
            store.set(_CALLED, "")
            all_answered = store.add(_ANSWERS, 0) == self._size
            if all_answered and (store.check([_FIRST]) or store.add(_LOST, 0) == self._size):
                break
            if time.monotonic() > deadline:
                break
            time.sleep(_PAUSE)
        speaker, message = store.compare_set(_VERDICT, "", self._judge()).decode().split(" ", 1)
        self._agreed = message, int(speaker) == self._rank
        store.add(_READ, 1)
        # The first process keeps the store: it stays until the others have read.
        patience = time.monotonic() + 4 * _PAUSE
        while (
            self._rank == 0 and store.add(_READ, 0) < store.add(_ANSWERS, 0) and time.monotonic() < patience
        ):
            time.sleep(_PAUSE / 5)

    def _tell(self) -> None:
        if self._lost:
            self._store.set(f"{_ANSWER}/{self._rank}", self._failure)
            self._store.add(_LOST, 1)
        else:
            self._store.compare_set(_FIRST, "", f"{self._rank} {self._failure}")

    def _judge(self) -> str:
        """The number of the process that is to tell, and what ended the run."""
        store = self._store
        present = [other for other in range(self._size) if store.check([f"{_ANSWER}/{other}"])]
        failures = {other: store.get(f"{_ANSWER}/{other}").decode() for other in present}
        lost = [other for other in present if failures[other]]
        if store.check([_FIRST]):
            first, failure = store.get(_FIRST).decode().split(" ", 1)
            speaker = min(lost or [other for other in present if other != int(first)], default=int(first))
            return f"{speaker} process {first} failed first: {failure}"
        absent = [str(other) for other in range(self._size) if other not in present]
        if absent:
            names = f"process{'es' * (len(absent) > 1)} {', '.join(absent)}"
            return f"{lost[0]} {names} died or hung: no answer within {GRACE:.0f} s"
        well = [str(other) for other in present if other not in lost]
        but = f" but {', '.join(well)}, which may hang" if well else ""
        return f"{lost[0]} a collective failed in every process{but}: {failures[lost[0]]}"
