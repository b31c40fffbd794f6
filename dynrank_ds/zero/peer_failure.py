"""Detection of the process whose failure ended a run.

When one process dies, hangs or fails, collectives fail on the others, whose errors do not say which one it was. A dead
process closes its connections, so that its neighbours' next collective fails at once; a hanging one is waited for
until the process group's timeout; processes that wait for a healthy neighbour notice only when that one exits. So a
thread of every process polls the store of the rendezvous for a reported failure, and answers for its own process:
those without an answer are the failed ones. (NCCL's own watchdog ends a process that waits for too long, naming the
collective, before this is reached.)
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

GRACE = 5.0
"""Seconds for which answers are waited for."""
_INTERVAL = 0.5
"""Seconds between two polls of the store: process 0 serves those of all processes."""
_KEYS = (
    "failure_reported",
    "answer",
    "answers",
    "first_failure",
    "collective_failures",
    "cause",
    "read",
    "host",
)
FAILURE_REPORTED, _ANSWER, _ANSWERS, _FIRST, _COLLECTIVE_FAILURES, _CAUSE, _READ, _HOST = (
    f"dynrank/{key}" for key in _KEYS
)


class PeerFailureError(RuntimeError):
    """Another process ended the run; the message says which.

    should_report: whether this process is the one, of all that know, that prints the message.
    """

    def __init__(self, message: str, should_report: bool) -> None:
        super().__init__(message)
        self.should_report = should_report


@contextmanager
def name_failed_peer(record: Callable[[str], None]) -> Iterator[None]:
    """Run this process's share of a run; every process of the group must enter.

    record: called with what ended a run that failed, in one of the processes that are left.

    Raises:
        PeerFailureError: in place of torch's error of a collective in which another process did not take part.
    """
    monitor = _PeerMonitor()
    monitor.start()
    try:
        yield
    except Exception as error:
        in_collective = _is_of_a_collective(error)
        monitor.report_failure(f"{type(error).__name__}: {error}", in_collective)
        cause, should_report = monitor.cause()
        if should_report:
            record(cause)
        if not in_collective:
            raise
        raise PeerFailureError(cause, should_report) from error
    finally:
        monitor.stop()


def _is_of_a_collective(error: Exception) -> bool:
    """Return whether the error is a collective's; gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class _PeerMonitor(threading.Thread):
    """One process's part in finding the failed peer, active even while its run waits in a collective.

    It is a thread also because a store whose process hangs never answers.
    """

    def __init__(self) -> None:
        super().__init__(name="peer monitor", daemon=True)
        self._store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=GRACE))
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._stopped = threading.Event()
        self._failure = ""
        self._in_collective = False
        self._agreed: tuple[str, bool] | None = None

    def report_failure(self, message: str, in_collective: bool) -> None:
        """Report this process's failure to the others; return when the cause is agreed on.

        in_collective: it failed because another process did.
        """
        self._in_collective = in_collective
        self._failure = message  # last: the thread looks at it first
        self.stop(2 * GRACE)

    def stop(self, seconds: float = 1.0) -> None:
        """End the thread: the run needs no answers any more."""
        self._stopped.set()
        self.join(seconds)

    def cause(self) -> tuple[str, bool]:
        """Return what ended the run, and whether this process should report it."""
        store_failed = (
            f"process 0 died or hung, or the network to its node ({os.environ['MASTER_ADDR']}) is cut: the rendezvous "
            "store there does not answer"
        )
        # Without a store nothing can be agreed on: each node that is left says it, since no other's log may be seen.
        return self._agreed or (store_failed, self._rank == 1 or os.environ["LOCAL_RANK"] == "0")

    def run(self) -> None:
        try:
            self._store.set(f"{_HOST}/{self._rank}", socket.gethostname())
            reported = False
            while not reported and not self._stopped.wait(_INTERVAL):
                reported = self._store.check([FAILURE_REPORTED])
            if reported or self._failure:
                self._agree_on_cause()
        except RuntimeError:
            return  # the store's process has ended: `cause` says so

    def _agree_on_cause(self) -> None:
        """Answer, wait for the others' answers, and agree with them on one cause."""
        store, published = self._store, False
        store.set(f"{_ANSWER}/{self._rank}", "")
        store.add(_ANSWERS, 1)
        deadline = time.monotonic() + GRACE
        while True:
            if self._failure and not published:
                self._publish_failure()
                published = True
            store.set(FAILURE_REPORTED, "")
            all_answered = store.add(_ANSWERS, 0) == self._size
            if all_answered and (store.check([_FIRST]) or store.add(_COLLECTIVE_FAILURES, 0) == self._size):
                break
            if time.monotonic() > deadline:
                break
            time.sleep(_INTERVAL)
        reporter, message = store.compare_set(_CAUSE, "", self._find_cause()).decode().split(" ", 1)
        self._agreed = message, int(reporter) == self._rank
        store.add(_READ, 1)
        # Process 0 serves the store: it stays until the others have read.
        deadline = time.monotonic() + 4 * _INTERVAL
        while (
            self._rank == 0 and store.add(_READ, 0) < store.add(_ANSWERS, 0) and time.monotonic() < deadline
        ):
            time.sleep(_INTERVAL / 5)

    def _publish_failure(self) -> None:
        if self._in_collective:
            self._store.set(f"{_ANSWER}/{self._rank}", self._failure)
            self._store.add(_COLLECTIVE_FAILURES, 1)
        else:
            self._store.compare_set(_FIRST, "", f"{self._rank} {self._failure}")

    def _find_cause(self) -> str:
        """Return the number of the process that should report, and what ended the run."""
        store = self._store
        answering = [other for other in range(self._size) if store.check([f"{_ANSWER}/{other}"])]
        failures = {other: store.get(f"{_ANSWER}/{other}").decode() for other in answering}
        failed = [other for other in answering if failures[other]]
        if store.check([_FIRST]):
            first, failure = store.get(_FIRST).decode().split(" ", 1)
            reporter = min(failed or [o for o in answering if o != int(first)], default=int(first))
            return f"{reporter} process {first} failed first: {failure}"
        silent = [other for other in range(self._size) if other not in answering]
        if silent:
            names = f"process{'es' * (len(silent) > 1)} {', '.join(map(str, silent))}"
            known = [key for other in silent if store.check([key := f"{_HOST}/{other}"])]
            hosts = " or ".join(sorted({store.get(key).decode() for key in known})) or "there"
            silence = f"no answer from {hosts} within {GRACE:.0f} s"
            return f"{failed[0]} {names} died or hung, or the network is cut: {silence}"
        healthy = [str(other) for other in answering if other not in failed]
        but = f" but {', '.join(healthy)}, which may hang" if healthy else ""
        return f"{failed[0]} a collective failed in every process{but}: {failures[failed[0]]}"
